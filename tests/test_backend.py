"""``torch.compile(model, backend="fastmm")``: whole models, and what torch.compile promises them.

``graphs`` runs the rewritten graphs as they are, with no code generated: it is quick, and all the
passes and AOTAutograd are the real ones. What is about code and caches goes through Inductor.
"""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn import functional as F
from torch.testing import FileCheck
from torch.utils.checkpoint import checkpoint

import fastmm_op
from fastmm_op import aten, ops
from fastmm_op.compile import compat, explain, options
from fastmm_op.compile.backend import backend, inductor_options, split_settings
from fastmm_op.compile.compat import CustomGraphPass
from fastmm_op.compile.graph_pass import HOOKS, MatmulPass
from fastmm_op.compile.settings import Settings

BF16 = torch.bfloat16
ALWAYS = {"fastmm.always": True}


class Call:
    """One call of an op's implementation: dtype, shapes, precision and what is fused."""

    def __init__(self, a, b, precision: str, *fused) -> None:
        self.dtype, self.precision, self.fused = a.dtype, precision, fused
        self.shapes = tuple(a.shape), tuple(b.shape)


@pytest.fixture
def calls(monkeypatch) -> list[Call]:
    """What the ops are called with, eagerly and in compiled code."""
    seen = []

    def spy(module):
        real, real_linear = module.matmul, module.linear

        def matmul(a, b, precision):
            seen.append(Call(a, b, precision))
            return real(a, b, precision)

        def linear(x, weight, bias, residual, activation, precision):
            parts = {"bias": bias is not None, activation: activation != "none"}
            parts["residual"] = residual is not None
            seen.append(Call(x, weight.mT, precision, *(part for part in parts if parts[part])))
            return real_linear(x, weight, bias, residual, activation, precision)

        monkeypatch.setattr(module, "matmul", matmul)
        monkeypatch.setattr(module, "linear", linear)

    # The CPU's implementation, or that of the GPU, which leaves to ATen what it has no kernel for.
    if ops.INTERPRETED or (ops.HAVE_TRITON and torch.cuda.is_available()):
        spy(pytest.importorskip("fastmm_op.launch"))
    else:
        spy(aten)
    return seen


def graphs(graph, inputs, given=None):
    """A backend: all of Inductor's passes and ours, then the graph itself in place of code."""
    patches = inductor_options(None, given, Settings(always=True))
    patches["force_disable_caches"] = True

    def finish(graph, inputs, **kwargs):
        hook = torch._inductor.config.post_grad_custom_pre_pass
        for one in hook if isinstance(hook, list) else [hook]:
            one(graph.graph)
        graph.recompile()
        return make_boxed_func(graph.forward)

    return compile_fx(graph, inputs, inner_compile=finish, config_patches=patches)


def mlp(device) -> nn.Module:
    return nn.Sequential(nn.Linear(7, 33), nn.GELU(), nn.Linear(33, 5)).to(device)


def gradients(model, *args, **kwargs) -> list[torch.Tensor]:
    """The result and every gradient of a model's call, with a loss that weighs all elements."""
    leaves = [x for x in args if x.requires_grad]
    leaves += list(model.parameters()) if isinstance(model, nn.Module) else []
    out = model(*args, **kwargs)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    return [out, *torch.autograd.grad((out.float() * weight).sum(), leaves)]


def assert_same(got: list, want: list, rtol=1e-5) -> None:
    """Normwise; of float32 and, where rtol says so, of 16-bit results."""
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert (one - other).double().norm() <= rtol * other.double().norm()


def leaf(*shape: int, device="cpu", dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)


# Models.


def test_mlp_training_step(calls, device) -> None:
    model, x = mlp(device), torch.randn(3, 4, 7, device=device)
    want = gradients(model, x)
    assert not calls
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    got = gradients(compiled, x)
    assert_same(got, want)
    assert [call.shapes for call in calls] == [
        ((12, 7), (7, 33)),  # forward
        ((12, 33), (33, 5)),
        ((12, 5), (5, 33)),  # backward, the last layer first
        ((5, 12), (12, 33)),
        ((33, 12), (12, 7)),
    ]
    assert {call.precision for call in calls} == {"fp32"}


def block(q, k, v):
    """Like attention, but of a kind that no pattern of Inductor's knows."""
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k).relu()
    return torch.matmul(scores, v)


@pytest.mark.parametrize("dynamic", [False, True])
def test_batched_products(dynamic, calls, device) -> None:
    args = [leaf(2, 3, n, 5, device=device) for n in (4, 6, 6)]
    compiled = torch.compile(block, backend=graphs, fullgraph=True, dynamic=dynamic)
    assert_same(gradients(compiled, *args), gradients(block, *args))
    assert len(calls) == 6


def test_dynamic_shapes_compile_once(calls, device) -> None:
    compiled_graphs = []

    def counting(graph, inputs):
        compiled_graphs.append(graph)
        return graphs(graph, inputs)

    model = mlp(device)
    compiled = torch.compile(model, backend=counting, fullgraph=True, dynamic=True)
    for rows in (12, 16, 5):
        x = torch.randn(rows, 7, device=device)
        assert_same(gradients(compiled, x), gradients(model, x))
    assert len(compiled_graphs) == 1
    assert len(calls) == 15


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("forward", [False, True])
def test_autocast(forward, backward, calls, device) -> None:
    """The casts of the forward pass are in both graphs; when they run, nothing is cast again."""

    def function(x, weight):
        y = x @ weight
        with torch.autocast(device, enabled=False):
            return y.float() @ weight.mT

    x, weight = leaf(5, 7, device=device), leaf(7, 9, device=device)
    compiled = torch.compile(function, backend=graphs, fullgraph=True)
    results = []
    for one in (compiled, function):
        with torch.autocast(device, dtype=BF16, enabled=forward):
            out = one(x, weight)
        # What eager autograd would make of autocast here is another question.
        with torch.autocast(device, dtype=BF16, enabled=backward and one is compiled):
            results.append([out, *torch.autograd.grad(out.sum(), (x, weight))])
    # The interpreter truncates what it rounds to bfloat16: two units in the last place.
    assert_same(*results, 2**-6 if forward else 1e-5)
    seen = [call.dtype for call in calls]
    assert len(seen) == 6
    if forward:
        assert seen[:2] == [BF16, torch.float32]  # the rest is as AOTAutograd traces it
    else:
        assert set(seen) == {torch.float32}


class FeedForward(nn.Module):
    """A transformer's: two layers, an activation between them, around a residual connection."""

    def __init__(self, activation) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 33), nn.Linear(33, 7)
        self.activation = activation

    def forward(self, x):
        return x + self.down(self.activation(self.up(x)))


# What the backward pass needs is not fused: relu's needs its result only.
FUSED = {"relu": (F.relu, True), "gelu": (F.gelu, False), "silu": (F.silu, False)}


@pytest.mark.parametrize("shape", [(6, 7), (3, 4, 7)], ids=["rows", "batch"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", FUSED)
def test_epilogues(activation, dtype, dynamic, shape, calls, device) -> None:
    function, fused_in_training = FUSED[activation]
    model = FeedForward(function).to(device, dtype)
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    # Roundings of sums in another order, doubled by the interpreter's truncation.
    allowed = 1e-5 if dtype is torch.float32 else 2**-6
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        assert_same([compiled(x)], [model(x)], allowed)
    whole = [("bias", activation), ("bias", "residual")]
    assert [call.fused for call in calls] == whole
    calls.clear()
    assert_same(gradients(compiled, x), gradients(model, x), allowed)
    forward, backward = calls[:2], calls[2:]
    first = whole[0] if fused_in_training else ("bias",)
    assert [call.fused for call in forward] == [first, whole[1]]
    assert len(backward) == 4
    # x has two gradients, one through the layers; their sum is a residual of the product.
    assert [call.fused for call in backward].count(("residual",)) == 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference(context, calls, device) -> None:
    model, x = mlp(device), torch.randn(6, 7, device=device)
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with context():
        assert_same([compiled(x)], [model(x)])
    assert len(calls) == 2


def test_activation_checkpointing(calls, device) -> None:
    """What the forward pass does not keep, the op computes again in the backward pass."""
    model, x = mlp(device), leaf(6, 7, device=device)

    def function(x):
        return checkpoint(lambda x: model(x.sin()), x, use_reentrant=False).sin()

    compiled = torch.compile(function, backend=graphs, fullgraph=True)
    assert_same(gradients(compiled, x), gradients(function, x))
    forward = ((6, 7), (7, 33))
    assert [call.shapes for call in calls].count(forward) == 2


def test_deterministic_mode(calls, device) -> None:
    """Nothing of the ops' depends on an order that varies: they run, with the same results."""
    model, x = mlp(device), leaf(6, 7, device=device)
    want = gradients(torch.compile(model, backend=graphs, fullgraph=True), x)
    torch._dynamo.reset()
    seen = len(calls)
    torch.use_deterministic_algorithms(True)
    try:
        compiled = torch.compile(model, backend=graphs, fullgraph=True)
        for _ in range(2):
            for got, expected in zip(gradients(compiled, x), want, strict=True):
                assert torch.equal(got, expected)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(calls) == 3 * seen


def test_ddp(calls, tmp_path) -> None:
    """Dynamo splits a DDP model's graph at its buckets, and compiles each part."""

    class Model(nn.Sequential):
        def forward(self, x):  # Dynamo does not enter torch's own file after DDP's graph break
            return super().forward(x)

    model, x = Model(nn.Linear(7, 600), nn.Linear(600, 600), nn.Linear(600, 5)), leaf(6, 7)
    out, *want = gradients(model, x)
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
    compiled_graphs, buckets = [], []

    def hook(state, bucket):
        buckets.append(bucket.index())
        return default_hooks.allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, hook)

    def counting(graph, inputs):
        compiled_graphs.append(graph)
        return graphs(graph, inputs)

    try:
        got = torch.compile(wrapped, backend=counting)(x)
        # DDP's hooks are those of .grad: torch.autograd.grad would not call them.
        weights = torch.linspace(-1, 1, got.numel()).view(got.shape)
        (got * weights).sum().backward()
        assert_same([got, x.grad, *(p.grad for p in model.parameters())], [out, *want])
        assert len(compiled_graphs) == 2
        assert buckets, "gradients went through DDP's hook"
        assert len(calls) == 9
    finally:
        del wrapped
        torch.distributed.destroy_process_group()


# Through Inductor.


def test_by_name(entry_points, calls, device) -> None:
    # Products only: nothing that Inductor's C++ compiler would have to compile for a CPU.
    model = nn.Sequential(nn.Linear(7, 9, bias=False), nn.Linear(9, 5, bias=False)).to(device)
    x = torch.randn(6, 7, device=device)
    want = gradients(model, x)
    calls.clear()
    compiled = torch.compile(model, backend="fastmm", fullgraph=True, options=ALWAYS)
    with torch._inductor.config.patch(force_disable_caches=True):
        got, codes = run_and_get_code(gradients, compiled, x)
    assert_same(got, want)
    assert len(calls) == 5
    forward, backward = codes
    for code, count in ((forward, 2), (backward, 3)):
        FileCheck().check_count(
            "= torch.ops.fastmm.matmul_in_graph.default(", count, exactly=True
        ).run(code)
        FileCheck().check_not("extern_kernels.").run(code)


@pytest.mark.parametrize("dynamic", [False, True])
def test_epilogues_leave_nothing_to_compile(dynamic, calls, device) -> None:
    """A feed-forward block is two calls."""
    model = FeedForward(F.gelu).to(device)
    x = torch.randn(3, 4, 7, device=device)
    compiled = torch.compile(
        model, backend=backend, fullgraph=True, dynamic=dynamic, options=ALWAYS
    )
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        got, (code,) = run_and_get_code(compiled, x)
        assert_same([got], [model(x)])
    assert len(calls) == 2
    FileCheck().check_count("= torch.ops.fastmm.linear_in_graph.default(", 2, exactly=True).run(
        code
    )
    for other in ("extern_kernels.", "async_compile.cpp", "async_compile.triton"):
        FileCheck().check_not(other).run(code)


def test_by_options(calls, device) -> None:
    """The same, through torch.compile's own backend."""
    x, weight = torch.randn(6, 7, device=device), torch.randn(7, 9, device=device)
    mode = "reduce-overhead"
    compiled = torch.compile(torch.mm, fullgraph=True, options=options(mode, always=True))
    assert_same([compiled(x, weight)], [x @ weight])
    assert len(calls) == 1
    assert options(mode)["triton.cudagraphs"] is True


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_modes(mode, calls, device) -> None:
    x, weight = torch.randn(6, 7, device=device), torch.randn(7, 9, device=device)
    with torch._inductor.config.patch(options(always=True)):  # mode and options exclude each other
        compiled = torch.compile(torch.mm, backend=backend, fullgraph=True, mode=mode)
        assert_same([compiled(x, weight)], [x @ weight])
    assert len(calls) == 1


def test_left_alone_on_the_cpu(calls) -> None:
    """Without a GPU, the backend is Inductor."""
    compiled = torch.compile(torch.mm, backend=backend, fullgraph=True)
    x = torch.randn(6, 6)
    assert_same([compiled(x, x)], [x @ x])
    assert not calls


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"options": {"fastmm.alway": True}}, "unknown option 'fastmm.alway'"),
        ({"options": {"fastmm.arch": "sm_70"}}, "arch must be one of"),
        ({"options": {"max_autotun": True}}, "unknown option 'max_autotun'"),
        ({"mode": "fastest"}, "mode must be one of ('default', "),
    ],
)
def test_bad_options(how, message) -> None:
    compiled = torch.compile(torch.mm, backend=backend, **how)
    with pytest.raises(Exception, match=r"fastmm_op\.compile: ") as caught:
        compiled(torch.ones(2, 2), torch.ones(2, 2))
    assert message in str(caught.value)
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), ValueError)


def test_options_as_given() -> None:
    settings, theirs = split_settings({"fastmm.arch": "sm_90", "max-autotune": True})
    assert (settings.arch.name, settings.always) == ("sm_90", False)
    found = inductor_options("reduce-overhead", theirs, settings)
    assert {name: value for name, value in found.items() if name not in HOOKS} == {
        "triton.cudagraphs": True,
        "max_autotune": True,
    }


# The user's own passes.


class Recorder(CustomGraphPass):
    """Notes the products that it sees."""

    def __init__(self, seen: list) -> None:
        self.seen = seen

    def __call__(self, graph) -> None:
        names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        self.seen.append([name for name in names if "mm" in name])

    def uuid(self) -> str:
        return "recorder"


@pytest.mark.parametrize("lists", [False, True], ids=["chained", "lists"])
@pytest.mark.parametrize("where", ["options", "config"])
def test_the_users_passes_run_first(where, lists, monkeypatch) -> None:
    if lists and not compat.HOOKS_TAKE_LISTS:
        pytest.skip("torch 2.13 and newer")
    monkeypatch.setattr(compat, "HOOKS_TAKE_LISTS", lists)
    seen, given = [], {}
    theirs = {hook: Recorder(seen) for hook in (*HOOKS, "joint_custom_post_pass")}
    if where == "options":
        given = theirs
        theirs = {}

    def function(a, b):
        return a @ b, a[None].bmm(b[None])

    x = torch.randn(5, 5)
    with torch._inductor.config.patch(theirs):
        torch.compile(function, backend=partial(graphs, given=given), fullgraph=True)(x, x)
    mm, bmm, ours = "aten.mm.default", "aten.bmm.default", "fastmm.matmul_in_graph.default"
    assert seen == [[mm, bmm], [ours, bmm], [ours, bmm]]


def test_chains_have_the_keys_of_their_parts(monkeypatch) -> None:
    monkeypatch.setattr(compat, "HOOKS_TAKE_LISTS", False)
    hook = next(iter(HOOKS))
    ours, theirs = MatmulPass(hook, Settings()), Recorder([])
    assert compat.chain(None, ours) is ours
    assert compat.chain(theirs, ours).uuid() == ("recorder", ours.uuid())
    assert compat.chain(lambda graph: None, ours).uuid() is None, "no key: caches are bypassed"
    monkeypatch.setattr(compat, "HOOKS_TAKE_LISTS", True)
    assert compat.chain([theirs], ours) == [theirs, ours]


# Caches.

TRAIN = """
import json, sys, torch
from torch._dynamo.utils import counters
torch.manual_seed(0)
model = torch.nn.Linear(7, 5, bias=False)
compiled = torch.compile(model, backend="fastmm", options={"fastmm.always": True})
x = torch.randn(6, 7, requires_grad=True)
compiled(x).sum().backward()
assert torch.allclose(x.grad, model.weight.detach().sum(0).expand(6, 7), rtol=1e-5)
names = "fxgraph_cache_miss", "fxgraph_cache_hit", "autograd_cache_miss", "autograd_cache_hit"
print(json.dumps({n: counters[g][n] for n in names for g in ("inductor", "aot_autograd")
                  if n in counters[g]}))
"""


@pytest.mark.interpreted  # takes two processes that import Inductor; once is enough
def test_a_second_process_finds_the_compiled_code(entry_points, tmp_path) -> None:
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", TRAIN], env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = found
    assert first.get("autograd_cache_miss") == 1
    assert first.get("fxgraph_cache_miss") == 2, "forward and backward"
    assert second.get("autograd_cache_hit") == 1
    assert "fxgraph_cache_miss" not in second


def test_another_precision_is_another_graph(calls, device) -> None:
    """Dynamo guards on the setting, and the caches on disk know it."""
    compiled = torch.compile(torch.mm, backend=backend, fullgraph=True, options=ALWAYS)
    x = torch.randn(6, 6, device=device)
    used = []
    with fresh_cache():
        counters.clear()
        for tf32 in (False, True, False):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            compiled(x, x)
            used.append(calls[-1].precision)
        assert used == ["fp32", "tf32", "fp32"]
        assert counters["aot_autograd"]["autograd_cache_miss"] == 2, "compiled once for each"
        torch._dynamo.reset()
        torch.backends.cuda.matmul.allow_tf32 = True
        compiled(x, x)
        assert calls[-1].precision == "tf32"
        assert counters["aot_autograd"]["autograd_cache_hit"] == 1


@pytest.mark.compiled  # once is enough: a C++ compiler works for this one
def test_aotinductor(tmp_path) -> None:
    """Both ops, with what AOTInductor has to write down: texts, and tensors that are not there."""
    model = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 5, bias=False))
    x = torch.randn(6, 7)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    settings = options(options={"aot_inductor.compile_wrapper_opt_level": "O0"}, always=True)
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2"), inductor_configs=settings
    )
    torch.save((x, model(x)), tmp_path / "want.pt")
    code = (
        "import torch, fastmm_op; from fastmm_op import aten; calls = []\n"
        "for name in ('matmul', 'linear'):\n"
        "    def spy(*args, name=name, real=getattr(aten, name)):\n"
        "        calls.append((name, *args[-2:]))\n"
        "        return real(*args)\n"
        "    setattr(aten, name, spy)\n"
        f"x, want = torch.load({str(tmp_path / 'want.pt')!r})\n"
        f"model = torch._inductor.aoti_load_package({path!r})\n"
        "assert torch.allclose(model(x), want, atol=1e-6)\n"
        "assert torch.allclose(model(x[:4]), want[:4], atol=1e-6)\n"
        "assert [call[0] for call in calls] == ['linear', 'matmul'] * 2, calls\n"
        "assert calls[0][1:] == ('relu', 'fp32') and calls[1][2] == 'fp32', calls\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# On a GPU.


@pytest.mark.gpu
def test_cuda_graphs(entry_points, calls) -> None:
    """Replayed without a call of the op, on new inputs."""
    model = nn.Sequential(nn.Linear(1021, 2049), nn.GELU(), nn.Linear(2049, 1021)).cuda()
    how = ALWAYS | {"triton.cudagraphs": True}
    compiled = torch.compile(model, backend="fastmm", fullgraph=True, options=how)
    with torch.no_grad():
        for _ in range(3):  # warm-up, capture, replay
            x = torch.randn(515, 1021, device="cuda")
            seen = len(calls)
            assert_same([compiled(x).clone()], [model(x)])
    assert seen == len(calls) > 0


@pytest.mark.gpu
def test_the_card_decides(calls) -> None:
    x = torch.randn(4095, 4095, device="cuda", dtype=BF16)
    report = explain(torch.mm, options={"shape_padding": False})(x, x)
    assert report.taken, report


# explain.


def test_explain(calls) -> None:
    model, x = mlp("cpu").to(BF16), torch.randn(4, 7, dtype=BF16)
    report = explain(model, arch="sm_90")(x)
    assert [decision.op for decision in report.decisions] == ["addmm", "addmm", "mm", "mm", "mm"]
    assert report.taken == ()
    text = str(report)
    assert "0 of 5 products taken" in text
    assert "bound by memory traffic" in text
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        report = explain(model, always=True, dynamic=True)(x)
    assert [str(d).split(": ", 2)[-1] for d in report.taken] == [
        "taken with bias, gelu: always=True",
        "taken with bias: always=True",
    ]
    assert "taken with bias, gelu" in " ".join(str(report).split())
    assert report.decisions[0].M.endswith("=4")
    assert not calls, "ATen runs the graphs"


def test_explain_as_often_as_one_likes() -> None:
    """Dynamo's limit on recompilations does not stop it, and it leaves no trace in it."""
    limit = torch._dynamo.config.recompile_limit

    def function(x):
        return x @ x

    for _ in range(limit + 2):
        report = explain(function, arch="sm_89")(torch.ones(3, 3))
        assert len(report.decisions) == 1
    assert report.decisions[0].source.endswith("return x @ x")


def test_importing_fastmm_op_imports_no_compiler() -> None:
    code = (
        "import sys, fastmm_op\n"
        "assert not [m for m in sys.modules if m.startswith('fastmm_op.compile')]\n"
        "assert 'torch._inductor.config' not in sys.modules\n"
        "assert callable(fastmm_op.compile.options)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fastmm_op.nothing  # noqa: B018
