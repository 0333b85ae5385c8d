"""Weights packed once: the numbers, when a copy is read, and that an old one never is."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import fastmm_op
from benchmarks.families import FAMILIES
from cases import DTYPES, specials
from fastmm_op import prepacking
from oracle import assert_accurate, assert_same_specials, exact
from test_backend import graphs
from test_patch import Conv1D

linear_prepacked = torch.ops.fastmm.linear_prepacked.default
N, K = 37, 33
kernels = pytest.mark.kernels


@pytest.fixture
def copies_win(monkeypatch):
    """The planner prefers a packed B, however small the product."""
    from fastmm_op import launch, plan

    estimate = plan.estimate
    monkeypatch.setattr(launch, "_calls", {})
    monkeypatch.setattr(plan, "estimate", lambda p, c: estimate(p, c) - (p.prepacked and c.pack_b))
    plan.make_plan.cache_clear()
    yield
    plan.make_plan.cache_clear()


@pytest.fixture
def reads(monkeypatch) -> list[bool]:
    """For each product asked for: whether it was by a copy."""
    if fastmm_op.ops.HAVE_TRITON:
        from fastmm_op import launch, launch_kept

        run, prepare, found, preparing = launch.Call.run, launch_kept.prepacked_call, [], []

        def counted(self, a, b, bias, residual, packed_b):
            if not preparing:
                found.append(packed_b is not None)
            return run(self, a, b, bias, residual, packed_b)

        def prepared(*args):
            """On a GPU this computes the plain op once, which nobody asked for."""
            preparing.append(True)
            try:
                return prepare(*args)
            finally:
                preparing.pop()

        monkeypatch.setattr(launch.Call, "run", counted)
        monkeypatch.setattr(launch_kept, "prepacked_call", prepared)
        return found
    return []


def prepacked(weight, bias=None, precision="tf32", conv=False) -> nn.Module:
    """A layer with a copy of this weight (N, K)."""
    n, k = weight.shape
    layer = Conv1D(n, k) if conv else nn.Linear(k, n, bias=bias is not None)
    with torch.device(weight.device):
        layer.weight = nn.Parameter(weight.mT.contiguous() if conv else weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias)
    report = fastmm_op.prepack(layer, precision=precision)
    assert report.kept_bytes, report
    return layer


@pytest.fixture
def layer(device, copies_win) -> nn.Module:
    return prepacked(torch.randn(N, K, device=device), torch.randn(N, device=device))


@pytest.fixture
def x(device) -> torch.Tensor:
    return torch.randn(9, K, device=device)


def product(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return layer(x)


def check(layer, x, precision="tf32") -> None:
    weight = layer.weight.detach()
    got = product(layer, x)
    assert_accurate(
        got - (0 if layer.bias is None else layer.bias.detach()), x, weight.mT, precision
    )


# Numbers.


@kernels
@pytest.mark.parametrize(("conv", "k"), [(False, 33), (False, 130), (True, 130), (True, 1030)])
@pytest.mark.parametrize(
    ("dtype", "precision"), [("fp32", "tf32"), ("fp32", "fp32"), ("bf16", "tf32")]
)
def test_accuracy(dtype, precision, k, conv, device, copies_win, guarded_memory, reads) -> None:
    """Weights of both orders, packed in one read and (1030, not along K) in two."""
    weight = torch.randn(37, k, device=device, dtype=DTYPES[dtype])
    bias = torch.zeros(37, device=device, dtype=DTYPES[dtype])
    layer = prepacked(weight, bias, precision, conv)
    reads.clear()
    for x in (torch.randn(2, 9, k, device=device), torch.randn(k, 21, device=device).mT):
        x = x.to(DTYPES[dtype])
        assert_accurate(product(layer, x), x, weight.mT, precision)
    assert reads == [True, True]


@kernels
@pytest.mark.parametrize("precision", ["tf32", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_number_families(family, precision, device, copies_win, guarded_memory, reads) -> None:
    """What the ordinary op promises, with K balanced by the weight alone."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = FAMILIES[family](33, 300, 27, generator)
    layer = prepacked(b.mT.contiguous(), precision=precision)
    reads.clear()
    got = product(layer, a)
    assert reads == [True]
    if family == "Inf and NaN":
        assert_same_specials(got, exact(a, b).float())
        rows, columns = exact(a, b).isfinite().all(1), exact(a, b).isfinite().all(0)
        rows, columns = torch.arange(33) % 33 != 0, torch.arange(27) != 0
        rows[33 // 2] = False
        a, b, got = a[rows], b[:, columns], got[rows][:, columns]
    assert_accurate(got, a, b, precision)


@kernels
@pytest.mark.parametrize("precision", ["tf32", "fp32"])
@pytest.mark.parametrize("case", specials(5, 5, 5))
def test_inf_and_nan(case, precision, device, copies_win) -> None:
    a, b = (t.to(device) for t in specials(9, 300, 7)[case])
    layer = prepacked(b.mT.contiguous(), precision=precision)
    assert_same_specials(product(layer, a), exact(a, b).float())


def scales(decades: float, k: int) -> torch.Tensor:
    return 10.0 ** torch.linspace(-decades, decades, k)[torch.randperm(k)]


@kernels
@pytest.mark.parametrize("precision", ["tf32", "fp32"])
@pytest.mark.parametrize("decades", [4, 8, 12, 17])
@pytest.mark.parametrize("of_x", [-1, 0, 1])
def test_scaling_along_k(of_x, decades, precision, device, copies_win) -> None:
    """Whatever x's columns are scaled by: inversely to the weight's, not at all, or alike."""
    k = 128
    scale = scales(decades, k)
    a, weight = torch.randn(9, k) * scale**of_x, torch.randn(7, k) * scale
    layer = prepacked(weight.to(device), precision=precision)
    assert_accurate(product(layer, a.to(device)), a, weight.mT, precision)


@kernels
@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_columns_that_no_row_uses(precision, device, copies_win) -> None:
    """An outlier of x that the weight multiplies by zero does not set its row's scale."""
    a, weight = torch.randn(9, 128), torch.randn(7, 128)
    a[:, 5], weight[:, 5] = 1e20, 0.0
    layer = prepacked(weight.to(device), precision=precision)
    got = product(layer, a.to(device))
    a[:, 5] = 0
    assert_accurate(got, a, weight.mT, precision)


@kernels
def test_what_differs_from_the_plain_op(device, copies_win) -> None:
    """Pins a statement of the documentation: half of the weight's rows scaled against x.

    A factor of the weight errs by 2**-38 of its row's largest, which x's factor there multiplies.
    """
    k = 128
    scale = scales(8, k)
    a = torch.randn(9, k) * scale
    weight = torch.randn(8, k) / torch.cat([scale.expand(4, k), torch.ones(4, k)])
    layer = prepacked(weight.to(device), precision="fp32")
    difference = (product(layer, a.to(device)).cpu().double() - exact(a, weight.mT)).abs()
    products = a.double().abs() @ weight.double().abs().mT
    largest = a.abs().amax(1, keepdim=True).double() * weight.abs().amax(1).double()
    assert (difference <= 2.0**-20 * products + 2 * k * 2.0**-38 * largest).all()
    assert (difference[:, :4] > 2.0**-20 * products[:, :4]).any(), "no stricter than the truth"


def test_exponents() -> None:
    from fastmm_op.kept_weight import column_exponents

    weight = torch.randn(64, 40)
    assert not column_exponents(weight).any(), "ordinary weights move nothing"
    rows = 2.0 ** torch.arange(-32, 32)[:, None]
    assert not column_exponents(weight * rows).any(), "nor do rows of very different size"
    one_row = weight.clone()
    one_row[3, 7] = 1e9
    assert not column_exponents(one_row).any(), "nor one row of a shape of its own"
    moved = torch.zeros(40, dtype=torch.int32)
    moved[::2] = torch.arange(-90, -70, dtype=torch.int32)
    found = column_exponents(torch.full((64, 40), 1.5) * 2.0**moved * rows)
    assert torch.equal(found, moved)
    odd = torch.ones(3, 4)
    odd[:, 1], odd[:, 2], odd[:2, 3] = 0.0, torch.nan, torch.inf
    assert column_exponents(odd).tolist() == [0, -120, -120, 0]
    assert column_exponents(torch.zeros(3, 2)).tolist() == [-120, -120]
    assert column_exponents(torch.full((3, 2), 1e-45)).tolist() == [0, 0]


# When a copy is read, and when not.


@kernels
def test_report(device, copies_win) -> None:
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, 20), nn.Bilinear(4, 4, 4)).to(device)
    model.append(nn.Linear(K, N, bias=False).to(device))
    model[3].weight = model[0].weight
    model.append(nn.Linear(K, N).double().to(device))
    report = fastmm_op.prepack(model, precision="tf32")
    assert set(report.kept_bytes) >= {"0", "3"}
    assert report.kept_bytes["3"] == 0, "one weight, one copy"
    assert model[0].fastmm_kept is model[3].fastmm_kept
    kept = model[0].fastmm_kept.packed
    assert report.kept_bytes["0"] == kept.numel()
    # fp16, rows padded from 33 elements to 128 and from 37 to the widest tile's 256, exponents.
    assert 37 * 128 * 2 <= kept.numel() <= 256 * 128 * 2 + 4 * (37 + 2 * 33) + 2048
    assert report.total_bytes == sum(report.kept_bytes.values())
    assert report.weight_bytes["0"] == 4 * N * K
    assert report.left_alone["4"] == "torch.float64 is not multiplied by fastmm's kernels"
    text = str(report)
    assert "MiB kept beside" in text
    assert "  3: another module's copy beside 0.0 MiB" in text
    assert "  4 left alone: torch.float64 is not multiplied by" in text
    assert "fastmm precision='tf32', prepacked" in repr(model[0])


@kernels
@pytest.mark.parametrize(
    ("make", "precision", "why"),
    [
        (lambda: nn.Linear(K, N), "ieee", 'nothing is packed for "ieee"'),
        (lambda: nn.Linear(12, 20), "tf32", "no plan would read a copy"),
        (lambda: nn.Linear(0, 20), "tf32", "its weight is empty"),
        (lambda: nn.Linear(K, 1), "tf32", "no plan would read a copy"),
        (lambda: nn.Linear(128, 1024).half(), "tf32", "no plan would read a copy"),
        (lambda: nn.Linear(130, 300, device="meta"), "tf32", "its weight is on the device meta"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")
def test_nothing_is_kept(make, precision, why, device) -> None:
    layer = make()
    layer = layer if layer.weight.is_meta else layer.to(device)
    report = fastmm_op.prepack(layer, precision=precision)
    assert report.kept_bytes == {}
    assert report.left_alone[""].startswith(why)
    assert layer.fastmm_kept is None
    assert isinstance(layer, fastmm_op.patching.PatchedLinear), "patched all the same"


def test_without_kernels(device) -> None:
    """On a machine whose CPU multiplies by ATen: said, and computed as patched."""
    layer = nn.Linear(K, N)
    want = layer(torch.ones(3, K))
    report = fastmm_op.prepack(layer)
    if fastmm_op.ops.INTERPRETED:
        pytest.skip("kernels are interpreted here")
    assert next(iter(report.left_alone.values())) in (
        "ATen multiplies on the CPU",
        "there is no Triton here",
    )
    torch.testing.assert_close(layer(torch.ones(3, K)), want)


@kernels
def test_inference_tensors_are_not_kept(device, copies_win) -> None:
    with torch.inference_mode():
        layer = nn.Linear(K, N).to(device)
        report = fastmm_op.prepack(layer, precision="tf32")
    assert "inference tensor" in report.left_alone[""]


@kernels
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference(mode, layer, x, reads) -> None:
    with mode():
        layer(x)
    assert reads == [True]
    with mode():
        fastmm_op.prepack(layer, precision="tf32")
    check(layer, x)
    assert reads == [True, True], "a copy that was made in inference mode serves outside"


@kernels
def test_gradients_are_those_of_a_patched_model(layer, x, reads) -> None:
    plain = copy.deepcopy(layer)
    for needs_x in (False, True):
        for module in (plain, layer):
            module.zero_grad()
            module(x.requires_grad_(needs_x)).square().sum().backward()
        assert torch.equal(layer.weight.grad, plain.weight.grad)
    assert not any(reads)
    layer.requires_grad_(False)
    layer(x.detach())
    assert reads[-1], "nothing requires a gradient"
    layer(x).sum().backward()
    assert not reads[-1]


@kernels
def test_one_row_is_read_from_the_weight(layer, x, reads) -> None:
    for one in (x[:1], x[0]):
        assert_accurate(product(layer, one) - layer.bias.detach(), one, layer.weight.detach().mT)
    assert reads == [False, False]


@kernels
def test_the_plain_op_where_it_is_faster(layer, x, reads, monkeypatch) -> None:
    from fastmm_op import launch_kept

    make_plan = launch_kept.make_plan
    monkeypatch.setattr(
        launch_kept, "make_plan", lambda problem: replace(make_plan(problem), seconds=-9.0)
    )
    check(layer, x)
    assert reads == [False]


@kernels
def test_precision(device, copies_win, x, reads) -> None:
    """Packed for one precision, and not used in another."""
    layer = nn.Linear(K, N).to(device)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    fastmm_op.prepack(layer)
    product(layer, x)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    product(layer, x)
    assert reads == [True, False]


@kernels
def test_autocast_and_transforms(layer, x, reads) -> None:
    with torch.autocast(x.device.type, torch.bfloat16):
        assert product(layer, x).dtype is torch.bfloat16
    got = torch.func.vmap(lambda row: product(layer, row))(x)
    torch.testing.assert_close(got, product(layer, x), rtol=2e-3, atol=2e-3)
    tangent = torch.func.jvp(layer, (x,), (x,))[1]
    assert_accurate(tangent.detach(), x, layer.weight.detach().mT)

    assert reads.count(True) == 1, "the product that is neither"


# A copy that is old.


def in_place(layer) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def in_inference_mode(layer) -> None:
    with torch.inference_mode():
        layer.weight.mul_(2)


def by_optimizer(layer) -> None:
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=1.0).step()


def loaded(layer) -> None:
    state = layer.state_dict()
    layer.load_state_dict({name: 3 * value for name, value in state.items()})


def replaced(layer) -> None:
    layer.weight = nn.Parameter(2 * layer.weight.detach())


def by_data(layer) -> None:
    layer.weight.data = 2 * layer.weight.data


def cast_and_back(layer) -> None:
    layer.half().float()


def parametrized(layer) -> None:
    nn.utils.parametrizations.weight_norm(layer)
    layer.parametrizations.weight.original0.data.mul_(2)


CHANGES = [
    in_place,
    in_inference_mode,
    by_optimizer,
    loaded,
    replaced,
    by_data,
    cast_and_back,
    parametrized,
]


@kernels
@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_an_old_copy_is_not_used(change, layer, x, reads) -> None:
    check(layer, x)
    change(layer)
    check(layer, x)
    assert reads == [True, False]
    if change is not parametrized:
        fastmm_op.prepack(layer, precision="tf32")
        check(layer, x)
        assert reads[2], "packed again"


@kernels
def test_many_changes_of_data_in_turn(layer, x, reads) -> None:
    """The old weight's memory is held, so no other weight takes its place at its address."""
    for i in range(4):
        layer.weight.data = torch.full_like(layer.weight, float(i))
        check(layer, x)
    assert not any(reads)


@kernels
def test_moving_to_where_it_is_keeps_the_copy(layer, x, reads) -> None:
    layer.to(x.device).float().eval().requires_grad_(False)
    check(layer, x)
    assert reads == [True]
    layer.double()
    assert layer.fastmm_kept is None, "memory is freed"


@kernels
def test_copies_and_pickles(layer, x, reads) -> None:
    keys = list(layer.state_dict())
    assert keys == ["weight", "bias"]
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    pickled = pickle.loads(pickle.dumps(layer))
    assert len(pickle.dumps(layer)) < 4 * N * K + 8192, "no copy in it"
    for other in (copy.deepcopy(layer), pickled, torch.load(buffer, weights_only=False)):
        assert other.fastmm_kept is None
        in_place(other)
        check(other, x)
        assert not reads.pop()
    check(layer, x)
    assert reads == [True], "the model itself has it still"


@kernels
@pytest.mark.parametrize("undo", [fastmm_op.patch, fastmm_op.unpatch])
def test_undone(undo, layer, x, reads) -> None:
    undo(layer)
    assert "fastmm_kept" not in vars(layer)
    product(layer, x)
    assert not any(reads)
    if undo is fastmm_op.unpatch:
        assert type(layer) is nn.Linear
        assert not any(name.startswith("fastmm") for name in vars(layer))


# Compilers.


@kernels
@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [("aot_eager", True), ("inductor", False), ("fastmm", False)],
)
def test_compiled(backend, dynamic, layer, x, reads) -> None:
    backend = graphs if backend == "fastmm" else backend
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=dynamic)
    got = product(compiled, x)
    assert torch.equal(got, product(layer, x))
    assert reads == [True, True]
    for _ in range(3):
        reads.clear()
        in_place(layer)
        assert torch.equal(product(compiled, x), product(layer, x))
        fastmm_op.prepack(layer, precision="tf32")
        assert torch.equal(product(compiled, x), product(layer, x))
        assert reads == [False, False, True, True], "an old copy is found out at run time"
    compiled(x).sum().backward()
    assert not reads[4]


@kernels
def test_exported_programs_are_those_of_a_patched_model(layer, x) -> None:
    for strict in (False, True):
        with torch.no_grad():
            program = torch.export.export(layer, (x,), strict=strict)
        targets = [n.target for n in program.graph.nodes]
        assert torch.ops.fastmm.linear.default in targets
        assert linear_prepacked not in targets


@kernels
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, layer, x) -> None:
    kept = layer.fastmm_kept
    weight = layer.weight.detach().requires_grad_(requires_grad)
    args = (x, weight, weight.detach(), kept.packed, layer.bias.detach())
    torch.library.opcheck(
        linear_prepacked,
        args,
        {"version": weight._version, "precision": "tf32"},
        rtol=1e-2,
        atol=1e-2,
    )


@kernels
def test_gradients_of_the_op(layer, x) -> None:
    kept, x = layer.fastmm_kept, x.requires_grad_()
    leaves = (x, layer.weight, layer.bias)
    got = linear_prepacked(
        x,
        layer.weight,
        kept.source,
        kept.packed,
        layer.bias,
        version=kept.version,
        precision="tf32",
    )
    want = torch.ops.fastmm.linear(x, layer.weight, layer.bias, precision="tf32")
    grad = torch.randn_like(got)
    pairs = zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
    )
    for mine, expected in pairs:
        assert torch.equal(mine, expected)


@kernels
@pytest.mark.parametrize("mapped", [0, 1])
def test_vmap_of_the_op(mapped, layer, x) -> None:
    kept = layer.fastmm_kept

    def f(x, bias):
        return linear_prepacked(
            x, layer.weight, kept.source, kept.packed, bias, version=kept.version, precision="tf32"
        )

    with torch.no_grad():
        many = torch.stack([x, 2 * x]), torch.stack([layer.bias, -layer.bias])
        dims = (0, 0) if mapped else (0, None)
        args = many if mapped else (many[0], layer.bias)
        got = torch.func.vmap(f, dims)(*args)
        for i in range(2):
            want = f(many[0][i], many[1][i] if mapped else layer.bias)
            torch.testing.assert_close(got[i], want, rtol=2e-3, atol=2e-3)


@kernels
@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (lambda p: p[1:], "packed must be"),
        (lambda p: p.float(), "packed must be"),
        (lambda p: p.new_empty(2 * len(p))[::2], "packed must be"),
    ],
)
def test_something_else_for_a_copy(packed, message, layer, x) -> None:
    from fastmm_op import launch

    launch._calls.clear()
    kept = layer.fastmm_kept
    how = {"version": kept.version, "precision": "tf32"}
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        linear_prepacked(x, layer.weight, kept.source, packed(kept.packed), None, **how)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        fastmm_op.prepack([])
    with pytest.raises(ValueError, match="precision must be one of"):
        fastmm_op.prepack(nn.Linear(2, 2), precision="fp8")
    assert prepacking.Prepacked({}, {}, {}).total_bytes == 0
    assert replace(prepacking.Prepacked({}, {}, {}), left_alone={"a": "b"}).left_alone == {"a": "b"}
