"""suite.json -> cases: what is multiplied, in which layout, dtype and precision."""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastmm_op.arch import Arch
from fastmm_op.problem import Problem, problem_of

SUITE = Path(__file__).with_name("suite.json")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Case:
    """One product c = a @ b of the suite.

    Attributes:
        group: the part of the suite.
        M, K, N: a is (M, K), b is (K, N).
        dtype: of a, b and c: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        precision: what it is computed in: ``"tf32"``, ``"fp32"`` or ``"ieee"`` for fp32, otherwise
            the dtype's own name. Results are compared within one precision.
        layout: a letter for a and one for b; N is row-major, T a transposed view.
        batch: more than 1: a is (batch, M, K) and b is (batch, K, N).
        fold: a is (*fold, K) with M = product of fold, b is (K, N).
    """

    group: str
    M: int
    K: int
    N: int
    dtype: str
    precision: str
    layout: str = "NN"
    batch: int = 1
    fold: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        items = f"b{self.batch}x" if self.batch > 1 else ""
        kind = f"fp32-{self.precision}" if self.dtype == "fp32" else self.dtype
        fold = "-fold" if self.fold else ""
        return f"{self.group}/{items}{self.M}x{self.K}x{self.N}-{self.layout}-{kind}{fold}"

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.M * self.K * self.N

    @property
    def bytes(self) -> int:
        """Traffic that nobody avoids: both inputs read once, the output written once."""
        elements = self.M * self.K + self.K * self.N + self.M * self.N
        return self.batch * elements * ITEMSIZE[self.dtype]

    def problem(self, arch: Arch) -> Problem:
        """The case as the planner sees it on a card."""
        return problem_of(
            self.M,
            self.K,
            self.N,
            batch=self.batch,
            dtype=self.dtype,
            layout=self.layout,
            precision=self.precision if self.dtype == "fp32" else "tf32",
            arch=arch,
        )

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Standard normal a and b; the same values each time, others for each case."""
        generator = torch.Generator(device).manual_seed(zlib.crc32(self.name.encode()))

        def matrix(rows: int, columns: int, letter: str) -> Tensor:
            items = (self.batch,) if self.batch > 1 else ()
            stored = (*items, columns, rows) if letter == "T" else (*items, rows, columns)
            values = torch.randn(
                stored, dtype=DTYPES[self.dtype], device=device, generator=generator
            )
            return values.mT if letter == "T" else values

        a = matrix(self.M, self.K, self.layout[0])
        b = matrix(self.K, self.N, self.layout[1])
        return (a.reshape(*self.fold, self.K) if self.fold else a), b


def load_cases(path: Path = SUITE, precision: str = "tf32") -> list[Case]:
    """All cases of a suite file, the seed first; fp32 ones in ``precision``."""
    suite = json.loads(Path(path).read_text())
    return list(expand(suite, precision))


def expand(suite: dict, precision: str) -> Iterator[Case]:
    def cases(group: str, dtypes: list[str], **sizes) -> Iterator[Case]:
        for dtype in dtypes:
            yield Case(
                group, dtype=dtype, precision=precision if dtype == "fp32" else dtype, **sizes
            )

    level1 = [(is_seed(entry), sizes_of(entry)) for entry in suite["kernelbench_level1_fp32"]]
    for seed, sizes in level1:
        if seed:
            yield from cases("seed", ["fp32", "bf16", "fp16"], **sizes)
    for seed, sizes in level1:
        if not seed:
            yield from cases("kernelbench", ["fp32", "bf16"], **sizes)
    for entry in suite["gpt2_vocab"]:
        yield from cases("gpt2_vocab", ["bf16", "fp32"], **sizes_of(entry))
    for n in suite["aligned_squares"]["n"]:
        yield from cases("squares", suite["aligned_squares"]["dtypes"], M=n, K=n, N=n)
    sweep = suite["odd_sweep"]
    for n in sweep["N"]:
        yield from cases("odd_sweep", sweep["dtypes"], M=sweep["M"], K=sweep["K"], N=n)
    skinny = suite["skinny"]
    for k, n in skinny["KN"]:
        for layout in skinny["layout"]:
            for m in skinny["M"]:
                yield from cases("skinny", skinny["dtypes"], M=m, K=k, N=n, layout=layout)
    rows = suite["odd_rows"]
    for m in rows["M"]:
        sizes = {"M": m, "K": rows["K"], "N": rows["N"], "layout": rows["layout"]}
        yield from cases("odd_rows", rows["dtypes"], **sizes)


def is_seed(entry: dict) -> bool:
    return bool(entry.get("seed"))


def sizes_of(entry: dict) -> dict:
    """The fields of a suite entry that a Case takes."""
    sizes = {name: entry[name] for name in ("M", "K", "N", "layout", "batch") if name in entry}
    return sizes | ({"fold": tuple(entry["fold"])} if "fold" in entry else {})


def groups(cases: list[Case]) -> list[str]:
    """The groups of some cases, in order."""
    return list(dict.fromkeys(case.group for case in cases))
