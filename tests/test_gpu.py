"""On a real GPU: torch's own errors as the measure, and streams, graphs, threads, memory.

The families, layouts and shapes of test_numerics.py run on the GPU too; here is what only it has.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastmm_op
from cases import DTYPES, FAMILIES, at_offset, specials
from fastmm_op.choices import choices
from fastmm_op.partition import tail_tiles, whole_tiles
from fastmm_op.plan import write_plan
from fastmm_op.tiles import TALL_TILE
from fastmm_op.timing import torch_tf32
from oracle import assert_accurate, assert_same_specials, exact, norm

pytestmark = pytest.mark.gpu

SEED = (8205, 2949, 5921)
# Small and direct, packed, one-wide, split.
SIZES = [(64, 64, 64), (1021, 1031, 1033), (1, 4097, 1009), (129, 40001, 67)]


def inputs(m, k, n, dtype=torch.float32, make=torch.randn) -> tuple[torch.Tensor, torch.Tensor]:
    return make(m, k, device="cuda", dtype=dtype), make(k, n, device="cuda", dtype=dtype)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Normwise; of an all-zero product, absolute."""
    return norm(got.double().cpu() - want) / (norm(want) or 1.0)


# The Hopper kernel, which the interpreter cannot run, by each of its ways to store.


@pytest.mark.parametrize("n", [264, 265], ids=["aligned", "row classes"])
@pytest.mark.parametrize("precision", ["tf32", "fp32"])
@pytest.mark.parametrize("case", [*specials(5, 5, 5), *FAMILIES])
def test_hopper_kernel(hopper, case, precision, n) -> None:
    from fastmm_op import launch, running

    sizes = (1100, 200, n)
    special = specials(*sizes).get(case)
    a, b = (x.cuda()[None] for x in special or FAMILIES[case](*sizes))
    problem = launch.describe(a, b, precision, hopper)
    hopper = [c for c in choices(problem) if c.tile.kernel == "gemm_hopper" and c.split <= 2]
    assert hopper
    for choice in hopper:
        out = torch.full((1, sizes[0], n), torch.nan, device="cuda")
        running.run_plan(write_plan(problem, choice), a, b, out)
        if special:
            assert_same_specials(out, exact(a, b).float(), what=str(choice))
        else:
            assert_accurate(out, a, b, precision, what=str(choice))


@pytest.mark.parametrize(
    ("dtype", "precision"), [("fp32", "tf32"), ("fp32", "fp32"), ("bf16", "tf32")]
)
def test_streamed_stores(hopper, dtype, precision) -> None:
    """C is larger than L2, and its last tiles have rows and columns past its end."""
    from fastmm_op import launch, running

    a, b = (x[None] for x in inputs(5003, 72, 6008, dtype=DTYPES[dtype]))
    problem = launch.describe(a, b, precision, hopper)
    plans = [write_plan(problem, c) for c in choices(problem) if c.split == c.tail_split == 1]
    streamed = [plan for plan in plans if plan.launches[-1].constexprs.get("STREAMS")]
    assert streamed
    for plan in streamed:
        out = torch.full((1, 5003, 6008), torch.nan).to(a)
        running.run_plan(plan, a, b, out)
        assert_accurate(out, a, b, precision, what=str(plan.choice))


# M, K, N and batch: on 132 SMs fewer tiles than SMs (of a K that needs no split for its sums), and
# a wave of whole ones before the shared.
SHARED_TILES = {
    "few tiles, aligned": ((1100, 504, 264), 1),
    "few tiles, row classes": ((1100, 504, 265), 1),
    "a wave and more": ((2048, 520, 2313), 1),
    "a wave and more, batch": ((300, 520, 700), 20),
}


@pytest.mark.parametrize("name", SHARED_TILES)
@pytest.mark.parametrize(
    ("dtype", "precision"), [("fp32", "tf32"), ("fp32", "fp32"), ("bf16", "tf32")]
)
def test_hopper_tiles_shared_by_programs(hopper, dtype, precision, name) -> None:
    """Right, and the same bits every time."""
    from fastmm_op import launch, running

    (m, k, n), batch = SHARED_TILES[name]
    a = torch.randn(batch, m, k, device="cuda", dtype=DTYPES[dtype])
    b = torch.randn(batch, k, n, device="cuda", dtype=DTYPES[dtype])
    problem = launch.describe(a, b, precision, hopper)
    shared = [c for c in choices(problem) if c.tail_split in (2, 3) and not c.edge_n]
    assert shared
    if hopper.sms == 132:
        assert any(whole_tiles(problem, c) > 0 for c in shared) == name.startswith("a wave")
    for choice in shared:
        assert 0 < tail_tiles(problem, choice) < hopper.sms
        plan = write_plan(problem, choice)
        first, second = (torch.full((batch, m, n), torch.nan).to(a) for _ in range(2))
        for out in (first, second):
            running.run_plan(plan, a, b, out)
        assert_accurate(first, a, b, precision, what=str(choice))
        assert torch.equal(first, second), f"other bits the second time: {choice}"


# M, K, N and batch: rows of C aligned and in classes, also of wrapped columns only; on 132 SMs more
# wider tiles than a wave has, or fewer, and a last wave that may be shared; A of a few rows.
EDGES = {
    "aligned": ((1100, 504, 280), 1),
    "row classes": ((1100, 504, 281), 1),
    "row classes, wrapped columns": ((1100, 504, 257), 1),
    "several waves": ((4160, 520, 2056), 1),
    "several waves, row classes": ((4160, 520, 2073), 1),
    "more than a wave of wider tiles": ((17408, 136, 528), 1),
    "batch": ((300, 520, 784), 20),
    "few rows": ((70, 500, 2049), 1),
}


def assert_right_and_never_late(problem, ways, a, b) -> None:
    """Right by every one of the choices, and always the same bits.

    Operands of one call after the other differ by a power of two, which the exponents in the
    workspace say, or the packed elements: who started too early would show. Those of fp16, whose
    small results are subnormal, by their sign.
    """
    from fastmm_op import running

    scale = -1 if a.dtype == torch.float16 else 1024
    for choice in ways:
        plan = write_plan(problem, choice)
        outs = [torch.full((*a.shape[:2], b.shape[2]), torch.nan).to(a) for _ in range(4)]
        copies = []
        for out, x in zip(outs, (a, a * scale, a, a * scale), strict=True):
            running.run_plan(plan, x, b, out)
            copies.append(out.clone())
        assert_accurate(outs[0], a, b, "tf32", what=str(choice))
        for copy, factor in zip(copies, (1, scale, 1, scale), strict=True):
            assert torch.equal(copy, outs[0] * factor), f"other bits, or late ones: {choice}"


def in_layout(layout: str, dtype: str, m: int, k: int, n: int, batch: int):
    """Random A and B in memory's order, N, or the other, T."""
    a = torch.randn(batch, m, k, device="cuda", dtype=DTYPES[dtype])
    b = torch.randn(batch, k, n, device="cuda", dtype=DTYPES[dtype])
    return [
        x if order == "N" else x.mT.contiguous().mT for x, order in zip((a, b), layout, strict=True)
    ]


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("layout", ["NN", "TN"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_hopper_edges(hopper, dtype, layout, name) -> None:
    """Beside every tile, however read, with shared tiles too."""
    from fastmm_op import launch

    sizes, batch = EDGES[name]
    a, b = in_layout(layout, dtype, *sizes, batch)
    problem = launch.describe(a, b, "tf32", hopper)
    key = ("tile", "pack_a", "pack_b")
    edges = {
        (*(getattr(c, x) for x in key), c.tail_split > 1): c for c in choices(problem) if c.edge_n
    }
    assert edges
    assert_right_and_never_late(problem, edges.values(), a, b)


# M, K, N and batch, of which C is aligned: several waves on 132 SMs, one, few steps of K, a batch.
TALL = {
    "several waves": ((4160, 520, 2056), 1),
    "one wave": ((1100, 504, 280), 1),
    "few steps": ((4099, 72, 1032), 1),
    "batch": ((300, 520, 392), 20),
}


@pytest.mark.parametrize("name", TALL)
@pytest.mark.parametrize("layout", ["NN", "TT"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_hopper_tall_tiles(hopper, dtype, layout, name) -> None:
    """However read, with shared tiles too."""
    from fastmm_op import launch

    sizes, batch = TALL[name]
    a, b = in_layout(layout, dtype, *sizes, batch)
    problem = launch.describe(a, b, "tf32", hopper)
    tall = [c for c in choices(problem) if c.tile == TALL_TILE and c.tail_split <= 3]
    assert tall
    assert_right_and_never_late(problem, tall, a, b)


# What torch itself loses.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("precision", "factor"), [("tf32", 1.1), ("fp32", 2.0), ("ieee", 2.0)])
def test_error_beside_torchs(precision, factor, sizes, family) -> None:
    a, b = (x.cuda() for x in FAMILIES[family](*sizes))
    want = (a.double() @ b.double()).cpu()
    with torch_tf32(precision == "tf32"):
        theirs = error(a @ b, want)
    ours = error(fastmm_op.matmul(a, b, precision=precision), want)
    # 2**-23: one unit in the last place, where torch happens to be exact. A sum of subnormals is
    # rounded to a multiple of 2**-149 at every step, however many steps torch's order has.
    steps = sizes[1] * 2.0**-150 * want.numel() ** 0.5 / max(norm(want), 2.0**-149)
    allowed = factor * theirs + 2.0**-23 + steps
    assert ours <= allowed, f"ours {ours:.3e}, torch's {theirs:.3e}"


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_error_of_16_bits_beside_torchs(sizes, dtype) -> None:
    a, b = inputs(*sizes, dtype=DTYPES[dtype])
    want = (a.double() @ b.double()).cpu()
    ours, theirs = error(fastmm_op.matmul(a, b), want), error(a @ b, want)
    assert ours <= 1.1 * theirs, f"ours {ours:.3e}, torch's {theirs:.3e}"


@pytest.mark.parametrize(("precision", "factor"), [("tf32", 1.1), ("fp32", 2.0)])
def test_seed_workload_on_sampled_rows(precision, factor) -> None:
    a, b = inputs(*SEED)
    rows = torch.randint(SEED[0], (256,), device="cuda")
    rows[:2] = torch.tensor([0, SEED[0] - 1])
    want = (a[rows].double() @ b.double()).cpu()
    with torch_tf32(precision == "tf32"):
        theirs = error((a @ b)[rows], want)
    ours = error(fastmm_op.matmul(a, b, precision=precision)[rows], want)
    assert ours <= factor * theirs, f"ours {ours:.3e}, torch's {theirs:.3e}"


def test_seed_workload_passes_kernelbench() -> None:
    """Its judgement of fp32: 1e-4, absolute and relative, on torch.rand."""
    a, b = inputs(*SEED, make=torch.rand)
    with torch_tf32(False):
        want = a @ b
    assert torch.allclose(fastmm_op.matmul(a, b), want, atol=1e-4, rtol=1e-4)


# Memory.


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("offset", [1, 2, 3, 4])
def test_storage_offsets(offset, dtype) -> None:
    """The same numbers, however their addresses are aligned; what was compiled is not mixed up."""
    a, b = inputs(333, 517, 259, dtype=DTYPES[dtype])
    want = (a.double() @ b.double()).cpu()
    with torch_tf32(True):
        theirs = error(a @ b, want)
    for x, y in ((at_offset(a, offset), b), (a, at_offset(b, offset)), (a, b)):
        assert error(fastmm_op.matmul(x, y), want) <= 1.1 * theirs


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_inputs_and_their_surroundings_stay_as_they_are(sizes) -> None:
    m, k, n = sizes
    memory = torch.full((m * k + k * n + 3 * 64,), 7.0, device="cuda")
    a = memory[64 : 64 + m * k].view(m, k).normal_()
    b = memory[128 + m * k : 128 + m * k + k * n].view(k, n).normal_()
    before = memory.clone()
    for precision in ("tf32", "fp32"):
        fastmm_op.matmul(a, b, precision=precision)
    assert torch.equal(memory, before)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_repeats_bit_for_bit(precision, sizes) -> None:
    a, b = inputs(*sizes)
    first = fastmm_op.matmul(a, b, precision=precision)
    for _ in range(10):
        assert torch.equal(fastmm_op.matmul(a, b, precision=precision), first)


# Operands and results that reach past 2**31 elements, at most 5 GB each.
LONG = 2**25 + 1
FAR_APART = 2**30 + 8


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: (bf16(LONG, 67), bf16(67, 3)), id="rows of a"),
        pytest.param(lambda: (bf16(3, 67), bf16(67, LONG)), id="columns of b"),
        pytest.param(lambda: (bf16(3, 67), bf16(LONG, 67).T), id="rows of b transposed"),
        pytest.param(lambda: (bf16(LONG, 5), bf16(5, 67)), id="rows of the result"),
        pytest.param(
            lambda: (bf16(3, FAR_APART)[:, :67], bf16(67, 5)), id="rows of a that are far apart"
        ),
        pytest.param(
            lambda: (bf16(5, 3), bf16(3, FAR_APART)[:, :67]), id="rows of b that are far apart"
        ),
    ],
)
def test_past_2_to_the_31(make) -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    a, b = make()
    got = fastmm_op.matmul(a, b)
    some = torch.tensor([0, 1, 2**24, LONG - 2, LONG - 1])
    rows = some if a.shape[0] == LONG else torch.arange(a.shape[0])
    columns = some if b.shape[1] == LONG else torch.arange(b.shape[1])
    want = (a[rows].double() @ b[:, columns].double()).cpu()
    # 2**-20: fp32 accumulation, where rounding to bf16 is all that is granted otherwise.
    allowed = 1.1 * error(want.bfloat16(), want) + 2.0**-20
    assert error(got[rows][:, columns], want) <= allowed


# Time: streams, threads, graphs.


def test_streams_and_threads() -> None:
    """Each call's workspace is its own: calls that overlap do not see each other's."""
    cases = [inputs(1021, 1031, 1033) for _ in range(4)]
    want = [fastmm_op.matmul(a, b) for a, b in cases]
    torch.cuda.synchronize()

    def work(i: int) -> bool:
        a, b = cases[i]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            got = [fastmm_op.matmul(a, b) for _ in range(25)]
        stream.synchronize()
        return all(torch.equal(x, want[i]) for x in got)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_programs_that_wait_on_many_streams() -> None:
    """Of pack_strips, whose programs wait for others: many kernels share the card's room."""
    from fastmm_op import launch, running

    a, b = (x[None] for x in inputs(256, 4097, 4096))
    p = launch.describe(a, b, "tf32", launch.device_arch(torch.cuda.current_device()))
    plan = write_plan(p, next(c for c in choices(p) if c.pack_a and c.slabs == 1))
    assert "pack_strips" in [step.kernel for step in plan.launches]
    like_c = torch.full((1, 256, 4096), torch.nan, device="cuda")
    want = like_c.clone()
    running.run_plan(plan, a, b, want)
    torch.cuda.synchronize()
    outs = []
    for _ in range(32):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(4):
                outs.append(like_c.clone())
                running.run_plan(plan, a, b, outs[-1])
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out in outs)


def test_runs_on_the_current_stream() -> None:
    """What was queued before it on the same stream is done before it."""
    a, b = inputs(1021, 1031, 1033)
    want = fastmm_op.matmul(a, b)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(a)
        torch.cuda._sleep(50_000_000)
        late.copy_(a)
        got = fastmm_op.matmul(late, b)
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_never_waits_for_the_gpu(sizes) -> None:
    a, b = inputs(*sizes)
    fastmm_op.matmul(a, b)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fastmm_op.matmul(a, b)
        torch.ops.fastmm.matmul.default(a, b)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_cuda_graph(sizes) -> None:
    a, b = inputs(*sizes)
    fastmm_op.matmul(a, b)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fastmm_op.matmul(a, b)
    for _ in range(3):
        a.normal_()
        graph.replay()
        assert torch.equal(got, fastmm_op.matmul(a, b))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_reduce_overhead(sizes) -> None:
    """Inductor's own CUDA graphs, recorded on the second call and replayed from the third."""
    model = torch.compile(fastmm_op.ModelNew(), fullgraph=True, mode="reduce-overhead")
    for _ in range(5):
        a, b = inputs(*sizes)
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(model(a, b), fastmm_op.matmul(a, b))


def test_compiled_backward() -> None:
    a, b = inputs(333, 517, 259)
    a.requires_grad_()
    b.requires_grad_()
    fastmm_op.matmul(a, b).square().sum().backward()
    want, a.grad, b.grad = (a.grad, b.grad), None, None
    torch.compile(lambda a, b: fastmm_op.matmul(a, b).square().sum())(a, b).backward()
    for got, expected in zip((a.grad, b.grad), want, strict=True):
        assert error(got, expected.double().cpu()) <= 2.0**-20, "only the sum may differ"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one() -> None:
    a, b = inputs(1021, 1031, 1033)
    want = fastmm_op.matmul(a, b)
    got = fastmm_op.matmul(a.to("cuda:1"), b.to("cuda:1"))
    assert got.device.index == 1
    assert torch.cuda.current_device() == 0
    assert torch.equal(got.to("cuda:0"), want)
    with pytest.raises(RuntimeError, match="must be on one device, got cuda:0 and cuda:1"):
        fastmm_op.matmul(a, b.to("cuda:1"))
