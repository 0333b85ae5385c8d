"""What the compiler makes of the kernels, for every card and with none.

No spills, the tensor core's instructions, 16-byte copies. Register and instruction counts change
with Triton; these must not.
"""

from dataclasses import replace
from functools import cache

import pytest

from fastmm_op.arch import ARCHES
from fastmm_op.bench.cases import load_cases
from fastmm_op.choices import choices
from fastmm_op.cli import codegen as command
from fastmm_op.estimate import estimate
from fastmm_op.launches import Launch
from fastmm_op.partition import a_classes
from fastmm_op.plan import make_plan, write_plan
from fastmm_op.problem import ACTIVATIONS, Epilogue, Operand, Problem, problem_of
from fastmm_op.tiles import TALL_TILE, operand_kind

pytestmark = pytest.mark.compiled

SEED = (8205, 2949, 5921)


def problem(arch: str, m: int, k: int, n: int, dtype="fp32", precision="tf32") -> Problem:
    """Contiguous operands."""
    a, b = Operand(0, k, 1), Operand(0, 1, n)
    return Problem(1, m, n, k, dtype, precision, a, b, ARCHES[arch])


@cache
def compiled(p: Problem, step: Launch):
    """(resources, PTX) of a launch; whatever it is, it fits its card and spills nothing.

    Where the plan limits registers, which it does for speed, a few may be spilled.
    """
    from fastmm_op.codegen import compile_launch, resources

    kernel = compile_launch(p, step)
    found = resources(kernel)
    assert found.spills <= (16 if step.max_registers else 0)
    assert found.registers <= (step.max_registers or 255)
    assert found.shared_memory <= p.arch.shared_memory
    if step.shared_memory:
        assert found.shared_memory <= step.shared_memory, "more than the plan's own sum"
    return found, kernel.asm["ptx"]


def best(p: Problem, pack: bool, split: bool = False, kernel: str = "gemm") -> dict[str, Launch]:
    """The launches, by kernel, of the planner's favourite of one road and GEMM."""
    road = [
        c
        for c in choices(p)
        if c.pack_a == c.pack_b == pack and (c.split > 1) == split and c.tile.kernel == kernel
    ]
    plan = write_plan(p, min(road, key=lambda c: estimate(p, c)))
    return {step.kernel: step for step in plan.launches}


def tensor_core(arch: str, step: Launch) -> str:
    """wgmma takes 64 rows or more; smaller tiles use mma.sync on Hopper too."""
    wgmma = arch == "sm_90" and step.constexprs["BLOCK_M"] >= 64 and step.num_warps >= 4
    return "HGMMA" if wgmma else "HMMA"


def copies(found) -> dict[str, int]:
    return {name: n for name, n in found.opcodes.items() if name.startswith("LDGSTS")}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_packed_main_loop(dtype, arch) -> None:
    """The seed workload: tensor cores fed by 16-byte copies only, no mask in the way."""
    p = problem(arch, *SEED, dtype=dtype)
    step = best(p, pack=True)["gemm"]
    found, _ = compiled(p, step)
    assert found.count(tensor_core(arch, step)) > 0
    assert copies(found)
    assert all(name.endswith(".128") for name in copies(found)), copies(found)


@pytest.mark.parametrize("n", [5921, 5920], ids=["odd rows of C", "aligned rows of C"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_hopper_main_loop(dtype, n) -> None:
    """The same on the copy engine: TMA and wgmma, and nothing else that loads operands."""
    p = problem("sm_90", *SEED[:2], n, dtype=dtype)
    found, _ = compiled(p, best(p, pack=True, kernel="gemm_hopper")["gemm_hopper"])
    assert found.count("HGMMA") > 0
    assert found.count("UTMALDG") > 0
    assert not copies(found)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("dtype", "precision"), [("fp32", "tf32"), ("fp32", "ieee"), ("fp16", "tf32")]
)
def test_direct_aligned(dtype, precision, arch) -> None:
    p = problem(arch, 1024, 1024, 1024, dtype, precision)
    step = best(p, pack=False)["gemm"]
    found, ptx = compiled(p, step)
    if precision == "ieee":
        assert found.count("HMMA") == found.count("HGMMA") == 0
        assert found.count("FFMA") > 0
    else:
        assert found.count(tensor_core(arch, step)) > 0
    # The tensor core itself would truncate.
    assert ("fma.rz.f32" in ptx) == (dtype == "fp32" and precision == "tf32")
    assert copies(found)
    assert all(name.endswith(".128") for name in copies(found)), copies(found)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("layout", ["NN", "NT"])
def test_strides_of_16_bytes_only(layout, dtype) -> None:
    """Aligned, but by less than the 16 elements that Triton's launcher looks for."""
    size = 1024 + (4 if dtype == "fp32" else 8)
    k, n = (1024, size) if layout == "NN" else (size, 1024)
    p = problem_of(
        2048, k, n, batch=1, dtype=dtype, layout=layout, precision="tf32", arch=ARCHES["sm_89"]
    )
    found, _ = compiled(p, best(p, pack=False)["gemm"])
    assert set(command.copies_by_width(found.main_loop)) == {16}
    assert command.count_scalar_loads(found.main_loop) == 0


@pytest.mark.parametrize("layout", ["NN", "NT"])
def test_a_k_tail_of_whole_copies_costs_no_registers(layout) -> None:
    """Masked element by element, the tail of this tile spilled (56 and 231 words)."""
    sizes = {"batch": 1, "dtype": "fp16", "layout": layout, "precision": "tf32"}
    registers = []
    for k in (1024, 1032):
        p = problem_of(2048, k, 2048, **sizes, arch=ARCHES["sm_89"])
        whole = [c for c in choices(p) if c.split == 1]
        (choice,) = [c for c in whole if (c.tile.block_m, c.tile.block_n) == (128, 128)]
        found, ptx = compiled(p, write_plan(p, choice).launches[0])
        assert "ld.global.b16" not in ptx
        registers.append(found.registers)
    assert registers[1] <= registers[0] + 16


@pytest.mark.parametrize("arch", ARCHES)
def test_direct_misaligned_with_a_k_tail(arch) -> None:
    p = problem(arch, 100, 333, 77)
    step = best(p, pack=False)["gemm"]
    found, ptx = compiled(p, step)
    assert found.count(tensor_core(arch, step)) > 0
    assert "fma.rz.f32" in ptx


@pytest.mark.parametrize("epilogue", [Epilogue(), Epilogue(True, "gelu", True)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "precision"), [("fp32", "tf32"), ("fp32", "fp32"), ("bf16", "tf32")]
)
def test_hopper_tiles_shared_by_programs(dtype, precision, epilogue) -> None:
    """Two ways to store in one kernel, and the sum: of every tile width, C's rows in classes."""
    p = replace(problem("sm_90", 4096, 4096, 2113, dtype, precision), epilogue=epilogue)
    shared = [c for c in choices(p) if c.tail_split == 2 and c.pack_b and not c.edge_n]
    shared = {c.tile.block_n: c for c in shared}
    assert len(shared) == (2 if precision == "fp32" else 3)
    for choice in shared.values():
        gemm, total = write_plan(p, choice).launches[-2:]
        assert (gemm.kernel, total.kernel) == ("gemm_hopper", "reduce_tail")
        found, _ = compiled(p, gemm)
        assert found.count("HGMMA") > 0
        assert gemm.constexprs["CLASSES"] > 1
        compiled(p, total)


@pytest.mark.parametrize("n", [2049, 2056])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_hopper_edges(dtype, n) -> None:
    """Beside the widest tiles, shared, and others, with rows of C in classes and aligned."""
    p = problem("sm_90", 4096, 4096, n, dtype)
    edges = [c for c in choices(p) if c.edge_n and c.pack_b and c.pack_a == (dtype == "fp32")]
    edges = {(c.tile.block_n, c.tail_split > 1): c for c in edges}
    assert set(edges) == {(width, shared) for width in (256, 128, 64) for shared in (False, True)}
    for way in ((256, True), (128, False)):
        choice = edges[way]
        gemm = next(s for s in write_plan(p, choice).launches if s.kernel == "gemm_hopper")
        assert (gemm.constexprs["CLASSES"] > 1) == (n == 2049)
        found, _ = compiled(p, gemm)
        assert found.count("HGMMA.64x32x16") == 2 * 4, "of each consumer, from registers"
        assert found.count("LDSM") >= 2 * 4


@pytest.mark.parametrize("epilogue", [Epilogue(), Epilogue(True, "gelu")], ids=str)
@pytest.mark.parametrize(("dtype", "layout"), [("fp32", "NN"), ("bf16", "NN"), ("bf16", "TT")])
def test_hopper_tall_tiles(dtype, epilogue, layout) -> None:
    """Of each consumer two wgmma a step of K, for they have 64 rows; C by TMA; tiles are shared."""
    how = {"dtype": dtype, "precision": "tf32", "layout": layout, "arch": ARCHES["sm_90"]}
    p = replace(problem_of(4096, 4096, 2056, batch=1, **how), epilogue=epilogue)
    tall = [c for c in choices(p) if c.tile == TALL_TILE and not c.edge_n]
    tall = {c.tail_split > 1: c for c in tall if c.pack_a == c.pack_b == (dtype == "fp32")}
    assert set(tall) == {False, True}
    gemm = next(s for s in write_plan(p, tall[True]).launches if s.kernel == "gemm_hopper")
    found, _ = compiled(p, gemm)
    assert found.count("HGMMA.64x128x16") == 2 * 2 * 4
    assert found.count("UTMASTG") > 0


@pytest.mark.parametrize("epilogue", [Epilogue(), Epilogue(residual=True)], ids=str)
@pytest.mark.parametrize("n", [2049, 2056])
def test_where_tall_tiles_have_no_registers(n, epilogue) -> None:
    """Neither rows of C that TMA cannot store, nor residuals, nor more columns, nor splits."""
    for dtype in ("fp32", "bf16"):
        p = replace(problem("sm_90", 4096, 4096, n, dtype), epilogue=epilogue)
        tall = [c for c in choices(p) if c.tile == TALL_TILE]
        assert bool(tall) == (n == 2056 and not epilogue.residual)
        assert all(c.split == 1 and not c.edge_n for c in tall)


@pytest.mark.parametrize(
    ("m", "epilogue"),
    [(8192, Epilogue()), (8197, Epilogue(True, "gelu")), (8197, Epilogue(residual=True))],
    ids=str,
)
def test_hopper_reads_a_by_classes(m, epilogue) -> None:
    """As it is, misaligned: by every tile width, shared last tiles where they are legal."""
    p = replace(problem("sm_90", m, 50257, 768, "bf16"), epilogue=epilogue)
    ways = [c for c in choices(p) if a_classes(p, c) > 1 and c.split == 1 and c.tail_split <= 2]
    found = {c.tile.block_n: c for c in sorted(ways, key=lambda c: c.tail_split)}
    assert len(found) == 3
    for choice in found.values():
        assert choice.tail_split == (1 if epilogue.residual and choice.tile.block_n > 128 else 2)
        gemm, *others = write_plan(p, choice).launches
        code, ptx = compiled(p, gemm)
        assert code.count("HGMMA") == 2 * 4, "of each consumer, one loop"
        assert code.count("UTMALDG") > 0
        assert not copies(code)
        assert ptx.count("fence.proxy.async") == 2, "of each consumer, where it clears columns"
        for step in others:
            compiled(p, step)


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("pack_rows", "fp32"), ("pack_strips", "fp32"), ("copy_tiles", "bf16"), ("reduce", "fp32")],
)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_other_kernels(arch, kernel, dtype) -> None:
    """Of a plan with all kinds: A's rows are contiguous, B's columns are not, K is split."""
    p = problem(arch, 255, 4097, 257, dtype)
    compiled(p, best(p, pack=True, split=True)[kernel])


def suite_launches(arch: str, precision: str = "tf32") -> dict[str, tuple[Problem, Launch]]:
    """Every different kernel that the planner launches for the benchmark suite."""
    from fastmm_op.codegen import is_divisible

    found = {}
    for case in load_cases(precision=precision):
        p = case.problem(ARCHES[arch])
        for step in make_plan(p).launches:
            types = "fp16" if case.dtype == "bf16" else case.dtype
            specialised = [is_divisible(p, arg) for arg in step.args]
            key = (step.kernel, types, specialised, sorted(step.constexprs.items()), step.num_warps)
            found.setdefault(str(key), (p, step))
    return found


# Their shared memory is all the plan's own; of the others, Triton's: what threads exchange to add
# or transpose a block. That follows from how it lays threads out and has differed between versions
# (the kernels of a8d8f11c: 4096 bytes with 3.6, 512 with the later ones), so a bound is all that
# can be known.
PLANNED = {"gemm", "gemv"}
EXCHANGES = {"balance", "pack_rows", "pack_strips", "copy_tiles", "reduce"}


def block_bytes(step: Launch) -> int:
    """One block of a kernel that exchanges, as fp32."""
    sizes = step.constexprs
    if step.kernel == "reduce":
        return 4 * sizes["BLOCK_S"] * sizes["BLOCK_N"]
    rows = 32 if step.kernel == "balance" else sizes["BLOCK_R"]
    return 4 * rows * sizes["BLOCK_K"]


@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_the_suite_on_the_4090(precision) -> None:
    """The gate for the card that nobody here has: what it would run is right by the compiler.

    ``compiled`` itself demands no spills and the card's 101376 bytes.
    """
    launches = suite_launches("sm_89", precision)
    done = set(suite_launches("sm_89")) if precision != "tf32" else set()
    steps = {key: found for key, found in launches.items() if key not in done}
    assert {step.kernel for _, step in steps.values()} >= {"gemm", "pack_rows", "pack_strips"}
    for p, step in steps.values():
        found, _ = compiled(p, step)
        if step.kernel in PLANNED:
            assert found.shared_memory == step.shared_memory, f"the plan's own sum: {step}"
        else:
            assert step.kernel in EXCHANGES
            assert step.shared_memory == 0
            assert found.shared_memory <= block_bytes(step), step
        if step.kernel == "gemm":
            of_parts = step.constexprs["PARTS"] == 2
            assert (found.count("HMMA") > 0) == (step.constexprs["DOT"] != "ieee" or of_parts)
            if step.constexprs["EVEN_K"] and not step.constexprs["CLAMP"]:  # packed
                assert set(command.copies_by_width(found.main_loop)) == {16}
                assert command.count_scalar_loads(found.main_loop) == 0


@pytest.mark.parametrize("layout", ["NN", "NT", "TN", "TT"])
def test_tiles_of_two_warps_do_not_spill(layout) -> None:
    """In the main loop, of every layout that the planner gives them."""
    from fastmm_op.codegen import compile_launch, resources

    p = problem_of(
        512, 2048, 512, batch=1, dtype="fp32", layout=layout, precision="tf32", arch=ARCHES["sm_90"]
    )
    found = {c.tile: c for c in choices(p) if not c.pack_a and c.tile.num_warps == 2}
    assert len(found) == (4 if layout[0] == "N" else 2)
    for choice in found.values():
        (step,) = (s for s in write_plan(p, choice).launches if s.kernel == "gemm")
        loop = resources(compile_launch(p, step)).main_loop
        assert not any(name.startswith(("LDL", "STL")) for name in loop), choice


@pytest.mark.parametrize("arch", ["sm_89", "sm_90"])
def test_what_packing_reads_for_the_last_time_may_leave_l2(arch) -> None:
    """On Ada; of strips everywhere. What is read again may stay, and so may what was packed."""
    steps = best(problem(arch, *SEED), pack=True)
    rows, _ = compiled(problem(arch, *SEED), steps["pack_rows"])
    assert (rows.count("LDG.E.EF") > 0) == (arch == "sm_89")
    strips, _ = compiled(problem(arch, *SEED), steps["pack_strips"])
    assert strips.count("LDG.E.EF") == strips.count("LDG.E.EL") == 32, "a tile each, by 4 warps"
    for found in (rows, strips):
        assert found.count("STG.E.EF") == 0


def test_shared_memory_of_plain_kernels_on_hopper() -> None:
    """What the suite runs there beside the Hopper kernel: the plan's sums are exact too."""
    launches = [(p, s) for p, s in suite_launches("sm_90").values() if s.kernel in ("gemm", "gemv")]
    assert launches
    for p, step in launches:
        assert compiled(p, step)[0].shared_memory == step.shared_memory, step


@pytest.mark.parametrize("n", [1024, 1031], ids=["aligned rows of C", "odd rows of C"])
@pytest.mark.parametrize(("dtype", "split"), [("fp32", 1), ("fp16", 1), ("fp16", 2)])
def test_shared_memory_of_every_16_bit_tile(dtype, split, n) -> None:
    """C's tile outgrows the rings of some tiles, depending on its type and its rows' alignment."""
    from fastmm_op.codegen import compile_launch

    p = problem("sm_89", 1021, 1024, n, dtype=dtype)
    steps = [
        step
        for choice in choices(p)
        if operand_kind(p, choice.pack_a, choice.pack_b) == "16-bit" and choice.split == split
        for step in write_plan(p, choice).launches
        if step.kernel == "gemm"
    ]
    assert len(steps) >= 5
    for step in steps:
        assert compile_launch(p, step).metadata.shared == step.shared_memory, step


LINEARS = {
    "wide": (4096, 768, 3072),
    "odd": (1021, 1031, 1033),
    "odd rows, long K": (129, 8193, 131),
    "vocabulary": (8192, 768, 50257),
    "one row": (1, 4096, 11008),
}


def linear_launches(p: Problem, epilogue: Epilogue) -> list[Launch]:
    """What the planner launches for the problem as a linear, but for packing."""
    steps = make_plan(replace(p, epilogue=epilogue)).launches
    return [step for step in steps if "ACTIVATION" in step.constexprs]


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["sm_89", "sm_90"])
def test_linears_have_room_for_their_epilogue(arch, dtype, name) -> None:
    """No spills: ``compiled`` itself demands it."""
    how = {"batch": 1, "dtype": dtype, "layout": "NT", "precision": "tf32", "arch": ARCHES[arch]}
    p = problem_of(*LINEARS[name], **how)
    for step in linear_launches(p, Epilogue(True, "gelu", True)):
        found, _ = compiled(p, step)
        if step.kernel in ("gemm", "gemm_hopper"):
            assert found.count("HMMA") + found.count("HGMMA") > 0


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "gelu"])
@pytest.mark.parametrize("arch", ["sm_89", "sm_90"])
def test_every_activation_has_room(arch, activation) -> None:
    how = {"batch": 1, "dtype": "fp32", "layout": "NT", "precision": "tf32", "arch": ARCHES[arch]}
    p = problem_of(*LINEARS["wide"], **how)
    for step in linear_launches(p, Epilogue(True, activation, residual=activation != "relu")):
        compiled(p, step)


def test_the_main_loop_is_found() -> None:
    """The seed workload on the 4090: 64 matrix instructions a trip, little beside them."""
    p = problem("sm_89", *SEED)
    row = command.report(p, best(p, pack=True)["gemm"])
    assert row["mma"] == 64
    assert row["ldgsts_bytes"] == {16: 8}
    assert row["scalar_loads"] == 0
    assert row["loop_instructions_per_mma"] < 3
    assert row["blocks_per_sm"] >= 1
    hopper = problem("sm_90", *SEED)
    row = command.report(hopper, best(hopper, pack=True, kernel="gemm_hopper")["gemm_hopper"])
    assert row["mma"] == 4, "BLOCK_K of 64 in steps of 16"
    assert row["tma_loads"] > 0


@pytest.mark.parametrize("arch", ["sm_89", "sm_90"])
@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_a_prepacked_weight(precision, arch) -> None:
    """What packs it once, and the calls that read it: long K, so that maxima are prepared too."""
    from fastmm_op.kept import keep

    p = Problem(
        1, 2000, 1025, 9001, "fp32", precision, Operand(0, 9001, 1), Operand(0, 9001, 1),
        ARCHES[arch], Epilogue(bias=True), prepacked=True,
    )  # fmt: skip
    packed = [c for c in choices(p) if c.pack_b and c.split == c.tail_split == 1]
    plan = write_plan(p, min(packed, key=lambda c: estimate(p, c)))
    found = [step.kernel for step in plan.launches if not step.kernel.startswith("gemm")]
    assert found == ["forget", "pack_strips"]
    assert [step.kernel for step in keep(p).launches] == ["forget", "pack_strips"]
    for step in (*keep(p).launches, *plan.launches):
        compiled(p, step)
