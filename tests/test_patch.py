"""Does a patched model stay the model it was? Numbers, state, copies, torch.compile, unpatch."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import fastmm_op
from fastmm_op import patching

linear = torch.ops.fastmm.linear.default


class Conv1D(nn.Module):
    """As transformers.pytorch_utils.Conv1D is built."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.nx = nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x):
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


class MLP(nn.Module):
    """Both kinds of layer, one with no bias, one that two names share."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.act = nn.GELU()
        self.conv = Conv1D(24, 20)
        self.last = nn.Sequential(nn.Linear(24, 8, bias=False))
        self.again = self.last[0]

    def forward(self, x):
        return self.last(self.conv(self.act(self.first(x))))


class Calls(TorchDispatchMode):
    """The precisions of the linears that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.precisions = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is linear:
            self.precisions.append((kwargs or {}).get("precision", "tf32"))
        return func(*args, **(kwargs or {}))


def calls(model, *args) -> list[str]:
    with torch.no_grad(), Calls() as mode:
        model(*args)
    return mode.precisions


@pytest.fixture
def model(device) -> MLP:
    return MLP().to(device)


@pytest.fixture
def x(device) -> torch.Tensor:
    return torch.randn(3, 5, 12, device=device)


def close(got, want) -> None:
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


def test_report_and_numbers(model, x) -> None:
    want = model(x)
    report = fastmm_op.patch(model)
    assert report.changed == ("first", "conv", "last.0")
    assert report.left_alone == {}
    assert str(report).splitlines() == ["3 changed, 0 left alone", "  first", "  conv", "  last.0"]
    close(model(x), want)
    assert len(calls(model, x)) == 3


def test_the_model_itself_may_be_a_layer(x) -> None:
    layer = nn.Linear(12, 4).to(x.device)
    want = layer(x)
    assert str(fastmm_op.patch(layer)).splitlines()[1] == "  (the model itself)"
    close(layer(x), want)
    fastmm_op.unpatch(layer)
    assert type(layer) is nn.Linear


def test_nothing_is_copied_or_renamed(model) -> None:
    before = {name: (p.data_ptr(), id(p)) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    fastmm_op.patch(model, precision="ieee")
    assert {name: (p.data_ptr(), id(p)) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    assert isinstance(model.first, nn.Linear)
    assert isinstance(model.conv, Conv1D)
    assert model.again is model.last[0]
    fresh = MLP().to(next(model.parameters()).device)
    fresh.load_state_dict(model.state_dict())
    model.load_state_dict(fresh.state_dict())
    assert "fastmm precision='ieee'" in repr(model.first)
    assert "fastmm precision='ieee'" in repr(model.conv)


def test_unpatch_leaves_no_trace(model, x) -> None:
    before = [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()]
    want = model(x)
    report = fastmm_op.patch(model)
    assert fastmm_op.unpatch(model).changed == report.changed
    assert [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()] == before
    assert torch.equal(model(x), want)
    assert calls(model, x) == []
    assert fastmm_op.unpatch(model).changed == ()


def test_a_second_patch_changes_the_precision(model, x) -> None:
    for precision in ("tf32", "ieee"):
        assert len(fastmm_op.patch(model, precision=precision).changed) == 3
        assert calls(model, x) == [precision] * 3
    assert len(fastmm_op.unpatch(model).changed) == 3


APIS = {
    "allow_tf32": lambda on: setattr(torch.backends.cuda.matmul, "allow_tf32", on),
    "fp32_precision": lambda on: setattr(
        torch.backends.cuda.matmul, "fp32_precision", "tf32" if on else "ieee"
    ),
    "set_float32_matmul_precision": lambda on: torch.set_float32_matmul_precision(
        "high" if on else "highest"
    ),
}


@pytest.mark.parametrize("api", APIS)
def test_obeys_torchs_setting_at_call_time(api, model, x) -> None:
    fastmm_op.patch(model)
    for allowed, precision in ((False, "fp32"), (True, "tf32"), (False, "fp32")):
        APIS[api](allowed)
        assert calls(model, x) == [precision] * 3


@pytest.mark.parametrize("api", APIS)
def test_compiled_obeys_torchs_setting_at_call_time(api, model, x) -> None:
    fastmm_op.patch(model)
    compilations = []

    def backend(graph, inputs):
        nodes = [n for n in graph.graph.nodes if n.target is linear]
        compilations.append([n.kwargs["precision"] for n in nodes])
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for allowed in (False, True, False, True):
        APIS[api](allowed)
        compiled(x)
    assert compilations == [["fp32"] * 3, ["tf32"] * 3], "once each, and each found again"


def test_gradients(model, x) -> None:
    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad for p in model.parameters()]

    want = gradients()
    fastmm_op.patch(model, precision="ieee")
    for got, expected in zip(gradients(), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_deepcopy(model, x) -> None:
    fastmm_op.patch(model, precision="ieee")
    other = copy.deepcopy(model)
    assert torch.equal(other(x), model(x))
    assert calls(other, x) == ["ieee"] * 3
    assert other.first.weight is not model.first.weight
    assert other.again is other.last[0]
    fastmm_op.unpatch(other)
    assert calls(other, x) == []
    assert calls(model, x) == ["ieee"] * 3, "the copy's way back is its own"


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickling_the_whole_model(how, model, x) -> None:
    fastmm_op.patch(model, precision="ieee")
    buffer = io.BytesIO()
    if how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(x), model(x))
    assert calls(other, x) == ["ieee"] * 3
    assert len(fastmm_op.unpatch(other).changed) == 3


def test_saved_state_knows_nothing_of_it(model, x) -> None:
    want = model(x)
    fastmm_op.patch(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    plain = MLP().to(x.device)
    plain.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(plain(x), want)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
def test_compile(dynamic, requires_grad, model, x) -> None:
    fastmm_op.patch(model, precision="ieee")
    model.requires_grad_(requires_grad)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1
    if requires_grad:
        compiled(x).sum().backward()


def test_what_was_compiled_before_patch_is_compiled_again(model, x) -> None:
    linears = []

    def backend(graph, inputs):
        linears.append(sum(n.target is linear for n in graph.graph.nodes))
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    want = compiled(x)
    fastmm_op.patch(model)
    compiled(x)
    assert linears == [0, 3]
    fastmm_op.unpatch(model)
    assert torch.equal(compiled(x), want)


def test_export(model, x) -> None:
    fastmm_op.patch(model)
    for strict in (False, True):
        program = torch.export.export(model, (x,), strict=strict)
        targets = [n.target for n in program.graph.nodes]
        assert targets.count(linear) == 3, f"strict={strict}"


def test_hooks_and_modes_stay(model, x) -> None:
    seen = []
    model.first.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model.eval()
    fastmm_op.patch(model)
    model(x)
    assert seen == [(3, 5, 20)]
    assert not model.first.training


def test_autocast(model, x) -> None:
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        want = model(x)
        fastmm_op.patch(model)
        got = model(x)
    assert got.dtype is want.dtype is torch.bfloat16
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)


# What is left alone, and what is left to the module's own class.


class Wider(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class BitLinear(nn.Module):
    """Not a linear layer of PyTorch's."""


def not_a_conv1d(**attributes) -> nn.Module:
    layer = Conv1D(6, 4)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def rebound() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Wider(4, 4), "its class is test_patch.Wider, not torch.nn.Linear itself"),
        (BitLinear, "its class is test_patch.BitLinear, not torch.nn.Linear itself"),
        (rebound, "it has a forward of its own"),
        (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), "it is parametrized"),
        (lambda: nn.LazyLinear(4), "its class is torch.nn.modules.linear.LazyLinear"),
        (lambda: nn.Linear(4, 4).to(torch.complex64), "its weight is torch.complex64"),
        (lambda: not_a_conv1d(nf=7), "it is not built as the Conv1D of transformers is"),
        (lambda: not_a_conv1d(bias=None), "it is not built as the Conv1D of transformers is"),
    ],
)
@pytest.mark.filterwarnings("ignore:Complex modules:UserWarning")
def test_left_alone(make, why) -> None:
    holder = nn.Sequential(nn.Linear(4, 4), make(), nn.ReLU())
    kind = type(holder[1])
    report = fastmm_op.patch(holder)
    assert report.changed == ("0",)
    assert list(report.left_alone) == ["1"]
    assert report.left_alone["1"].startswith(why)
    assert f"1 left alone: {why}" in str(report)
    assert type(holder[1]) is kind


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantized_modules_are_left_alone() -> None:
    quantized = torch.ao.nn.quantized.dynamic.Linear(4, 4)
    report = fastmm_op.patch(nn.Sequential(quantized))
    assert report.changed == ()
    assert "0" in report.left_alone


def test_parametrized_after_patch(device) -> None:
    """The parametrized class derives from ours: it works, and has to be undone first."""
    layer = nn.Linear(6, 6).to(device)
    fastmm_op.patch(layer)
    parametrizations.orthogonal(layer)
    x = torch.randn(2, 6, device=device)
    close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    report = fastmm_op.unpatch(layer)
    assert report.changed == ()
    assert report.left_alone[""].endswith("was derived after patch")
    parametrize.remove_parametrizations(layer, "weight")
    assert fastmm_op.unpatch(layer).changed == ("",)
    assert type(layer) is nn.Linear


@pytest.mark.filterwarnings("ignore:Complex modules:UserWarning")
def test_weights_that_change_their_type_later(model, x) -> None:
    """What fastmm does not take is computed as it was before."""
    fastmm_op.patch(model)
    wide = model.double()
    assert wide(x.double()).dtype is torch.float64
    complex_layer = nn.Linear(4, 4).to(x.device)
    fastmm_op.patch(complex_layer)
    complex_layer.to(torch.complex64)
    z = torch.randn(2, 4, dtype=torch.complex64, device=x.device)
    want = torch.nn.functional.linear(z, complex_layer.weight, complex_layer.bias)
    torch.testing.assert_close(complex_layer(z), want)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nested_tensors_are_torchs(device) -> None:
    layer = nn.Linear(4, 3).to(device)
    fastmm_op.patch(layer)
    parts = [torch.randn(2, 4, device=device), torch.randn(5, 4, device=device)]
    out = layer(torch.nested.nested_tensor(parts, layout=torch.jagged))
    for got, part in zip(out.unbind(), parts, strict=True):
        close(got, torch.nn.functional.linear(part, layer.weight, layer.bias))


def test_tensor_subclasses_are_torchs(device) -> None:
    """A wrapper with rules of its own, as a DTensor or a quantized weight is."""
    from torch.testing._internal.two_tensor import TwoTensor

    layer = nn.Linear(4, 3).to(device)
    fastmm_op.patch(layer)
    x = torch.randn(2, 4, device=device)
    weight = layer.weight.detach()
    layer.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    out = layer(x)
    assert isinstance(out, TwoTensor)
    close(out.a, torch.nn.functional.linear(x, weight, layer.bias))
    plain = nn.Linear(4, 3)
    plain.weight = layer.weight
    report = fastmm_op.patch(nn.Sequential(plain))
    assert report.changed == ()
    assert report.left_alone["0"].startswith("its weight is a ")


def test_bad_arguments(model) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got OrderedDict"):
        fastmm_op.patch(model.state_dict())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        fastmm_op.unpatch([model])
    with pytest.raises(ValueError, match=r"precision must be one of .*, got 'tf16'"):
        fastmm_op.patch(model, precision="tf16")
    assert type(model.first) is nn.Linear


def test_torchs_precision_is_read_where_its_settings_meet() -> None:
    assert patching.torchs_precision() == "fp32"
    torch.set_float32_matmul_precision("medium")
    assert patching.torchs_precision() == "tf32"
