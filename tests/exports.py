"""The files that the tests of ``export`` write: a product each, and how it is computed."""

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cases import DTYPES, LAYOUTS
from fastmm_op.arch import ARCHES
from fastmm_op.choices import choices
from fastmm_op.estimate import estimate
from fastmm_op.export import export, exported_choice, exported_problem
from fastmm_op.launches import Plan
from fastmm_op.plan import write_plan
from fastmm_op.problem import Problem, problem_of, round_up
from fastmm_op.tiles import Choice

SEED = (8205, 2949, 5921)


@dataclass(frozen=True)
class Case:
    """A file to export: the product, and if not the model's favourite, what is packed and split."""

    shape: tuple[int, int, int]
    dtype: str = "fp32"
    precision: str = "tf32"
    arch: str = "sm_89"
    layout: str = "NN"
    pack: tuple[bool, bool] | None = None
    split: int = 1

    @property
    def problem(self) -> Problem:
        how = {"dtype": self.dtype, "layout": self.layout, "precision": self.precision}
        return problem_of(*self.shape, batch=1, **how, arch=ARCHES[self.arch])

    @cached_property
    def choice(self) -> Choice:
        problem = exported_problem(self.problem)
        if self.pack is None:
            return exported_choice(problem)
        road = [
            choice
            for choice in choices(problem)
            if (choice.pack_a, choice.pack_b) == self.pack
            and (choice.split, choice.slabs, choice.b_classes) == (self.split, 1, 1)
        ]
        return min(road, key=lambda choice: estimate(problem, choice))

    @cached_property
    def plan(self) -> Plan:
        return self.plan_for(self.problem)

    def plan_for(self, problem: Problem) -> Plan:
        """The file's choice written out for a problem of its kind."""
        return write_plan(exported_problem(problem), self.choice)

    @cached_property
    def text(self) -> str:
        return export(self.problem, "the command", "0", self.choice)

    def operands(self, m: int, k: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        a = LAYOUTS[self.layout[0]](torch.randn(m, k, dtype=DTYPES[self.dtype]))
        return a, LAYOUTS[self.layout[1]](torch.randn(k, n, dtype=DTYPES[self.dtype]))


# Small ones, and between them every kernel in every role: read once or twice, split or not.
CASES = {
    "direct": Case((33, 130, 65)),
    "direct, aligned": Case((64, 128, 96)),
    "direct, columns aligned": Case((64, 128, 96), "fp16", layout="TT"),
    "direct, fp32": Case((40, 70, 24), precision="fp32"),
    "direct, ieee": Case((40, 70, 24), precision="ieee", arch="sm_90"),
    "direct, split": Case((40, 300, 24), "bf16", pack=(False, False), split=2),
    "packed in one read": Case((70, 200, 90), pack=(True, True)),
    "packed in one read, NT": Case((70, 200, 90), arch="sm_90", layout="NT", pack=(True, True)),
    "packed in two reads": Case((17, 1100, 24), precision="fp32", layout="TN", pack=(True, True)),
    "packed, split": Case((17, 1100, 24), arch="sm_80", pack=(True, True), split=4),
    "packed, hi and lo": Case((70, 200, 90), precision="fp32", pack=(True, True)),
    "packed, hi and lo, split": Case(
        (17, 1100, 24), precision="fp32", arch="sm_90", layout="TN", pack=(True, True), split=2
    ),
    "packed, bf16": Case((70, 201, 91), "bf16", pack=(True, True)),
    "packed, fp16, split": Case((33, 601, 41), "fp16", layout="TT", pack=(True, True), split=2),
    "mixed": Case((64, 64, 65), "bf16", pack=(False, True)),
    "mixed, split": Case((65, 600, 64), "fp16", layout="TN", pack=(True, False), split=2),
    "one row": Case((1, 300, 37)),
    "one column": Case((37, 300, 1), "fp16", layout="TN"),
    "one row, split": Case((1, 600, 37), pack=(False, False), split=2),
    "one element": Case((1, 1, 1)),
    "K of one": Case((5, 1, 3)),
}
# The seed workload's own files.
SEEDS = {
    f"seed, {dtype}, {precision}, {arch}": Case(SEED, dtype, precision, arch)
    for arch in ARCHES
    for dtype, precision in [
        ("fp32", "tf32"),
        ("fp32", "fp32"),
        ("fp32", "ieee"),
        ("fp16", "tf32"),
        ("bf16", "tf32"),
    ]
}
ALL = CASES | SEEDS
every_case = pytest.mark.parametrize("case", ALL.values(), ids=ALL.keys())


def load(text: str, folder: Path) -> ModuleType:
    """An exported file as a module: Triton reads its kernels from the file."""
    path = folder / "model_new.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("model_new", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def other_shapes(case: Case) -> list[tuple[int, int, int]]:
    """The case's own shape, and another one that its constants must be right for."""
    m, k, n = case.shape
    gemm = next((s.constexprs for s in case.plan.launches if s.kernel == "gemm"), None)
    if gemm is None:  # one wide
        return [case.shape, (2 * m - 1, k + 5, 2 * n - 1)]
    steps = max(gemm["A_ALIGN"], gemm["B_ALIGN"])
    whole_blocks = gemm["EVEN_K"] and gemm["CLAMP"]
    deeper = 1 if k == 1 else k + (gemm["BLOCK_K"] if whole_blocks else 7 * gemm["TAIL_RUN"])
    return [case.shape, (m + steps, deeper, max(2, round_up(n // 2, steps)))]
