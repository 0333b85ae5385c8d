"""On a real Hopper card: a misaligned A that is read as it is, by classes of its rows.

test_classes.py shows that the right elements are multiplied; here is that the hardware does it.
"""

import pytest
import torch

import fastmm_op
from cases import DTYPES, INF, NAN
from fastmm_op.choices import choices
from fastmm_op.partition import a_classes
from fastmm_op.plan import make_plan, write_plan
from fastmm_op.problem import Epilogue, Problem
from fastmm_op.tiles import Choice
from linear_oracle import assert_linear
from oracle import assert_accurate, assert_same_specials, exact

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]

PLAIN = Epilogue()
# M, K, N, A's pitch: K below and above whole blocks, rows that fill their tiles and others, fewer
# tiles than SMs and more.
SIZES = {
    "one block": (1024, 57, 264, 57),
    "a block and the lead": (1029, 61, 8, 61),
    "blocks of 64": (1025, 192, 72, 193),
    "just above": (1031, 129, 264, 129),
    "just below": (2050, 383, 520, 383),
    "short rows far apart": (1030, 3, 136, 1001),
    "4 classes": (515, 1034, 264, 1034),
    "4 classes, K of whole blocks": (700, 512, 264, 514),
    "2 classes": (257, 260, 136, 260),
    "2 classes, a gap between rows": (384, 640, 264, 644),
    "a wave and more": (4099, 1031, 1544, 1031),
}


def surrounded_by_nan(rows: torch.Tensor, pitch: int) -> torch.Tensor:
    """A view (1, M, K) of the same rows, ``pitch`` apart, with NaN before, between and after."""
    m, k = rows.shape
    memory = rows.new_full((64 + m * pitch + 64,), torch.nan)
    view = memory[64:].as_strided((1, m, k), (m * pitch, pitch, 1))
    return view.copy_(rows)


def inputs(name: str, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    m, k, n, pitch = SIZES[name]
    a = torch.randn(m, k, device="cuda", dtype=DTYPES[dtype])
    return surrounded_by_nan(a, pitch), torch.randn(1, k, n, device="cuda", dtype=a.dtype)


def ways(
    a: torch.Tensor, b: torch.Tensor, epilogue: Epilogue = PLAIN
) -> list[tuple[Problem, Choice]]:
    """The problem, and its choices that read A by classes: few of those that share K."""
    from fastmm_op import launch

    arch = launch.device_arch(torch.cuda.current_device())
    problem = launch.describe(a, b, "tf32", arch, epilogue)
    found = [c for c in choices(problem) if a_classes(problem, c) > 1]
    found = [c for c in found if c.split in (1, 2, 4) and c.tail_split in (1, 2, 3)]
    assert {c.tile.block_n for c in found} == {64, 128, 256}
    return [(problem, choice) for choice in found]


def run(problem: Problem, choice: Choice, a, b, bias=None, residual=None) -> torch.Tensor:
    """C, written over NaN."""
    from fastmm_op import running

    out = torch.full((1, problem.M, problem.N), torch.nan).to(a)
    running.run_plan(write_plan(problem, choice), a, b, out, bias, residual)
    return out


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", SIZES)
def test_products(name, dtype) -> None:
    a, b = inputs(name, dtype)
    for problem, choice in ways(a, b):
        first = run(problem, choice, a, b)
        assert_accurate(first, a, b, what=str(choice))
        assert torch.equal(first, run(problem, choice, a, b)), f"other bits again: {choice}"


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", SIZES)
def test_small_integers_are_exact(name, dtype) -> None:
    """To the last bit: every element of A has met its own of B."""
    a, b = inputs(name, dtype)
    a.copy_(torch.randint_like(a, -2, 3))
    b.copy_(torch.randint_like(b, -1, 2) * (torch.rand_like(b) < 0.2))
    want = exact(a, b)
    assert want.abs().max() <= 256, "bf16 holds these"
    for problem, choice in ways(a, b):
        assert torch.equal(run(problem, choice, a, b).cpu().double(), want), choice


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", SIZES)
def test_inf_and_nan_stay_in_their_rows(name, dtype) -> None:
    """At both ends of rows, whose neighbours TMA reads with them; and beside zeros of B."""
    a, b = inputs(name, dtype)
    b[0, 0, ::3] = 0.0
    b[0, -1, 1::3] = -0.0
    for row, first, last in ((0, INF, -INF), (9, NAN, 1.0), (130, 1.0, NAN), (-1, -INF, INF)):
        a[0, row, 0], a[0, row, -1] = first, last
    a[0, 64, -1] = INF
    a[0, 40] = -0.0
    want = exact(a, b).to(a.dtype)
    for problem, choice in ways(a, b):
        assert_same_specials(run(problem, choice, a, b), want, what=str(choice))


@pytest.mark.parametrize(
    "epilogue", [Epilogue(bias=True, activation="gelu"), Epilogue(residual=True)], ids=str
)
def test_epilogues(epilogue) -> None:
    a, b = inputs("just below", "bf16")
    b /= b.shape[1] ** 0.5
    bias = torch.randn(b.shape[2]).to(b) if epilogue.bias else None
    residual = torch.randn(a.shape[1], b.shape[2]).to(b) if epilogue.residual else None
    for problem, choice in ways(a, b, epilogue):
        got = run(problem, choice, a, b, bias, residual)[0]
        assert_linear(got, a[0], b[0].mT, bias, epilogue.activation, residual, what=str(choice))


def test_the_op_takes_it() -> None:
    """Through the remembered call too, whose addresses are filled in anew."""
    from fastmm_op import launch

    for _ in range(3):
        a = torch.randn(8192, 8191, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(8191, 256, device="cuda", dtype=torch.bfloat16)
        arch = launch.device_arch(torch.cuda.current_device())
        problem = launch.describe(a[None], b[None], "tf32", arch)
        assert a_classes(problem, make_plan(problem).choice) == 8
        assert_accurate(fastmm_op.matmul(a, b), a, b)
