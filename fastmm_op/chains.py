"""How many products a program may sum: what the accuracy of each precision leaves to planning."""

from fastmm_op.problem import Problem, cdiv

# Programs that may share K, at the most.
MOST_SPLITS = 512
# Products of few rows or columns are bandwidth-bound and split by cuBLAS too, whose fp32 sums are
# the more accurate for it: a chain of IEEE sums is so long at most, if there are splits enough
# (1024, and what an odd K leaves).
FEW_ROWS = 32
LONGEST_CHAIN = 1040
# A kernel that adds the sums of 32 products, and whose IEEE sums are chains of 1024 by themselves:
# shares of K = 65536 kept the promise (f in benchmarks/results/NVIDIA_H100_80GB_HBM3/tests.txt).
LONGEST_CHAIN_OF_BLOCKS = 8192
# Sums in the tensor core are truncated, which shows where thousands of numbers of one sign are
# added. Of a result so small that cuBLAS shares out K, so long a chain loses no more than cuBLAS's
# (uniform numbers, 509 x 4095 x 511: 1024 lose 1.4 times as much; benchmarks/results/NVIDIA_H200).
LONGEST_TRUNCATED_CHAIN = 512


def chain_is_short(problem: Problem, kind: str, split: int, kernel: str) -> bool:
    """Whether sums of so many splits are as accurate as the problem's precision promises."""
    chain = cdiv(problem.K, split)
    if kernel == "gemm_tf32_hopper" and kind == "tf32x3" and not has_few_rows(problem):
        return chain <= LONGEST_CHAIN_OF_BLOCKS
    # Where numbers are too large for "tf32x3", the sums are IEEE's.
    if kind == "tf32x3" or (kind == "ieee" and has_few_rows(problem)):
        return chain <= max(LONGEST_CHAIN, cdiv(problem.K, MOST_SPLITS))
    if kind in ("tf32", "misaligned tf32") and sums_must_be_short(problem):
        return chain <= max(LONGEST_TRUNCATED_CHAIN, cublas_chain(problem))
    if kind == "16-bit" and sums_must_be_short(problem):
        return chain <= longest_truncated_chain(problem)
    return True


def has_few_rows(problem: Problem) -> bool:
    return min(problem.M, problem.N) <= FEW_ROWS


def sums_must_be_short(problem: Problem) -> bool:
    """Whether cuBLAS, whose error in TF32 is the yardstick, would share out K among programs."""
    few = 4 * cublas_tiles(problem) <= problem.arch.sms
    return problem.tf32 and few and problem.K > LONGEST_TRUNCATED_CHAIN


def cublas_tiles(problem: Problem) -> int:
    return problem.batch * cdiv(problem.M, 128) * cdiv(problem.N, 128)


def cublas_chain(problem: Problem) -> int:
    """The K of a program, if as many share each of cuBLAS's tiles as the card has room for.

    Of 256x524288x256, uniform numbers, cuBLAS's error in TF32 is twice that of chains of 8192
    (benchmarks/results/NVIDIA_H200/study_2026-11-25_split.txt).
    """
    return cdiv(problem.K * cublas_tiles(problem), problem.arch.sms)


def longest_truncated_chain(problem: Problem) -> int:
    return max(LONGEST_TRUNCATED_CHAIN, cdiv(problem.K, MOST_SPLITS))
