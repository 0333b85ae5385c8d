"""Kernels of one call that start before those ahead of them have ended (kernels/chain.py)."""

import re
import tempfile
from dataclasses import replace

import pytest
import torch

from cases import DTYPES
from fastmm_op.arch import ARCHES
from fastmm_op.kept import keep
from fastmm_op.plan import make_plan
from fastmm_op.problem import Problem, problem_of

HOPPER = ARCHES["sm_90"]
# What is packed, split or summed: M, K, N, dtype, precision, and the kernels of its plan.
PLANS = {
    "scaled by rows": ((2048, 768, 2048), "fp32", "tf32"),
    "scaled by columns": ((2048, 2048, 2048), "fp32", "fp32"),
    "row classes": ((4096, 2949, 2961), "fp32", "tf32"),
    "copied, row classes": ((4096, 2949, 2961), "bf16", "tf32"),
    "split": ((32, 4096, 11008), "bf16", "tf32"),
    "one row, split": ((1, 4096, 11008), "fp32", "fp32"),
    "classes of B": ((17, 4097, 11009), "fp32", "tf32"),
    "shared tail": ((4096, 4096, 2049), "bf16", "tf32"),
}


def problem(name: str, arch=HOPPER, batch: int = 1) -> Problem:
    sizes, dtype, precision = PLANS[name]
    how = {"batch": batch, "dtype": dtype, "layout": "NN", "precision": precision, "arch": arch}
    return problem_of(*sizes, **how)


def apart(p: Problem) -> Problem:
    """The problem on a card that finishes one kernel before it begins another."""
    return replace(p, arch=replace(p.arch, dependent_launch=False))


# Plans.


@pytest.mark.parametrize("name", PLANS)
def test_all_but_the_first_depend(name) -> None:
    first, *others = make_plan(problem(name)).launches
    assert others
    assert not first.dependent
    for step in (first, *others):
        assert step.constexprs["CHAINED"]
    for step in others:
        by_tma = step.constexprs.get("C_BUFFERS", 1) > 0
        assert step.dependent == by_tma, step.kernel


def test_the_kernels_of_all_kinds_are_among_them() -> None:
    found = {step.kernel for name in PLANS for step in make_plan(problem(name)).launches}
    packing = {"balance", "pack_rows", "row_max", "pack_tiles"}
    assert found == packing | {"gemm", "gemm_hopper", "gemv", "reduce", "reduce_tail"}
    stored_without_tma = [
        step
        for name in PLANS
        for step in make_plan(problem(name)).launches
        if step.constexprs.get("C_BUFFERS") == 0
    ]
    assert stored_without_tma


def test_one_kernel_depends_on_nothing() -> None:
    p = problem_of(512, 512, 512, batch=1, dtype="bf16", layout="NN", precision="tf32", arch=HOPPER)
    (step,) = make_plan(p).launches
    assert not step.dependent
    assert not step.constexprs["CHAINED"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_89"])
@pytest.mark.parametrize("name", PLANS)
def test_other_cards_know_no_dependent_launch(name, arch) -> None:
    for step in make_plan(problem(name, ARCHES[arch])).launches:
        assert not step.dependent
        assert not step.constexprs["CHAINED"]


def test_a_kept_weight_is_packed_in_a_chain_of_its_own() -> None:
    kept = keep(replace(problem("scaled by columns"), prepacked=True))
    assert [step.kernel for step in kept.launches] == ["forget", "row_max", "pack_tiles"]
    assert [step.dependent for step in kept.launches] == [False, True, True]


# Code.


def accesses(kernel) -> list[str]:
    """Machine instructions that touch global memory, or wait for the kernel ahead, in order."""
    from fastmm_op.codegen import run_tool

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code = run_tool("nvdisasm", "-c", file.name)
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", code)
    wanted = ("LDG", "LDGSTS", "STG", "RED", "ATOM", "UTMA", "ACQBULK", "PREEXIT")
    return [name for name in names if name.split(".")[0].startswith(wanted)]


@pytest.mark.compiled
@pytest.mark.parametrize("name", PLANS)
def test_nothing_is_written_before_the_wait(name) -> None:
    from fastmm_op.codegen import compile_launch

    p = problem(name)
    for step in make_plan(p).launches:
        found = accesses(compile_launch(p, step))
        assert found.count("ACQBULK") == found.count("PREEXIT") == 1, step.kernel
        if step.kernel == "gemm_hopper":
            continue  # its warps' parts stand in any order; none begins before the wait
        ahead = found[: found.index("ACQBULK")]
        assert not [name for name in ahead if name.startswith(("STG", "RED", "ATOM", "UTMA"))]
        reads_the_callers = step.kernel in ("pack_rows", "pack_tiles", "row_max")
        assert any(name.startswith("LDG") for name in ahead) == reads_the_callers, step.kernel


@pytest.mark.compiled
def test_no_wait_where_nothing_is_ahead() -> None:
    from fastmm_op.codegen import compile_launch

    p = apart(problem("split"))
    for step in make_plan(p).launches:
        assert not {"ACQBULK", "PREEXIT"} & set(accesses(compile_launch(p, step)))


# On a card.


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLANS)
def test_the_same_bits_as_apart_and_back_to_back(name) -> None:
    """Calls with two sets of operands take turns in one workspace: who waits too little mixes."""
    from fastmm_op import launch

    arch = launch.device_arch(torch.cuda.current_device())
    if not arch.dependent_launch:
        pytest.skip("needs a card with dependent launches")
    (m, k, n), dtype, _ = PLANS[name]
    p = problem(name, arch)
    plan = make_plan(p)
    sets = [
        [torch.randn(1, *size, device="cuda", dtype=DTYPES[dtype]) for size in ((m, k), (k, n))]
        for _ in range(2)
    ]
    want = [torch.full((1, m, n), torch.nan, device="cuda", dtype=DTYPES[dtype]) for _ in sets]
    for (a, b), out in zip(sets, want, strict=True):
        launch.run_plan(make_plan(apart(p)), a, b, out)
    assert not torch.equal(*want)
    started = launch.run_plan(plan, *sets[0], torch.empty_like(want[0]))
    workspace = torch.full((plan.workspace_bytes,), 255, dtype=torch.uint8, device="cuda")
    outs = [[torch.full_like(x, torch.nan) for x in want] for _ in range(10)]
    stream = torch.cuda.current_stream().cuda_stream
    for pair in outs:
        for (a, b), out in zip(sets, pair, strict=True):
            addresses = {"a": a.data_ptr(), "b": b.data_ptr(), "c": out.data_ptr()}
            addresses["workspace"] = workspace.data_ptr()
            for kernel in started:
                kernel.fastest(addresses, stream)
    for pair in outs:
        for got, right in zip(pair, want, strict=True):
            assert torch.equal(got, right)
