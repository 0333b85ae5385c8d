"""Are plans legal and sensible? For every card, on a machine with none of them."""

import ast
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import expecttest
import pytest
import torch

import fastmm_op.plan as plan_module
from fastmm_op.arch import ARCHES, Card, arch_for, resized
from fastmm_op.bench.cases import load_cases
from fastmm_op.card import card_of
from fastmm_op.choices import choices, slabs_as_batch
from fastmm_op.estimate import estimate
from fastmm_op.launches import Descriptor, Launch, Plan, Pointer
from fastmm_op.packing import PACKING_KERNELS
from fastmm_op.plan import make_plan, reasons, write_plan
from fastmm_op.planned import planned_arch
from fastmm_op.problem import PRECISIONS, Epilogue, Operand, Problem
from fastmm_op.tiles import HOPPER_KERNELS

PACKAGE = Path(__file__).parent.parent / "fastmm_op"
SUITE = PACKAGE / "bench/suite.json"
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
    from fastmm_op.running import KERNELS

    return {name: kernel.arg_names for name, kernel in KERNELS.items()}


def span(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a tensor."""
    return sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True)) + 1


def moved_elements(batch: int, arg: dict) -> int:
    """Of what balancing says of its blocks, what a packing kernel reads."""
    return span((batch, -(-arg["K"] // arg["BALANCE_BLOCK"])), (arg["stride_moved"], 1))


def row_tiles(arg: dict, block_m: int) -> int:
    """Of C; the same number for each class of A's rows."""
    return arg["A_CLASSES"] * -(-arg["M"] // (arg["A_CLASSES"] * block_m))


def elements_reached(step: Launch, arg: dict) -> dict[str, int]:
    """How far past each pointer that may be workspace a kernel reads or writes, in elements."""
    if step.kernel in PACKING_KERNELS:
        strips, wraps = (-(-rows // arg["BLOCK_R"]) for rows in (arg["R"], arg["wrap"]))
        blocks = strips + wraps
        if step.kernel != "pack_rows":
            blocks *= -(-arg["pitch"] // arg["BLOCK_K"])
        if step.kernel == "pack_strips":
            blocks += strips * -(-arg["K"] // arg["BLOCK_K"])
        batch, rest = divmod(step.grid, blocks)
        assert rest == 0
        rows = batch * arg["R"]
        packed = (rows + arg["wrap"]) * arg.get("PARTS", 1) * arg["pitch"]
        if step.kernel == "copy_tiles":
            return {"packed_ptr": packed}
        k_exp = span((batch, arg["K"]), (arg["stride_k_exp"], 1))
        moved = moved_elements(batch, arg)
        reached = {"packed_ptr": packed, "exp_ptr": rows, "k_exp_ptr": k_exp, "moved_ptr": moved}
        return reached | {"largest_ptr": rows + batch * strips}
    if step.kernel == "forget":
        return {"largest_ptr": arg["rows"] + arg["strips"]}
    if step.kernel == "balance":
        groups = step.grid // -(-arg["K"] // arg["BLOCK_K"])
        exponents = dict.fromkeys(("a_exp_ptr", "b_exp_ptr"), groups * arg["K"])
        maxima = {f"{x}_largest_ptr": arg[f"{x}_rows"] + arg[f"{x}_strips"] for x in "ab"}
        return exponents | maxima | {"moved_ptr": step.grid}
    if step.kernel == "gemv":
        return {"y_ptr": arg["split_k"] * arg["batch"] * arg["R"]}
    if step.kernel == "reduce_tail":
        tiles = row_tiles(arg, arg["BLOCK_M"]) * arg["tiles_n"]
        batch, rest = divmod(arg["whole"] + arg["tail_tiles"], tiles)
        assert rest == 0, "the tail ends with the last tile"
        assert step.grid * arg["BLOCK_R"] == arg["tail_tiles"] * arg["BLOCK_M"]
        partial = arg["SPLITS"] * arg["tail_tiles"] * arg["BLOCK_M"] * arg["BLOCK_N"]
        return {
            "partial_ptr": partial,
            "row_exp_ptr": span((batch, arg["M"]), (arg["stride_row_exp"], 1)),
            "col_exp_ptr": span((batch, arg["N"]), (arg["stride_col_exp"], 1)),
        }
    m, n, k, batch, products = arg["M"], arg["N"], arg.get("K"), arg["batch"], arg["split_k"]
    products *= batch * m * n
    if step.kernel == "gemm_hopper":
        exponents = {
            "row_exp_ptr": span((batch, m), (arg["row_exp_step"], 1)),
            "col_exp_ptr": span((batch, n), (arg["col_exp_step"], 1)),
        }
        assert (arg["stride_cz"], arg["stride_cm"]) == (m * n, n)
        tile_m, tile_n = 128, arg["BLOCK_N"]
        tiles_n = n // tile_n - 1 if arg["EDGE_N"] else -(-n // tile_n)
        tiles = batch * row_tiles(arg, tile_m) * tiles_n
        assert 0 <= arg["whole"] <= tiles
        partial = (tiles - arg["whole"]) * arg["split_k"] * tile_m * tile_n
        return exponents | {"c_ptr": products, "partial_ptr": partial}
    if step.kernel == "gemm_tf32_hopper":
        row_of_c = m if arg["TRANSPOSED"] else n
        assert (arg["stride_cz"], arg["stride_cm"]) == (m * n, row_of_c)
        return {"c_ptr": products}
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
    assert (arg["PARTS"] == 2) is (arg["lo_offset"] > 0)
    if arg["B_SHIFTED"] and arg["B_K_MAJOR"]:  # each item is some columns of one product
        products = arg["split_k"] * m * arg["rows_total"]
        assert -(-arg["rows_total"] // batch) == n
    return exponents | {
        "a_ptr": span((batch, m, k), a_strides) + arg["lo_offset"],
        "b_ptr": span((batch, n, k), b_strides) + arg["lo_offset"],
        "c_ptr": products,
    }


def check_buffer(
    launches: tuple[Launch, ...], names: dict[str, list[str]], buffer: str, size_in_bytes: int
) -> None:
    """Every region lies inside the buffer, and no two regions overlap."""
    regions: dict[int, int] = {}
    dtypes: dict[int, str] = {}
    for step in launches:
        arg = dict(zip(names[step.kernel], step.args, strict=False)) | step.constexprs
        assert set(arg) == set(names[step.kernel]), f"{step.kernel} lacks an argument"
        reached = elements_reached(step, arg)
        for name, value in arg.items():
            pointer = value.pointer if isinstance(value, Descriptor) else value
            if not isinstance(pointer, Pointer) or pointer.buffer != buffer:
                continue
            assert pointer.offset % 256 == 0
            assert dtypes.setdefault(pointer.offset, pointer.dtype) == pointer.dtype
            if isinstance(value, Descriptor):
                size = span(value.shape, value.strides)
            else:
                size = reached[name]
            assert size <= pointer.elements, f"{step.kernel}: {name} has fewer elements"
            size *= ITEMSIZE[pointer.dtype]
            regions[pointer.offset] = max(size, regions.get(pointer.offset, 0))
    end = 0
    for offset, size in sorted(regions.items()):
        assert offset >= end, f"{buffer}: the region at {offset} starts before {end}"
        end = offset + size
    assert end <= size_in_bytes


def check_plan(p: Problem, plan: Plan, names: dict[str, list[str]]) -> None:
    for step in plan.launches:
        assert 0 < step.grid < 2**31, step.kernel
        assert step.shared_memory <= p.arch.shared_memory, step.kernel
    assert plan.seconds > 0
    check_buffer(plan.launches, names, "workspace", plan.workspace_bytes)


def test_the_whole_suite(argument_names) -> None:
    problems = suite_problems()
    assert len(problems) > 500
    for p in problems:
        check_plan(p, make_plan(p), argument_names)


def test_every_choice_is_legal(argument_names) -> None:
    for p in SMALL:
        for choice in choices(p):
            plan = write_plan(p, choice)
            check_plan(p, plan, argument_names)
            assert plan.choice == choice


def test_reasons() -> None:
    """A sentence for each operand, the kernel, and what packing would cost or save."""
    p = problem(256, 524288, 256)
    said = reasons(p, make_plan(p).choice)
    assert said[:2] == tuple(f"{name} is 16-byte aligned: read as it is" for name in "ab")
    assert any("gemm with" in sentence for sentence in said)
    assert any("K is shared by" in sentence for sentence in said)
    assert [sentence.split(":")[0] for sentence in said[-2:]] == [
        "estimate with nothing packed",
        "estimate with a and b packed",
    ]
    nothing = problem(0, 5, 3)
    assert "zeros or empty" in reasons(nothing, make_plan(nothing).choice)[0]


def test_planning_writes_no_reasons(monkeypatch) -> None:
    """They estimate every choice once more: a call does not pay for sentences nobody asked for."""
    monkeypatch.setattr(plan_module, "reasons", None)
    p = problem(123, 457, 789)
    make_plan.cache_clear()
    assert make_plan(p).choice in list(choices(p))


FULL = Epilogue(bias=True, activation="gelu", residual=True)


def with_epilogue(p: Problem, epilogue: Epilogue = FULL) -> Problem:
    return dataclasses.replace(p, epilogue=epilogue)


def test_every_choice_with_an_epilogue_is_legal(argument_names) -> None:
    for p in SMALL[::3]:
        legal = list(choices(with_epilogue(p)))
        assert legal
        for choice in legal:
            check_plan(with_epilogue(p), write_plan(with_epilogue(p), choice), argument_names)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    "epilogue", [FULL, Epilogue(bias=True), Epilogue(activation="silu")], ids=str
)
def test_the_epilogue_is_applied_once_and_last(arch, epilogue, argument_names) -> None:
    """By the kernel that writes C: to the sum where K is split, never to its parts.

    Where the last tiles are shared, two kernels write C, each its own tiles.
    """
    for shape in ((300, 256, 128), (17, 4097, 33), (1, 4097, 33), (33, 4097, 1)):
        p = with_epilogue(problem(*shape, arch=arch), epilogue)
        for choice in choices(p):
            steps = write_plan(p, choice).launches
            writers = 1 + (choice.tail_split > 1)
            for step in steps[-writers:]:
                names = argument_names[step.kernel]
                arg = dict(zip(names, step.args, strict=False)) | step.constexprs
                applied = (arg["bias_ptr"] is not None, arg["residual_ptr"] is not None)
                assert applied == (epilogue.bias, epilogue.residual)
                assert arg["ACTIVATION"] == epilogue.activation
            for step in steps[:-writers]:
                assert step.constexprs.get("ACTIVATION", "none") == "none"
                buffers = {arg.buffer for arg in step.args if isinstance(arg, Pointer)}
                assert not buffers & {"bias", "residual", "c"}


@pytest.mark.parametrize("arch", ARCHES)
def test_a_product_without_an_epilogue_says_so_to_every_kernel(arch) -> None:
    """All that the epilogue adds to a kernel is compiled out then."""
    for p in SMALL:
        if p.arch is ARCHES[arch]:
            for step in make_plan(p).launches:
                assert step.constexprs.get("ACTIVATION", "none") == "none"
                # Partial sums of slabs are fp32, of which TMA's boxes hold 32. Of 16-bit rows in
                # classes consumers store 128 at a time.
                slices = {128, 64, 32} if step.kernel == "gemm_hopper" else {0}
                assert step.constexprs.get("SLICE_N", 0) in slices
                buffers = {arg.buffer for arg in step.args if isinstance(arg, Pointer)}
                assert buffers <= {"a", "b", "c", "workspace"}


def test_the_estimate_counts_the_residual() -> None:
    p = problem(4096, 768, 3072)
    plain = make_plan(p).seconds
    assert make_plan(with_epilogue(p, Epilogue(bias=True, activation="gelu"))).seconds == plain
    read = 4096 * 3072 * 4 / p.arch.bandwidth
    more = make_plan(with_epilogue(p)).seconds - plain
    assert 0 < more <= 1.1 * read, "part of it is hidden, as the stores' time is"
    split = problem(256, 524288, 256)
    assert make_plan(with_epilogue(split)).seconds > make_plan(split).seconds


def test_the_epilogue_is_explained() -> None:
    def said_of_the_bias(p: Problem) -> list[str]:
        return [said for said in reasons(p, make_plan(p).choice) if "bias" in said]

    by_gemm = "bias, gelu, residual: applied by the kernel that multiplies"
    assert said_of_the_bias(with_epilogue(problem(4096, 768, 3072))) == [by_gemm]
    by_reduce = "bias, gelu, residual: applied by the sum over the splits"
    assert said_of_the_bias(with_epilogue(problem(256, 524288, 256))) == [by_reduce]


def test_pure() -> None:
    """The same problem has the same plan, whoever made it, and a plan cannot be changed."""
    first = make_plan(problem(*SEED))
    make_plan.cache_clear()
    assert make_plan(problem(*SEED)) == first
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.strategy = "direct"


PURE = (
    "arch",
    "problem",
    "chains",
    "choices",
    "epilogue",
    "estimate",
    "kept",
    "launches",
    "multiplying",
    "multiplying_hopper",
    "partition",
    "packing",
    "plan",
    "search",
    "shared_memory",
    "tile_order",
    "tiles",
)


@pytest.mark.parametrize("module", PURE)
def test_planning_needs_neither_torch_nor_triton(module) -> None:
    imported = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    standard = {"collections.abc", "dataclasses", "functools", "itertools", "math", "typing"}
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
def test_full_precision_is_never_one_16_bit_number(arch) -> None:
    for choice in choices(problem(*SEED, precision="ieee", arch=arch)):
        assert choice.pack_a is choice.pack_b is False
    p = problem(*SEED, precision="fp32", arch=arch)
    gemm = [step for step in make_plan(p).launches if step.kernel.startswith("gemm")]
    assert [step.constexprs["PARTS"] for step in gemm] == [2]
    assert {(c.pack_a, c.pack_b) for c in choices(p)} == {(False, False), (True, True)}


@pytest.mark.parametrize("arch", ARCHES)
def test_short_sums_of_full_precision_are_ieee(arch) -> None:
    """hi and lo hold 22 bits of 24, which only the rounding of longer sums hides."""
    assert all(not c.pack_a for c in choices(problem(4096, 15, 4096, precision="fp32", arch=arch)))
    assert any(c.pack_a for c in choices(problem(4096, 16, 4096, precision="fp32", arch=arch)))


@pytest.mark.parametrize("arch", ARCHES)
def test_few_tiles_and_a_long_k_are_split(arch) -> None:
    cut = ("+split", "+slabs")
    assert make_plan(problem(256, 524288, 256, arch=arch)).strategy.endswith(cut)
    assert not make_plan(problem(8192, 512, 8192, arch=arch)).strategy.endswith(cut)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("m", "k", "n", "lengths"),
    [
        (4096, 33000, 8192, {1024, 8192}),
        (8192, 1025, 4096, {1024}),
        (64, 524289, 48, {1024}),  # few tiles: short chains, but no more than 512 if K is very long
        (64, 33000, 48, {512}),
    ],
)
def test_slabs_cover_a_long_k(m, k, n, lengths, arch) -> None:
    """Each but the last is as long as the others, and packed in one read."""
    p = problem(m, k, n, arch=arch)
    found = [c for c in choices(p) if c.slabs > 1]
    assert {c.slabs for c in found} == {-(-k // longest) for longest in lengths}
    for choice in found:
        product, inner = slabs_as_batch(p, choice)
        assert (product.batch, inner.slabs) == (choice.slabs, 1)
        assert product.K % 64 == 0
        assert (product.batch - 1) * product.K < k <= product.batch * product.K
        plan = write_plan(p, choice)
        assert plan.strategy == "packed+slabs" + "+tail" * (choice.tail_split > 1)
        assert plan.launches[-1].kernel == "reduce"
    # Of operands that need no second reading, or are no single product, there are none.
    assert not any(c.slabs > 1 for c in choices(problem(64, 1024, 48, arch=arch)))
    assert not any(c.slabs > 1 for c in choices(problem(m, k, n, batch=2, arch=arch)))
    assert not any(c.slabs > 1 for c in choices(problem(m, k, n, dtype="bf16", arch=arch)))


@pytest.mark.parametrize("arch", ARCHES)
def test_few_tiles_in_tf32_have_short_chains(arch) -> None:
    """Truncated sums of one sign lose more than cuBLAS's, which are as short there."""

    def longest(*args, packed=True, **kwargs) -> int:
        return max(
            -(-args[1] // (choice.split * choice.slabs))
            for choice in choices(problem(*args, arch=arch, **kwargs))
            if choice.pack_a is packed
        )

    assert longest(509, 4095, 511) <= 512
    assert longest(509, 4095, 511, layout="NT") <= 512
    assert longest(256, 524288, 256) <= 1024
    # What is read as it is goes no further than cuBLAS, which shares each tile among all SMs.
    assert longest(508, 1024, 512, packed=False) <= 512
    assert longest(509, 4095, 511, packed=False) <= 512
    assert longest(256, 524288, 256, packed=False) <= 524288 * 4 / ARCHES[arch].sms + 1
    # Neither many tiles, nor a short K, nor sums that are promoted.
    assert longest(2048, 4095, 2048) == 4095
    assert longest(509, 1024, 511) <= 512
    assert longest(509, 512, 511) == 512
    assert longest(509, 4095, 511, precision="fp32") == 4095


def packs(plan: Plan) -> bool:
    return any(step.kernel.startswith("pack") for step in plan.launches)


@pytest.mark.parametrize(
    ("p", "streams"),
    [
        (problem(8192, 64, 8192, arch="sm_90"), True),
        (problem(8192, 64, 8192, precision="fp32", arch="sm_90"), True),
        (problem(8192, 64, 8192, "NT", "bf16", arch="sm_90"), True),
        (problem(8192, 512, 8192, "NT", "bf16", arch="sm_90"), False),
        (problem(1024, 64, 1024, "NT", "bf16", arch="sm_90"), False),  # L2 holds C for its reader
        (problem(8192, 64, 8193, arch="sm_90"), False),  # not aligned
    ],
)
def test_what_mostly_stores_is_streamed(p, streams) -> None:
    plan = make_plan(p)
    product = plan.launches[-1]
    assert product.kernel in HOPPER_KERNELS
    assert product.constexprs["STREAMS"] == streams
    assert any("stored past L2" in reason for reason in reasons(p, plan.choice)) == streams
    by_tma = sum(isinstance(arg, Descriptor) and arg.pointer.buffer == "c" for arg in product.args)
    assert by_tma == (product.kernel == "gemm_hopper" and not streams)


@pytest.mark.parametrize("precision", ["tf32", "fp32"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("k", [32, 64, 128, 256, 1024])
@pytest.mark.parametrize("n", [8192, 8193])
def test_slices_make_a_tile(n, k, dtype, precision) -> None:
    """Of every tile, however short K is and whoever stores."""
    for epilogue in (Epilogue(), Epilogue(True, "gelu"), Epilogue(residual=True)):
        p = dataclasses.replace(
            problem(8192, k, n, "NT", dtype, precision, arch="sm_90"), epilogue=epilogue
        )
        found = [c for c in choices(p) if c.tile.kernel in HOPPER_KERNELS]
        assert found
        for choice in found:
            for step in write_plan(p, choice).launches:
                if step.kernel in HOPPER_KERNELS:
                    sizes = step.constexprs
                    slices, rest = divmod(sizes["BLOCK_N"], sizes["SLICE_N"])
                    assert slices >= 1
                    assert rest == 0
                    assert slices % (sizes.get("C_BUFFERS") or 1) == 0, "buffers take turns"


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
    assert arch_for(Card((7, 5), 40)) is None
    expected = {(8, 0): "sm_80", (8, 6): "sm_89", (8, 9): "sm_89", (9, 0): "sm_90"}
    expected |= {(10, 0): "sm_89", (12, 0): "sm_89"}
    for capability, name in expected.items():
        arch = arch_for(Card(capability, 77))
        assert (arch.name, arch.sms) == (name, 77), capability


def test_rates_of_another_card() -> None:
    """Arithmetic by its SMs, bandwidth by its memory; a silent driver's memory is the usual one."""
    hopper, ada = ARCHES["sm_90"], ARCHES["sm_89"]
    assert arch_for(Card((9, 0), 132)) == hopper == arch_for(Card((9, 0), 132, hopper.memory_peak))
    h100 = arch_for(Card((9, 0), 132, 2 * 2.619e9 * 5120 / 8))
    assert h100 == resized(hopper, bandwidth=h100.bandwidth)
    assert h100.bandwidth == pytest.approx(hopper.bandwidth * 3.352 / 4.917, abs=0.5e9)
    half = arch_for(Card((8, 9), 64, ada.memory_peak))
    rates = ("fp16_flops", "tf32_flops", "fp32_flops")
    assert all(getattr(half, rate) == getattr(ada, rate) / 2 for rate in rates)
    assert half == resized(ada, 64)


def test_slower_memory_changes_plans() -> None:
    """Of the suite's, of an H100 beside an H200: some, and each is the best by the card's rates."""
    h100 = arch_for(Card((9, 0), 132, 3.352e12))
    problems = [case.problem(ARCHES["sm_90"]) for case in load_cases()]
    changed = 0
    for p in problems:
        here = dataclasses.replace(p, arch=h100)
        theirs, ours = make_plan(p).choice, make_plan(here).choice
        assert estimate(here, ours) <= estimate(here, theirs)
        changed += ours != theirs
    assert 0 < changed < len(problems) / 2


@pytest.mark.parametrize(
    ("memory", "peak"),
    [
        ({"memory_clock_rate": 2619000, "memory_bus_width": 5120}, 3.352e12),  # kHz, bits
        ({"memory_clock_rate": 0, "memory_bus_width": 0}, None),
        ({}, None),
    ],
)
def test_what_the_driver_says_of_a_card(memory, peak, monkeypatch) -> None:
    properties = SimpleNamespace(multi_processor_count=114, **memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    card = card_of(0)
    assert (card.capability, card.sms) == ((9, 0), 114)
    assert card.memory_peak == (peak and pytest.approx(peak, rel=1e-3))


def test_plans_of_another_card(monkeypatch) -> None:
    """FASTMM_ARCH: what a card is planned as, if it can run that."""
    monkeypatch.setenv("FASTMM_ARCH", "sm_89")
    for capability in ((8, 0), (8, 9), (9, 0), (12, 0)):
        arch = planned_arch(Card(capability, 77))
        assert (arch.name, arch.sms) == ("sm_89", 77), capability
    assert planned_arch(Card((7, 5), 40)) is None
    monkeypatch.setenv("FASTMM_ARCH", "sm_80")
    assert planned_arch(Card((9, 0), 132)).name == "sm_80"
    for name, capability in (("sm_80", (8, 9)), ("sm_90", (8, 9)), ("sm_90", (8, 0))):
        monkeypatch.setenv("FASTMM_ARCH", name)
        with pytest.raises(ValueError, match=f"FASTMM_ARCH={name}: a card of .* cannot run"):
            planned_arch(Card(capability, 77))
    monkeypatch.setenv("FASTMM_ARCH", "ada")
    with pytest.raises(ValueError, match="must be one of sm_80, sm_89, sm_90, got 'ada'"):
        planned_arch(Card((8, 9), 77))
    monkeypatch.setenv("FASTMM_ARCH", "")
    h100 = Card((9, 0), 132, 3.352e12)
    assert planned_arch(h100) == arch_for(h100)
    monkeypatch.setenv("FASTMM_ARCH", "sm_90")
    assert planned_arch(h100) == arch_for(h100), "its own is its own, memory and all"


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
seed, fp32: packed: balance pack_rows pack_strips gemm
seed, bf16: packed: copy_tiles copy_tiles gemm
seed, fp32 in full: packed: balance pack_rows pack_strips gemm
64^3: direct: gemm
4096^3, fp16: direct: gemm
256x524288x256: direct+split: gemm reduce""",
    )
