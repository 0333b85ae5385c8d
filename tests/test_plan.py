"""Are plans legal and sensible? For every card, on a machine with none of them."""

import ast
import dataclasses
import json
from pathlib import Path

import expecttest
import pytest

from fastmm_op.arch import ARCHES, arch_for
from fastmm_op.choices import choices
from fastmm_op.launches import Descriptor, Launch, Plan, Pointer
from fastmm_op.plan import make_plan, write_plan
from fastmm_op.problem import PRECISIONS, Operand, Problem

PACKAGE = Path(__file__).parent.parent / "fastmm_op"
SUITE = Path(__file__).parent.parent / "benchmarks/suite.json"
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2, "int32": 4}
SEED = (8205, 2949, 5921)


def problem(
    m: int,
    k: int,
    n: int,
    layout: str = "NN",
    dtype: str = "fp32",
    precision: str = "tf32",
    arch: str = "sm_89",
    batch: int = 1,
    pitch: int = 0,
) -> Problem:
    """A product of contiguous (N) or transposed (T) operands; pitch widens the rows of both."""

    def operand(rows: int, columns: int, transposed: bool, rows_are_k: bool) -> Operand:
        outer, inner = (columns, rows) if transposed else (rows, columns)
        pitched = inner + pitch
        row, column = (1, pitched) if transposed else (pitched, 1)
        strides = (column, row) if rows_are_k else (row, column)
        return Operand(outer * pitched if batch > 1 else 0, *strides)

    a = operand(m, k, layout[0] == "T", rows_are_k=False)
    b = operand(k, n, layout[1] == "T", rows_are_k=True)
    return Problem(batch, m, n, k, dtype, precision, a, b, ARCHES[arch])


def suite_problems() -> list[Problem]:
    """Every shape of the benchmark suite, dtype and precision."""
    found = []

    def add(entry, arch, m, k, n, layouts, dtypes=("fp32", "fp16", "bf16")) -> None:
        for layout in [layouts] if isinstance(layouts, str) else layouts:
            for dtype in dtypes:
                for precision in PRECISIONS if dtype == "fp32" else ("tf32",):
                    batch = entry.get("batch", 1)
                    found.append(problem(m, k, n, layout, dtype, precision, arch, batch))

    suite = json.loads(SUITE.read_text())
    for arch in ARCHES:
        for entry in suite["kernelbench_level1_fp32"] + suite["gpt2_vocab"]:
            add(entry, arch, entry["M"], entry["K"], entry["N"], entry["layout"])
        sweep = suite["odd_sweep"]
        for n in sweep["N"]:
            add(sweep, arch, sweep["M"], sweep["K"], n, "NN")
        rows, skinny = suite["odd_rows"], suite["skinny"]
        for m in rows["M"]:
            add(rows, arch, m, rows["K"], rows["N"], rows["layout"])
        for m in skinny["M"]:
            for k, n in skinny["KN"]:
                add(skinny, arch, m, k, n, skinny["layout"])
        for n in suite["aligned_squares"]["n"]:
            add({}, arch, n, n, n, "NN")
    return found


SMALL = [
    problem(m, k, n, layout, dtype, precision, arch, batch)
    for arch in ARCHES
    for m, k, n in [(1, 1, 1), (17, 4097, 33), (300, 256, 128), (513, 1031, 1), (64, 40000, 64)]
    for layout in ("NN", "TT")
    for batch in (1, 3)
    for dtype, precision in [("fp32", "tf32"), ("fp32", "fp32"), ("fp16", "tf32")]
]


@pytest.fixture(scope="module")
def argument_names() -> dict[str, list[str]]:
    """The parameters of every kernel, by name."""
    pytest.importorskip("triton")
    from fastmm_op.launch import KERNELS

    return {name: kernel.arg_names for name, kernel in KERNELS.items()}


def span(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a tensor."""
    return sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True)) + 1


def elements_reached(step: Launch, arg: dict) -> dict[str, int]:
    """How far past each pointer that may be workspace a kernel reads or writes, in elements."""
    if step.kernel in ("pack_rows", "pack_tiles"):
        blocks = -(-(arg["R"] + arg["wrap"]) // arg["BLOCK_R"])
        if step.kernel == "pack_tiles":
            blocks *= -(-arg["pitch"] // arg["BLOCK_K"])
        assert step.grid % blocks == 0
        rows = step.grid // blocks * arg["R"]
        reached = {"packed_ptr": (rows + arg["wrap"]) * arg["pitch"], "exp_ptr": rows}
        if step.kernel == "pack_tiles":
            reached["max_ptr"] = span((arg["CHUNKS"], rows), (arg["max_pitch"], 1))
        return reached
    if step.kernel == "row_max":
        return {"max_ptr": arg["CHUNKS"] * arg["max_pitch"]}
    if step.kernel == "gemv":
        return {"y_ptr": arg["split_k"] * arg["batch"] * arg["R"]}
    m, n, k, batch, products = arg["M"], arg["N"], arg.get("K"), arg["batch"], arg["split_k"]
    products *= batch * m * n
    if step.kernel == "gemm_hopper":
        exponents = {
            "row_exp_ptr": span((batch, m), (arg["row_exp_step"], 1)),
            "col_exp_ptr": span((batch, n), (arg["col_exp_step"], 1)),
        }
        assert (arg["stride_cz"], arg["stride_cm"]) == (m * n, n)
        return exponents | {"c_ptr": products}
    exponents = {
        "row_exp_ptr": span((batch, m), (arg["stride_row_exp"], 1)),
        "col_exp_ptr": span((batch, n), (arg["stride_col_exp"], 1)),
    }
    if step.kernel == "reduce":
        return exponents | {"partial_ptr": products}
    assert step.kernel == "gemm", f"say here what {step.kernel} reaches"
    if not arg["CLAMP"]:  # whole tiles are read
        m = -(-m // arg["BLOCK_M"]) * arg["BLOCK_M"]
        n = -(-n // arg["BLOCK_N"]) * arg["BLOCK_N"]
    a_strides = arg["stride_ab"], arg["stride_am"], arg["stride_ak"]
    b_strides = arg["stride_bb"], arg["stride_bn"], arg["stride_bk"]
    return exponents | {
        "a_ptr": span((batch, m, k), a_strides),
        "b_ptr": span((batch, n, k), b_strides),
        "c_ptr": products,
    }


def check_workspace(plan: Plan, names: dict[str, list[str]]) -> None:
    """Every region lies inside the workspace, and no two regions overlap."""
    regions: dict[int, int] = {}
    dtypes: dict[int, str] = {}
    for step in plan.launches:
        arg = dict(zip(names[step.kernel], step.args, strict=False)) | step.constexprs
        assert set(arg) == set(names[step.kernel]), f"{step.kernel} lacks an argument"
        reached = elements_reached(step, arg)
        for name, value in arg.items():
            pointer = value.pointer if isinstance(value, Descriptor) else value
            if not isinstance(pointer, Pointer) or pointer.buffer != "workspace":
                continue
            assert pointer.offset % 256 == 0
            assert dtypes.setdefault(pointer.offset, pointer.dtype) == pointer.dtype
            if isinstance(value, Descriptor):
                size = span(value.shape, value.strides)
            else:
                size = reached[name]
            size *= ITEMSIZE[pointer.dtype]
            regions[pointer.offset] = max(size, regions.get(pointer.offset, 0))
    end = 0
    for offset, size in sorted(regions.items()):
        assert offset >= end, f"{plan.strategy}: the region at {offset} starts before {end}"
        end = offset + size
    assert end <= plan.workspace_bytes


def check_plan(p: Problem, plan: Plan, names: dict[str, list[str]]) -> None:
    for step in plan.launches:
        assert 0 < step.grid < 2**31, step.kernel
        assert step.shared_memory <= p.arch.shared_memory, step.kernel
    assert plan.seconds > 0
    assert plan.why
    check_workspace(plan, names)


@pytest.mark.skipif(not SUITE.exists(), reason="benchmarks/suite.json is not there")
def test_the_whole_suite(argument_names) -> None:
    problems = suite_problems()
    assert len(problems) > 500
    for p in problems:
        check_plan(p, make_plan(p), argument_names)


def test_every_choice_is_legal(argument_names) -> None:
    for p in SMALL:
        for choice in choices(p):
            check_plan(p, write_plan(p, choice), argument_names)


def test_pure() -> None:
    """The same problem has the same plan, whoever made it, and a plan cannot be changed."""
    first = make_plan(problem(*SEED))
    make_plan.cache_clear()
    assert make_plan(problem(*SEED)) == first
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.strategy = "direct"


PURE = ("arch", "problem", "choices", "estimate", "launches", "packing", "plan")


@pytest.mark.parametrize("module", PURE)
def test_planning_needs_neither_torch_nor_triton(module) -> None:
    imported = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    standard = {"collections.abc", "dataclasses", "functools", "math", "typing"}
    assert imported <= standard | {f"fastmm_op.{name}" for name in PURE}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_what_is_aligned_is_never_packed(dtype, arch) -> None:
    for n in (64, 512, 4096):
        for layout in ("NN", "NT", "TN", "TT"):
            assert not packs(make_plan(problem(n, n, n, layout, dtype, arch=arch)))


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_large_misaligned_is_packed(dtype, arch) -> None:
    for shape in (SEED, (4095, 4095, 4095)):
        assert make_plan(problem(*shape, dtype=dtype, arch=arch)).strategy.startswith("packed")
    # Only B's rows are misaligned here: fp32 packs both (one exponent each), 16 bits B alone.
    vocabulary = make_plan(problem(4096, 768, 50257, dtype=dtype, arch=arch))
    assert vocabulary.strategy.startswith("packed" if dtype == "fp32" else "mixed")


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_small_is_direct(dtype, arch) -> None:
    """Below some 100 of each size, one launch costs more than the product."""
    for n in (1, 17, 64, 100):
        assert make_plan(problem(n, n, n, dtype=dtype, arch=arch)).strategy == "direct"


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("precision", ["fp32", "ieee"])
def test_full_precision_is_not_rounded_to_16_bits(precision, arch) -> None:
    for choice in choices(problem(*SEED, precision=precision, arch=arch)):
        assert choice.pack_a is choice.pack_b is False


@pytest.mark.parametrize("arch", ARCHES)
def test_few_tiles_and_a_long_k_are_split(arch) -> None:
    assert make_plan(problem(256, 524288, 256, arch=arch)).strategy.endswith("+split")
    assert not make_plan(problem(8192, 512, 8192, arch=arch)).strategy.endswith("+split")


def packs(plan: Plan) -> bool:
    return any(step.kernel.startswith("pack") for step in plan.launches)


@pytest.mark.parametrize("arch", ARCHES)
def test_sizes_of_zero_launch_nothing(arch) -> None:
    for m, k, n, batch in [(0, 5, 3, 1), (5, 0, 3, 1), (5, 3, 0, 1), (5, 3, 2, 0)]:
        plan = make_plan(problem(m, k, n, arch=arch, batch=batch))
        assert (plan.strategy, plan.launches, plan.workspace_bytes) == ("zero", (), 0)


@pytest.mark.parametrize(
    ("shape", "pitch", "wide"),
    [
        ((64, 64, 64), 0, False),
        ((256, 64, 64), 2**20, False),
        ((256, 64, 64), 2**28, True),  # A's rows, and B's
        ((64, 4096, 64), 2**26, True),  # B's rows are its K
        ((256, 16, 2**28), 0, True),  # C's rows
        ((2**20, 64, 2**12), 0, False),  # 2**32 elements, but no tile of them is large
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_wide_offsets(shape, pitch, wide, dtype) -> None:
    """64-bit offsets inside a tile exactly where 32 bits would overflow."""
    p = problem(*shape, dtype=dtype, pitch=pitch)
    direct = [c for c in choices(p) if not (c.pack_a or c.pack_b)]
    largest = max(direct, key=lambda c: c.tile.block_m * c.tile.block_n)
    (gemm,) = (s for s in write_plan(p, largest).launches if s.kernel == "gemm")
    assert gemm.constexprs["WIDE"] is wide


def test_architectures() -> None:
    assert arch_for((7, 5), 40) is None
    expected = {(8, 0): "sm_80", (8, 6): "sm_89", (8, 9): "sm_89", (9, 0): "sm_90"}
    expected |= {(10, 0): "sm_89", (12, 0): "sm_89"}
    for capability, name in expected.items():
        arch = arch_for(capability, 77)
        assert (arch.name, arch.sms) == (name, 77), capability


def outline(plan: Plan) -> str:
    kernels = " ".join(step.kernel for step in plan.launches)
    return f"{plan.strategy}: {kernels}"


def test_outlines() -> None:
    """The shape of a few plans for an RTX 4090; their numbers are still being tuned."""
    problems = {
        "seed, fp32": problem(*SEED),
        "seed, bf16": problem(*SEED, dtype="bf16"),
        "seed, fp32 in full": problem(*SEED, precision="fp32"),
        "64^3": problem(64, 64, 64),
        "4096^3, fp16": problem(4096, 4096, 4096, dtype="fp16"),
        "256x524288x256": problem(256, 524288, 256),
    }
    text = "\n".join(f"{name}: {outline(make_plan(p))}" for name, p in problems.items())
    expecttest.assert_expected_inline(
        text,
        """\
seed, fp32: packed: pack_rows row_max pack_tiles gemm
seed, bf16: packed: pack_tiles pack_tiles gemm
seed, fp32 in full: direct: gemm
64^3: direct: gemm
4096^3, fp16: direct: gemm
256x524288x256: direct+split: gemm reduce""",
    )
