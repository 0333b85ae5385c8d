"""The private PyTorch functions in our two compat.py still exist and still mean what we think."""

import pytest
import torch
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._inductor import config as inductor_config
from torch._inductor import custom_graph_pass
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastmm_op import compat
from fastmm_op.compat import takes_short_path
from fastmm_op.compile import compat as compiler
from fastmm_op.compile.graph_pass import HOOKS


class OnCuda(torch.nn.Parameter):
    """A parameter that says it is on a GPU: the short path is for CUDA tensors only."""

    is_cuda = True


class Function(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture
def x(device, monkeypatch) -> torch.Tensor:
    """A tensor that takes the short path; without a GPU, one that only claims to be on it."""
    if device == "cuda":
        return torch.ones(2, 2, device="cuda")
    monkeypatch.setattr(compat, "_PLAIN", (OnCuda,))
    return OnCuda(torch.ones(2, 2), requires_grad=False)


def test_the_short_path_exists() -> None:
    assert compat.HAVE_SHORT_PATH, "a private function that it needs is gone from this torch"


def test_a_plain_call_takes_it(x) -> None:
    assert takes_short_path(x, x)


def test_cpu_tensors_do_not() -> None:
    assert not takes_short_path(torch.ones(2, 2), torch.ones(2, 2))


def test_requires_grad(x) -> None:
    other = x.detach().clone()
    other = other if other.is_cuda else OnCuda(other)
    other.requires_grad_()
    assert not takes_short_path(x, other)
    assert not takes_short_path(other, x)
    with torch.no_grad():
        assert takes_short_path(x, other)
    with torch.inference_mode():
        assert takes_short_path(x, other)


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cuda", dtype=torch.float16),
        Function,
        Dispatch,
        torch.profiler.profile,
    ],
    ids=["autocast", "function mode", "dispatch mode", "profiler"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # autocast to CUDA without a GPU
def test_somebody_listens(context, x, monkeypatch) -> None:
    # Without a GPU, autocast("cuda") turns itself off.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with context():
        assert not takes_short_path(x, x)
    assert takes_short_path(x, x), "and not for ever after"


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad, torch.func.functionalize])
def test_functorch_transforms(transform, x) -> None:
    """Their tensors are wrapped; inside, even an unwrapped one must not go past them."""
    answers = []

    def inside(y):
        answers.append(takes_short_path(x, x))
        return y.sum()

    transform(inside)(torch.ones(3))
    assert answers == [False]


def test_subclasses(x) -> None:
    class Subclass(torch.Tensor):
        is_cuda = True

    assert not takes_short_path(x, x.as_subclass(Subclass))
    assert not takes_short_path(x.as_subclass(Subclass), x)


def test_negated_view(x, monkeypatch) -> None:
    negated = torch._neg_view(x)
    if not negated.is_cuda:
        negated = torch.Tensor._make_subclass(OnCuda, negated)
    assert negated.is_neg()
    assert not takes_short_path(x, negated)
    assert not takes_short_path(negated, x)


def test_a_torch_without_them_is_served_by_the_dispatcher(x, monkeypatch) -> None:
    monkeypatch.setattr(compat, "HAVE_SHORT_PATH", False)
    assert not takes_short_path(x, x)


@pytest.mark.gpu
def test_raw_stream() -> None:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert compat.current_raw_stream(0) == side.cuda_stream
    assert compat.current_raw_stream(0) == torch.cuda.current_stream().cuda_stream


@pytest.mark.gpu
def test_allocation_on_the_current_device() -> None:
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            assert compat.current_device() == index
            found = compat.empty_strided_cuda((3, 5), (5, 1), torch.bfloat16)
        assert found.device == torch.device("cuda", index)
        assert (found.shape, found.stride(), found.dtype) == ((3, 5), (5, 1), torch.bfloat16)
        assert not found.requires_grad
        assert found.data_ptr() % 256 == 0


def test_allocation_is_pytorchs_private_one() -> None:
    """Without CUDA it refuses, but it is there; the substitute would be slower, not wrong."""
    from torch._C._dynamo import guards

    assert compat.empty_strided_cuda is guards._empty_strided_cuda


def test_exporting_is_not_compiling() -> None:
    seen = []

    class Looks(torch.nn.Module):
        def forward(self, x):
            return x + (2 if compat.is_exporting() else 1)

    assert not compat.is_exporting()
    one = torch.zeros(())
    assert torch.compile(Looks(), backend="eager", fullgraph=True)(one) == 1
    for strict in (False, True):
        program = torch.export.export(Looks(), (one,), strict=strict)
        seen.append(program.module()(one).item())
    assert seen == [2, 2]
    assert hasattr(torch.compiler, "_is_exporting_flag"), "else Dynamo's own answer is taken"


def test_tracing(x, monkeypatch) -> None:
    monkeypatch.setattr(compat, "_get_tracing_state", object)
    assert not takes_short_path(x, x)


def test_forward_ad(x) -> None:
    with torch.autograd.forward_ad.dual_level():
        assert not takes_short_path(x, x)


def test_zero_tensor(x) -> None:
    zero = torch._efficientzerotensor((2, 2), device=x.device)
    assert zero._is_zerotensor()
    assert not takes_short_path(x, zero)


# torch's compiler (fastmm_op/compile/compat.py).


@pytest.mark.parametrize(
    ("option", "value", "flag", "now"),
    [
        ("shape_padding", False, "pads", False),
        ("deterministic", True, "pads", False),
        ("max_autotune", True, "tunes", True),
        ("max_autotune_gemm", True, "tunes", True),
        ("triton.cudagraphs", True, "graphs", True),
    ],
)
def test_inductor_flags(option, value, flag, now) -> None:
    defaults = {"pads": True, "tunes": False, "graphs": False}
    assert vars(compiler.flags()) == defaults
    with inductor_config.patch({option: value}):
        assert vars(compiler.flags()) == defaults | {flag: now}


def test_forced_padding_measures_nothing() -> None:
    with inductor_config.patch(deterministic=True, force_shape_pad=True):
        assert compiler.flags().pads


def test_hooks_take_lists_from_torch_2_13() -> None:
    assert hasattr(custom_graph_pass, "get_custom_graph_passes") == compiler.HOOKS_TAKE_LISTS


def test_hooks_and_modes_are_known() -> None:
    names = compiler.option_names()
    assert set(HOOKS) | {"max_autotune", "triton.cudagraphs"} <= names
    modes = compiler.list_mode_options()
    assert {"default", "reduce-overhead", "max-autotune"} <= set(modes)
    assert all(set(mode) <= names for mode in modes.values())


def test_hints_add_no_guards() -> None:
    graph = make_fx(torch.nonzero, tracing_mode="symbolic")(torch.empty(5, 7))
    x, found = [node.meta["val"] for node in graph.graph.nodes if "val" in node.meta][:2]
    assert isinstance(x.shape[0], torch.SymInt)
    assert [compiler.hint(size) for size in (*x.shape, x.shape[0] * 3, 11)] == [5, 7, 15, 11]
    assert compiler.hint(found.shape[0]) is None
    assert not graph.shape_env.guards


def test_backward_graphs_can_be_compiled_at_once() -> None:
    compiled = []

    def capture(graph, inputs):
        compiled.append(graph)
        return make_boxed_func(graph.forward)

    def backend(graph, inputs):
        return aot_module_simplified(graph, inputs, capture, bw_compiler=capture)

    with compiler.backward_at_once():
        torch.compile(torch.sin, backend=backend)(torch.ones(3, requires_grad=True))
    assert len(compiled) == 2


def test_wrapper_subclasses_are_told_from_tensors() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    plain = torch.ones(2)
    assert compat.is_traceable_wrapper_subclass(TwoTensor(plain, plain.clone()))
    assert not compat.is_traceable_wrapper_subclass(torch.nn.Parameter(plain))


def test_an_assumed_constant_follows_torchs_global_settings() -> None:
    """Dynamo must not look inside, and must ask again after a setting that it watches."""
    asked = []

    @compat.constant_while_compiling
    def setting() -> bool:
        asked.append(torch.are_deterministic_algorithms_enabled())
        return asked[-1]

    compiled = torch.compile(lambda x: x + setting(), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == 0
    torch.use_deterministic_algorithms(True)
    try:
        assert compiled(torch.zeros(1)).item() == 1
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [False, True]


def test_atens_float32_is_exact_where_it_must_be() -> None:
    """However the user let PyTorch compute products in less, through whichever of its ways."""
    from fastmm_op import aten

    a, b = torch.randn(33, 65), torch.randn(65, 17)
    want = (a.double() @ b.double()).float()
    cpu_setting = torch.backends.mkldnn.matmul
    for allowed in ("bf16", "tf32"):
        cpu_setting.fp32_precision = allowed
        assert aten.needs_float64(a, "fp32")
        assert not aten.needs_float64(a, "tf32")
        assert torch.equal(aten.matmul(a, b, "ieee"), want)
        assert torch.equal(aten.linear(a, b.mT, None, None, "none", "ieee"), want)
    cpu_setting.fp32_precision = "ieee"
    assert not aten.needs_float64(a, "fp32")


@pytest.mark.parametrize("others", [(None,), (None, None)])
def test_optional_operands(others, x) -> None:
    assert takes_short_path(x, x, *others)
    assert takes_short_path(x, x, x, *others)
    assert not takes_short_path(x, x, *others, torch.ones(2))
    wanted = x.detach().clone()
    wanted = wanted if wanted.is_cuda else OnCuda(wanted)
    wanted.requires_grad_()
    assert not takes_short_path(x, x, *others, wanted)
    assert not takes_short_path(x, x, torch._neg_view(x), *others)
