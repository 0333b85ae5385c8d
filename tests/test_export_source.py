"""The parts of ``export``: arithmetic that can be printed, and kernels as text."""

import ast

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmm_op import kernel_source
from fastmm_op.formula import Formula
from fastmm_op.problem import cdiv, round_up

OPERATIONS = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "//": lambda x, y: x // y,
    "%": lambda x, y: x % y,
    "cdiv": cdiv,
    "round_up": round_up,
}


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.dictionaries(st.sampled_from("xyz"), st.integers(-50, 50), min_size=3),
    st.dictionaries(st.sampled_from("xyz"), st.integers(-50, 50), min_size=3),
    st.lists(
        st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 20), st.integers(0, 20)),
        max_size=12,
    ),
    st.lists(st.integers(-3, 9), min_size=2),
)
def test_formulas_print_what_they_compute(values, others, program, constants) -> None:
    """Any arithmetic on them; the text holds for other values of the variables too."""
    terms = [Formula.named(name, value) for name, value in values.items()] + constants
    plain = [others[name] for name in values] + constants
    for operation, i, j in program:
        i, j = i % len(terms), j % len(terms)
        if operation in ("//", "%", "cdiv", "round_up") and 0 in (terms[j], plain[j]):
            continue
        terms.append(OPERATIONS[operation](terms[i], terms[j]))
        plain.append(OPERATIONS[operation](plain[i], plain[j]))

    class triton:
        cdiv = staticmethod(cdiv)

    for term, other in zip(terms, plain, strict=True):
        if isinstance(term, Formula):
            text = ast.unparse(term.node)
            assert eval(text, {"triton": triton} | values) == term
            assert eval(text, {"triton": triton} | others) == other


def test_formulas_read_well() -> None:
    m, k = Formula.named("M", 7), Formula.named("K", 9)
    texts = {
        "triton.cdiv(M, 4)": cdiv(m, 4),
        "M": cdiv(1 * (m + 0), 1),
        "triton.cdiv(K, 64) * 64": round_up(k, 64),
        "(M + 128) * (triton.cdiv(K, 64) * 64)": (m + 0 + 128) * round_up(k, 64),
        "32 * (M * K)": 32 * (m * k),
    }
    for text, formula in texts.items():
        assert ast.unparse(formula.node) == text


def test_plans_name_kernels_as_the_sources_do() -> None:
    running = pytest.importorskip("fastmm_op.running")
    for name, kernel in running.KERNELS.items():
        assert kernel_source.find_kernel(name).name == kernel.fn.__name__
    with pytest.raises(LookupError, match="no nothing_kernel in"):
        kernel_source.find_kernel("nothing")


def test_gluon_kernels_are_no_plain_triton() -> None:
    with pytest.raises(LookupError, match=r"gemm_hopper\.py uses '\w+', which a file of plain"):
        kernel_source.with_dependencies([kernel_source.find_kernel("gemm_hopper")])


@pytest.fixture
def kernel_folder(tmp_path, monkeypatch):
    """Kernel modules of a test's own."""
    monkeypatch.setattr(kernel_source, "FOLDER", tmp_path)
    kernel_source.read_module.cache_clear()

    def write(**modules: str) -> None:
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)

    yield write
    kernel_source.read_module.cache_clear()


USER = """
from fastmm_op.kernels.low import help

TWO = 2

@jit
def other_helper(x):
    return help(x)

# Why.
# And why.
@jit
def a_kernel(x):
    y = other_helper(x) + TWO
    return y
"""
LOW = """
ONE = 1

@jit
def unused(x):
    return x

@jit
def help(x):
    return x + ONE
"""


def test_dependencies_come_first(kernel_folder) -> None:
    kernel_folder(user=USER.replace("@jit\n", ""), low=LOW.replace("@jit\n", ""))
    found = kernel_source.with_dependencies([kernel_source.find_kernel("a")])
    assert [x.name for x in found] == ["ONE", "help", "TWO", "other_helper", "a_kernel"]
    assert found[-1].text.startswith("# Why.\n# And why.\ndef a_kernel(x):")
    assert [p.arg for p in found[-1].parameters] == ["x"]


def test_one_name_for_two_things(kernel_folder) -> None:
    text = LOW.replace("@jit\n", "")
    kernel_folder(user=USER.replace("@jit\n", "").replace("TWO", "ONE"), low=text)
    with pytest.raises(LookupError, match="'ONE' is not the same in low and user"):
        kernel_source.with_dependencies([kernel_source.find_kernel("a")])
