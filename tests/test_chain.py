"""Kernels of one call that start before those ahead of them have ended (kernels/chain.py)."""

import re
import tempfile
from dataclasses import replace

import pytest
import torch

from cases import DTYPES
from fastmm_op.arch import ARCHES, Arch
from fastmm_op.choices import choices
from fastmm_op.estimate import estimate
from fastmm_op.export import exported_choice, exported_problem
from fastmm_op.kept import keep
from fastmm_op.packing import PACKING_KERNELS
from fastmm_op.plan import make_plan, write_plan
from fastmm_op.problem import Problem, problem_of

HOPPER = ARCHES["sm_90"]
# What is packed, split or summed: M, K, N, and the rest of a problem.
PLANS = {
    "scaled by rows": ((2048, 768, 2048), {}),
    "scaled by columns": ((2048, 2048, 2048), {"precision": "fp32"}),
    "scaled in slabs": ((257, 16384, 256), {"precision": "fp32", "layout": "TN"}),
    "as it lies": ((256, 16384, 256), {"precision": "fp32"}),
    "a batch": ((512, 1024, 1024), {"precision": "fp32", "batch": 8}),
    "row classes": ((4096, 2949, 2961), {}),
    "copied": ((4096, 2949, 2968), {"dtype": "bf16", "layout": "NT"}),
    "copied, row classes": ((4096, 2949, 2961), {"dtype": "bf16"}),
    "split": ((32, 11008, 2048), {"dtype": "bf16"}),
    "one row, split": ((1, 4096, 11008), {"precision": "fp32"}),
    "classes of B": ((17, 4097, 11009), {}),
    "shared tail": ((4096, 4096, 2301), {"dtype": "bf16"}),
    "shared tail, rest by TMA": ((4096, 4104, 2304), {"dtype": "bf16", "layout": "NT"}),
    "edge": ((4096, 2048, 4100), {}),
    "edge, row classes": ((4096, 4096, 2049), {"dtype": "bf16"}),
    "edge, shared tail": ((3000, 3000, 3100), {"dtype": "bf16"}),
}
# The kernels of some of them in order; a plus stands before those that may start before the one
# ahead has ended, a comma before those that are only made ready.
KERNELS = {
    "scaled by columns": "balance +pack_rows +pack_strips +gemm_hopper",
    "scaled in slabs": "balance +pack_rows +pack_rows +gemm_hopper +reduce",
    "as it lies": "gemm_tf32_hopper +reduce",
    "row classes": "balance +pack_rows +pack_strips ,gemm_hopper",
    "copied": "copy_tiles +copy_tiles +gemm_hopper",
    "copied, row classes": "copy_tiles +copy_tiles ,gemm_hopper",
    "split": "gemm +reduce",
    "classes of B": "copy_tiles +gemm +reduce",
    "shared tail": "copy_tiles ,gemm_hopper +reduce_tail",
    "shared tail, rest by TMA": "copy_tiles ,gemm_hopper +reduce_tail",
    "edge": "balance +pack_rows +pack_strips +gemm_hopper",
    "edge, row classes": "copy_tiles ,gemm_hopper",
    "edge, shared tail": "copy_tiles ,gemm_hopper +reduce_tail",
}


def problem(name: str, arch: Arch = HOPPER) -> Problem:
    sizes, rest = PLANS[name]
    how = {"batch": 1, "dtype": "fp32", "layout": "NN", "precision": "tf32"} | rest
    return problem_of(*sizes, **how, arch=arch)


def apart(p: Problem) -> Problem:
    """The problem on a card that finishes one kernel before it begins another."""
    return replace(p, arch=replace(p.arch, dependent_seconds=None))


# Plans.


@pytest.mark.parametrize("name", KERNELS)
def test_who_may_start_early(name) -> None:
    first, *others = launches = make_plan(problem(name)).launches
    lets_next = [step.constexprs["LETS_NEXT"] for step in launches[:-1]]
    marks = ["+" if let else "," for let in lets_next]
    found = [first.kernel, *(m + step.kernel for m, step in zip(marks, others, strict=True))]
    assert " ".join(found) == KERNELS[name]


@pytest.mark.parametrize("name", PLANS)
def test_all_but_the_first_are_dependent_and_wait(name) -> None:
    launches = make_plan(problem(name)).launches
    for place, step in enumerate(launches):
        assert step.dependent == (place > 0)
        assert step.constexprs["WAITS"] == step.dependent
    assert not launches[-1].constexprs["LETS_NEXT"]


def test_the_kernels_of_all_kinds_are_among_them() -> None:
    found = {step.kernel for name in PLANS for step in make_plan(problem(name)).launches}
    products = {"gemm", "gemm_hopper", "gemm_tf32_hopper", "gemv", "reduce", "reduce_tail"}
    assert found == {"balance", *PACKING_KERNELS} | products


@pytest.mark.parametrize("arch", ["sm_80", "sm_89"])
@pytest.mark.parametrize("name", PLANS)
def test_other_cards_know_no_dependent_launch(name, arch) -> None:
    for step in make_plan(problem(name, ARCHES[arch])).launches:
        assert not step.dependent
        assert not step.constexprs["WAITS"]
        assert not step.constexprs["LETS_NEXT"]


def test_a_kept_weight_is_packed_in_a_chain_of_its_own() -> None:
    kept = keep(replace(problem("scaled by columns"), prepacked=True))
    assert [step.kernel for step in kept.launches] == ["forget", "pack_strips"]
    assert [step.dependent for step in kept.launches] == [False, True]


def test_exported_files_are_chosen_by_what_ordinary_launches_cost() -> None:
    """Overlap makes packing, and its launches, cheap enough to choose; a file has none."""
    how = {"batch": 1, "dtype": "fp32", "layout": "NN", "precision": "tf32", "arch": HOPPER}
    p = problem_of(1024, 1024, 1024, **how)
    plain = exported_problem(p)
    assert not plain.arch.overlaps
    overlapping = replace(p, arch=replace(HOPPER, tma=False))
    whole = [c for c in choices(plain) if c.slabs == c.b_classes == 1]
    assert min(whole, key=lambda c: estimate(overlapping, c)).pack_b
    assert not exported_choice(p).pack_b


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
def test_nothing_of_the_call_is_touched_before_the_wait(name) -> None:
    """Before it packing loads the caller's operand, once, and no other kernel does anything."""
    from fastmm_op.codegen import compile_launch

    p = problem(name)
    for step in make_plan(p).launches:
        kernel = compile_launch(p, step)
        found = accesses(kernel)
        assert found.count("ACQBULK") == step.dependent, step.kernel
        assert found.count("PREEXIT") == step.constexprs["LETS_NEXT"], step.kernel
        if not step.dependent:
            continue
        if step.kernel == "gemm_hopper":
            if step.constexprs["LETS_NEXT"]:
                assert found.index("ACQBULK") < found.index("PREEXIT")
            # Its warps' parts stand in any order in the machine code; none starts before this.
            ptx = kernel.asm["ptx"]
            ahead = ptx[: ptx.index("griddepcontrol.wait")]
            assert not re.search(r"ld\.global|st\.global|cp\.async|barrier\.sync 1", ahead)
            continue
        ahead = found[: found.index("ACQBULK")]
        assert not [name for name in ahead if name.startswith(("STG", "RED", "ATOM", "UTMA"))]
        loads = kernel.asm["ttir"].split("griddepcontrol.wait")[0].count("tt.load")
        # Of strips: the one of programs that measure, or of those that pack.
        assert loads == {"pack_rows": 1, "copy_tiles": 1, "pack_strips": 2}.get(step.kernel, 0)


# On a card.


@pytest.fixture
def hopper() -> Arch:
    from fastmm_op import launch

    arch = launch.device_arch(torch.cuda.current_device())
    if not arch.overlaps:
        pytest.skip("needs a card with dependent launches")
    return arch


def operands(p: Problem) -> list[torch.Tensor]:
    """New random A and B, batch first, in the problem's layout."""
    found = []
    for rows, operand in ((p.M, p.a), (p.N, p.b)):
        x = torch.randn(p.batch, rows, p.K, device="cuda", dtype=DTYPES[p.dtype])
        found.append(x if operand.k_major else x.mT.contiguous().mT)
    return [found[0], found[1].mT]


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLANS)
def test_the_same_bits_as_apart_and_back_to_back(name, hopper) -> None:
    """Calls with two sets of operands take turns in one workspace: who waits too little mixes.

    Started directly, and then replayed from a CUDA graph.
    """
    from fastmm_op import running

    p = problem(name, hopper)
    plan = make_plan(p)
    sets = [operands(p) for _ in range(2)]
    like_c = torch.full((p.batch, p.M, p.N), torch.nan, device="cuda", dtype=DTYPES[p.dtype])
    want = [like_c.clone() for _ in sets]
    for (a, b), out in zip(sets, want, strict=True):
        running.run_plan(write_plan(apart(p), plan.choice), a, b, out)
    assert not torch.equal(*want)
    started = running.run_plan(plan, *sets[0], like_c.clone())
    workspace = torch.full((plan.workspace_bytes,), 255, dtype=torch.uint8, device="cuda")
    outs = [[like_c.clone() for _ in sets] for _ in range(5)]

    def call_all() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for pair in outs:
            for (a, b), out in zip(sets, pair, strict=True):
                addresses = {"a": a.data_ptr(), "b": b.data_ptr(), "c": out.data_ptr()}
                addresses["workspace"] = workspace.data_ptr()
                for kernel in started:
                    kernel.fastest(addresses, stream)

    def check_all() -> None:
        for pair in outs:
            for got, right in zip(pair, want, strict=True):
                assert torch.equal(got, right)
                got.fill_(torch.nan)

    call_all()
    check_all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call_all()
    graph.replay()
    check_all()
