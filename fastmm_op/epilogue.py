"""What a plan tells the kernels of the epilogue: who applies it, to how much at a time."""

from fastmm_op.launches import Pointer
from fastmm_op.problem import Epilogue, Problem
from fastmm_op.tiles import Choice, Tile

NONE = Epilogue()


def product_epilogue(problem: Problem, choice: Choice) -> Epilogue:
    """What the kernel that multiplies applies: nothing to partial sums, which the sum's will."""
    return problem.epilogue if choice.split == 1 else NONE


def epilogue_pointers(problem: Problem, epilogue: Epilogue) -> tuple[Pointer | None, ...]:
    """The kernels' bias_ptr and residual_ptr."""
    bias = Pointer("bias", problem.dtype) if epilogue.bias else None
    residual = Pointer("residual", problem.dtype) if epilogue.residual else None
    return bias, residual


def slice_columns(problem: Problem, epilogue: Epilogue, tile: Tile) -> int:
    """Columns of a tile that gemm_kernel finishes at a time; 0: it has nothing to finish.

    32 elements a thread fit the registers beside the accumulator; 16 where each needs two addresses
    of its own, C's and the residual's, because Triton does not know how their rows are aligned (it
    asks whether 16 divides N).
    """
    if epilogue == NONE:
        return 0
    scattered = epilogue.residual and problem.N % 16 != 0
    elements = (16 if scattered else 32) * 32 * tile.num_warps
    return tile.block_n // max(1, tile.block_m * tile.block_n // elements)


def hopper_slice_columns(epilogue: Epilogue) -> int:
    """Columns that Hopper's kernels finish and store at a time, beside their accumulators."""
    return 64 if epilogue == NONE else 32


def describe_epilogue(problem: Problem, choice: Choice) -> list[str]:
    """What is applied where, in a sentence for people; nothing if there is no epilogue."""
    epilogue = problem.epilogue
    parts = ["bias"] * epilogue.bias
    parts += [epilogue.activation] * (epilogue.activation != "none")
    parts += ["residual"] * epilogue.residual
    where = "the kernel that multiplies" if choice.split == 1 else "the sum over the splits"
    where += ", to the last tiles by their sum" if choice.tail_split > 1 else ""
    return [f"{', '.join(parts)}: applied by {where}"] if parts else []
