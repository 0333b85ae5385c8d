"""Prepacked weights on a real GPU: every plan that reads a copy, remembered calls, CUDA graphs."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import fastmm_op
from cases import DTYPES
from fastmm_op.choices import choices
from fastmm_op.plan import write_plan
from fastmm_op.timing import torch_tf32

pytestmark = pytest.mark.gpu

KINDS = [("fp32", "tf32"), ("fp32", "fp32"), ("bf16", "tf32")]
# What rounding costs, normwise, and what sums add at most.
ALLOWED = {("fp32", "tf32"): 4e-4, ("fp32", "fp32"): 1.5e-6, ("bf16", "tf32"): 3e-3}


def error(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    want = x.double() @ weight.double().mT
    return ((got.double() - want).norm() / want.norm()).item()


def prepacked(n: int, k: int, dtype="fp32", precision="tf32", bias=False) -> nn.Linear:
    layer = nn.Linear(k, n, bias=bias, device="cuda", dtype=DTYPES[dtype])
    report = fastmm_op.prepack(layer, precision=precision)
    assert report.total_bytes, report
    return layer


@pytest.mark.parametrize(("dtype", "precision"), KINDS)
@pytest.mark.parametrize("sizes", [(1100, 200, 265), (1100, 200, 264), (300, 9001, 520)])
def test_every_plan_that_reads_a_copy(sizes, dtype, precision) -> None:
    """All tiles, splits, shared last tiles and edges, with rows of C of every alignment."""
    from fastmm_op import launch, launch_kept, running

    m, k, n = sizes
    x = torch.randn(m, k, device="cuda", dtype=DTYPES[dtype])
    weight = torch.randn(n, k, device="cuda", dtype=DTYPES[dtype])
    arch = launch.device_arch(torch.cuda.current_device())
    packed = launch_kept.pack_weight(weight, precision, arch)
    a, b = x[None], weight.mT[None]
    problem = replace(launch.describe(a, b, precision, arch), prepacked=True)
    seen = set()
    for choice in choices(problem):
        key = choice.tile, choice.pack_a, min(choice.split, 2), choice.tail_split > 1
        key += (choice.edge_n > 0,)
        if not choice.pack_b or key in seen:
            continue
        seen.add(key)
        out = torch.full((m, n), torch.nan, device="cuda", dtype=x.dtype)
        running.run_plan(write_plan(problem, choice), a, b, out, packed_b=packed)
        found = error(out, x, weight)
        assert found <= ALLOWED[dtype, precision], f"{choice}: {found:.2e}"
    assert seen


@pytest.mark.parametrize("precision", ["tf32", "fp32"])
@pytest.mark.parametrize("sizes", [(2047, 769, 3073), (4096, 1024, 1024), (17, 4097, 4099)])
def test_error_beside_torchs(sizes, precision) -> None:
    m, k, n = sizes
    layer, x = prepacked(n, k, precision=precision), torch.randn(m, k, device="cuda")
    with torch.no_grad():
        with torch_tf32(precision == "tf32"):
            torchs = error(x @ layer.weight.mT, x, layer.weight)
        for _ in range(2):  # the first call and the remembered one
            factor = 1.1 if precision == "tf32" else 2.0
            floor = 3e-4 if precision == "tf32" else 3e-7
            assert error(layer(x), x, layer.weight) <= max(factor * torchs, floor)


def test_a_copy_is_read_and_costs_no_packing() -> None:
    from torch.profiler import ProfilerActivity, profile

    layer, x = prepacked(4097, 4099), torch.randn(2048, 4099, device="cuda")
    with torch.no_grad():
        layer(x)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            layer(x)
            torch.cuda.synchronize()
    names = [event.name for event in profiler.events()]
    assert sum("pack_" in name for name in names) == 1, names
    assert not any("balance" in name for name in names), names


def test_an_old_copy_in_a_cuda_graph() -> None:
    """A replay asks nobody: the graph has the weight itself, and follows it."""
    layer, x = prepacked(2049, 1025), torch.randn(512, 1025, device="cuda")
    with torch.no_grad():
        layer(x)  # the usual warm-up
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        layer.weight.copy_(torch.randn_like(layer.weight))
        graph.replay()
        assert error(y, x, layer.weight) <= ALLOWED["fp32", "tf32"]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode) -> None:
    layer = prepacked(2049, 1025, bias=True)
    compiled = torch.compile(layer, mode=mode, fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(512, 1025, device="cuda")
            got = compiled(x).clone() - layer.bias
            assert error(got, x, layer.weight) <= ALLOWED["fp32", "tf32"]
        layer.weight.mul_(-3)
        got = compiled(x).clone() - layer.bias
        assert error(got, x, layer.weight) <= ALLOWED["fp32", "tf32"]


def test_never_waits_for_the_gpu() -> None:
    layer, x = prepacked(4097, 4099), torch.randn(2048, 4099, device="cuda")
    with torch.no_grad():
        layer(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_other_streams_may_read_the_copy() -> None:
    layer, x = prepacked(4097, 4099), torch.randn(2048, 4099, device="cuda")
    torch.cuda.synchronize()
    with torch.no_grad():
        want = layer(x)
        for _ in range(4):
            fastmm_op.prepack(layer, precision="tf32")
            with torch.cuda.stream(torch.cuda.Stream()):
                got = layer(x)
            torch.cuda.synchronize()
            assert torch.equal(got, want)
