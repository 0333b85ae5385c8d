"""What an exported file launches, for any operands: the planner's launches, or a refusal."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("rich", reason="the command line's tables need rich")
pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cases import DTYPES
from exports import ALL, Case, every_case, load
from fastmm_op import kernel_source
from fastmm_op.arch import ARCHES
from fastmm_op.launches import Launch, Plan, Pointer
from fastmm_op.packing import PACKING_KERNELS
from fastmm_op.problem import round_up

pytestmark = pytest.mark.interpreted


@dataclass
class Recorder:
    """Stands for a kernel: notes what it is launched with."""

    name: str
    seen: list[tuple[str, int, dict]] = field(default_factory=list)

    def __getitem__(self, grid):
        def launch(**arguments):
            self.seen.append((self.name, grid, arguments))

        return launch


@cache
def recording(case: Case, folder: Path) -> tuple[ModuleType, list]:
    """The case's file with kernels that only note their launches, and the notes."""
    module = load(case.text, folder)
    seen: list = []
    for step in case.plan.launches:
        setattr(module, f"{step.kernel}_kernel", Recorder(step.kernel, seen))
    return module, seen


# What may be another constant than the planner would write for a problem: a case that is left out
# for speed only, and the blocks of kernels that take any size.
ALWAYS_RIGHT = {"EVEN_K": False, "WIDE": True, "A_ALIGN": 1, "B_ALIGN": 1, "TAIL_RUN": 1}
ANY_BLOCK = ("pack_strips", "copy_tiles", "reduce", "gemv")


def is_right(step: Launch, name: str, needed: object) -> bool:
    """Whether a launch's constant serves where the planner would write ``needed``."""
    value = step.constexprs[name]
    # Of a K of one, say: nothing is rounded, which is right where TF32 would do.
    if name in ("ROUND", "DOT") and step.constexprs.get("DOT") == "ieee":
        return True
    if name == "GROUP_M":  # an order of tiles, and any is right
        return True
    if value == needed or ALWAYS_RIGHT.get(name, needed) == value != needed:
        return True
    if name.startswith("BLOCK_"):
        whole_rows = step.kernel == "pack_rows" and (name == "BLOCK_R" or value > needed)
        return step.kernel in ANY_BLOCK or whole_rows
    return False


def serves(exported: Plan, needed: Plan) -> bool:
    """Whether a plan's constants are right where the planner would write another plan."""
    mine, theirs = by_operand(exported), by_operand(needed)
    assert mine.keys() == theirs.keys()
    for key, steps in mine.items():
        if kernels_of(steps) != kernels_of(theirs[key]):
            # What could be packed in one read may be read twice, not the other way round.
            if kernels_of(theirs[key]) != ["pack_rows"]:
                return False
            if not is_right(steps[-1], "WIDE", theirs[key][0].constexprs["WIDE"]):
                return False
            continue
        for step, other in zip(steps, theirs[key], strict=True):
            if not all(is_right(step, name, x) for name, x in other.constexprs.items()):
                return False
    return True


def by_operand(plan: Plan) -> dict[str, list[Launch]]:
    """The launches that prepare each operand, and those of the product."""
    groups: dict[str, list[Launch]] = {}
    for step in plan.launches:
        packs = step.kernel in PACKING_KERNELS
        groups.setdefault(step.args[0].buffer if packs else "product", []).append(step)
    return groups


def kernels_of(steps: Iterable[Launch]) -> list[str]:
    return [step.kernel for step in steps]


def check_launches(seen: list, plan: Plan, exported: Plan, buffers: dict) -> None:
    """The launches seen are the plan's, but for constants, which are those of the exported plan."""
    scratch: dict[int, torch.Tensor] = {}
    assert [name for name, _, _ in seen] == kernels_of(plan.launches)
    for (name, grid, got), step, mine in zip(seen, plan.launches, exported.launches, strict=True):
        parameters = [p.arg for p in kernel_source.find_kernel(name).parameters]
        want = dict(zip(parameters, step.args, strict=False))
        assert set(got) == {*want, *step.constexprs, "num_warps", "num_stages"}
        assert (got["num_warps"], got["num_stages"]) == (mine.num_warps, mine.num_stages)
        assert {x: got[x] for x in step.constexprs} == mine.constexprs
        for parameter, value in want.items():
            if not isinstance(value, Pointer):
                assert got[parameter] == value, f"{name}: {parameter}"
            elif value.buffer == "workspace":
                tensor = scratch.setdefault(value.offset, got[parameter])
                assert got[parameter] is tensor, f"{name}: {parameter}"
                assert tensor.numel() >= value.elements
                assert {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32",
                        torch.int32: "int32"}[tensor.dtype] == value.dtype  # fmt: skip
            elif value.buffer == "c":
                assert got[parameter].shape == buffers["c"]
            else:
                assert got[parameter] is buffers[value.buffer]
        if mine.constexprs == step.constexprs:
            assert grid == (step.grid,), name


SIZE = st.one_of(
    st.integers(2, 300),
    st.integers(2, 20000),
    st.sampled_from([512, 1024, 1025, 2048, 4096, 4097, 8192, 8193, 2**20, 2**24, 2**26 + 8]),
)


def reads_aligned(case: Case) -> bool:
    """Whether the product copies 16 bytes at once from one of the caller's operands."""
    gemm = [step for step in case.plan.launches if step.kernel == "gemm"]
    return any(
        arg.buffer == name and step.constexprs[f"{name.upper()}_ALIGN"] > 1
        for step in gemm
        for name, arg in zip("ab", step.args, strict=False)
    )


ALIGNED = [case for case in ALL.values() if reads_aligned(case)]


def matrix(rows: int, columns: int, order: str, dtype: torch.dtype, how: dict) -> torch.Tensor:
    """A matrix with no memory, row-major (N) or column-major (T), so it may be of any size."""
    step, more, offset = how.get("step", 1), how.get("more", 0), how.get("offset", 0)
    inner = step * (columns if order == "N" else rows) + more
    inner = round_up(inner, how.get("pitch", 1))
    strides = (inner, step) if order == "N" else (step, inner)
    length = offset + (rows - 1) * strides[0] + (columns - 1) * strides[1] + 1
    memory = torch.empty(length, dtype=dtype, device="meta")
    return memory.as_strided((rows, columns), strides, offset)


@st.composite
def products(draw) -> tuple[Case, torch.Tensor, torch.Tensor]:
    """A file and operands that differ in one or two ways from those it was made for."""
    case = draw(st.sampled_from([*ALL.values(), *5 * ALIGNED]))
    multiples = draw(st.permutations([128, 128, draw(st.sampled_from([1, 2, 4, 8, 32, 128]))]))
    m, k, n = (round_up(draw(SIZE), multiple) for multiple in multiples)
    if case.problem.one_wide and draw(st.integers(0, 9)):
        m, n = (1 if own == 1 else size for own, size in zip(case.shape[::2], (m, n), strict=True))
    assume(max(m * n, m * k, k * n) < 2**50)
    ways = [{}, {}, {"pitch": 32}, {"step": 2}, {"step": 8}]
    ways += [{"more": elements} for elements in (1, 2, 8, 2**25, 2**28)]
    ways += [{"offset": elements} for elements in (1, 2, 8)]
    how_a, how_b = draw(st.permutations([{}, draw(st.sampled_from(ways))]))
    layout = draw(st.sampled_from([*4 * [case.layout], "NN", "NT", "TN", "TT"]))
    dtype = DTYPES[case.dtype]
    return case, matrix(m, k, layout[0], dtype, how_a), matrix(k, n, layout[1], dtype, how_b)


@settings(
    max_examples=800,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(product=products())
def test_any_operands_are_refused_or_launched_as_planned(product, tmp_path_factory) -> None:
    from fastmm_op import launch

    case, a, b = product
    problem = launch.describe(a[None], b[None], case.precision, ARCHES[case.arch])
    needed = case.plan_for(problem)
    module, seen = recording(case, tmp_path_factory.getbasetemp())
    seen.clear()
    same_order = all(
        getattr(problem, x).k_major == getattr(case.problem, x).k_major for x in ("a", "b")
    )
    one_wide = [case.shape[i] == 1 for i in (0, 2)] == [problem.M == 1, problem.N == 1]
    right_kernel = one_wide or case.plan.launches[0].kernel != "gemv"
    if not (right_kernel and same_order and serves(case.plan, needed)):
        with pytest.raises(ValueError, match="export a file for such operands"):
            module.matmul(a, b)
        assert not seen
        return
    c = module.matmul(a, b)
    if kernels_of(needed.launches) == kernels_of(case.plan.launches):
        check_launches(seen, needed, case.plan, {"a": a, "b": b, "c": c.shape})


@every_case
def test_the_plans_launches_at_its_own_shape(case, tmp_path) -> None:
    dtype, (m, k, n) = DTYPES[case.dtype], case.shape
    a = torch.empty(m, k, dtype=dtype, device="meta")
    b = torch.empty(k, n, dtype=dtype, device="meta")
    a, b = (x.mT.contiguous().mT if y == "T" else x for x, y in zip((a, b), case.layout))  # noqa: B905
    module, seen = recording(case, tmp_path)
    c = module.ModelNew()(a, b)
    check_launches(seen, case.plan, case.plan, {"a": a, "b": b, "c": c.shape})
