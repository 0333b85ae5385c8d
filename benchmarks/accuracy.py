"""Measure accuracy against float64: ours in every precision, beside torch's fp32 and TF32.

    python benchmarks/accuracy.py [--size M N] [--k K ...] [--packed] [--out FOLDER]

For each family of numbers, K and layout: the normwise error ||C - C64|| / ||C64||, and the worst
scaled error of an element, |C - C64| / (|A| |B|). Writes accuracy.json, accuracy.md and
accuracy.png. Exit code 1 if a promise was broken: an error beyond that of ``oracle.PROMISE``
times torch's (or of what rounding costs), or Inf and NaN elsewhere than IEEE arithmetic puts them.

Without a GPU kernels are interpreted (TRITON_INTERPRET=1), torch's TF32 is exact sums of correctly
rounded operands, and sizes should be small.
"""

import argparse
import json
import os
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

from rich.progress import track
from torch import Tensor

import fastmm_op
from benchmarks.families import FAMILIES
from fastmm_op.bench import environment
from fastmm_op.choices import choices
from fastmm_op.estimate import estimate
from fastmm_op.oracle import PROMISE, ROUNDOFF, round_to_tf32
from fastmm_op.plan import write_plan
from fastmm_op.timing import torch_tf32

LAYOUTS = ("NN", "NT", "TN", "TT")
OURS = ("tf32", "fp32", "ieee")
# What each of ours is held against, the largest of them: under its TF32 setting torch may compute
# in fp32 all the same (an H200 does for some K), and then loses less than rounding costs.
YARDSTICK = {
    "tf32": ("torch TF32", "rounded to TF32"),
    "fp32": ("torch fp32",),
    "ieee": ("torch fp32",),
}
# fp32 sums of exact operands: what nobody can be asked to be below.
FLOOR = 2 * ROUNDOFF["fp32"]
# float64 products are made of so many rows at a time, to bound memory.
ORACLE_ROWS = 1024


def rounded_to_tf32(a: Tensor, b: Tensor) -> Tensor:
    """Exact sums of correctly rounded operands."""
    return exact_product(round_to_tf32(a), round_to_tf32(b)).float()


def torch_in_tf32(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda:
        with torch_tf32(True):
            return a @ b
    return rounded_to_tf32(a, b)


def torch_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    with torch_tf32(False):
        return a @ b


def packed(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """Ours by the best plan that packs, where one is legal, though another may be faster."""
    from fastmm_op import launch, running

    arch = launch.device_arch(a.get_device())
    problem = launch.describe(a.unsqueeze(0), b.unsqueeze(0), precision, arch)
    legal = [choice for choice in choices(problem) if choice.pack_a and choice.pack_b]
    if launch.INTERPRETED:
        legal = [choice for choice in legal if choice.tile.kernel != "gemm_hopper"]
    if not legal:
        return fastmm_op.matmul(a, b, precision=precision)
    plan = write_plan(problem, min(legal, key=lambda choice: estimate(problem, choice)))
    out = a.new_full((a.shape[0], b.shape[1]), torch.nan)
    running.run_plan(plan, a.unsqueeze(0), b.unsqueeze(0), out)
    return out


def contenders(always_pack: bool) -> dict:
    def ours(precision: str):
        if always_pack and precision != "ieee":
            return lambda a, b: packed(a, b, precision)
        return lambda a, b: fastmm_op.matmul(a, b, precision=precision)

    peers = {
        "torch fp32": torch_in_fp32,
        "torch TF32": torch_in_tf32,
        "rounded to TF32": rounded_to_tf32,
    }
    return peers | {precision: ours(precision) for precision in OURS}


def laid_out(x: Tensor, order: str) -> Tensor:
    return x if order == "N" else x.mT.contiguous().mT


def same_specials(got: Tensor, want: Tensor) -> bool:
    return all(
        torch.equal(where(got), where(want))
        for where in (torch.isnan, torch.isposinf, torch.isneginf)
    )


def norm(x: Tensor) -> float:
    """Frobenius norm of float64 values, scaled so that squares neither overflow nor vanish."""
    largest = x.abs().max().item()
    return largest * torch.linalg.vector_norm(x / largest).item() if largest else 0.0


def errors(got: Tensor, exact: Tensor, products: Tensor) -> dict[str, float | bool]:
    """Normwise and worst scaled error over the elements that are finite in ``exact`` as fp32."""
    finite = exact.float().isfinite()
    difference = torch.where(finite, got.double() - exact, 0.0)
    largest = norm(torch.where(finite, exact, 0.0))
    scaled = torch.where(finite & (products > 0), difference.abs() / products, 0.0)
    return {
        "normwise": norm(difference) / largest if largest else norm(difference),
        "worst": scaled.max().item(),
        "specials": same_specials(got, exact.float()),
    }


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    b = b.double()
    return torch.cat([rows.double() @ b for rows in a.split(ORACLE_ROWS)])


def measure(
    family: str, m: int, k: int, n: int, layout: str, device: torch.device, always_pack: bool
) -> dict:
    generator = torch.Generator(device).manual_seed(k)
    a, b = FAMILIES[family](m, k, n, generator)
    a, b = laid_out(a, layout[0]), laid_out(b, layout[1])
    exact = exact_product(a, b)
    products = exact_product(a.nan_to_num(0, 0, 0).abs(), b.nan_to_num(0, 0, 0).abs())
    found = {name: errors(f(a, b), exact, products) for name, f in contenders(always_pack).items()}
    row = {"family": family, "M": m, "K": k, "N": n, "layout": layout, "errors": found}
    return row | {"broken": broken_promises(found)}


def broken_promises(found: dict) -> list[str]:
    said = []
    for precision in OURS:
        losses = [found[name]["normwise"] for name in YARDSTICK[precision]]
        allowed = PROMISE[precision] * max(*losses, FLOOR)
        if not found[precision]["normwise"] <= allowed:
            said.append(f"{precision}: {found[precision]['normwise']:.2e} exceeds {allowed:.2e}")
        if not found[precision]["specials"]:
            said.append(f"{precision}: Inf or NaN in the wrong place")
    return said


def markdown(rows: list[dict], env: dict) -> str:
    names = list(rows[0]["errors"])
    lines = [
        f"# Accuracy on {env['gpu']}",
        "",
        f"torch {env['torch']}, Triton {env['triton']}, commit `{env['commit'][:12]}`, "
        f"{env['date'][:10]}; `{env['command']}`",
        "",
        "Normwise error against float64, and in brackets the worst |C - C64| / (|A| |B|).",
        "",
        "| family | K | layout | " + " | ".join(names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for row in rows:
        cells = [
            f"{row['errors'][name]['normwise']:.1e} ({row['errors'][name]['worst']:.1e})"
            for name in names
        ]
        place = [row["family"], str(row["K"]), row["layout"]]
        lines.append("| " + " | ".join(place + cells) + " |")
    broken = [f"- {row['family']}, K={row['K']}: {text}" for row in rows for text in row["broken"]]
    return "\n".join([*lines, "", "## Promises broken", "", *(broken or ["None."]), ""])


def plot(rows: list[dict], file: Path, title: str) -> None:
    """Normwise errors by family, at the largest K."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    largest = max(row["K"] for row in rows)
    shown = [row for row in rows if row["K"] == largest and row["layout"] == "NN"]
    figure, axes = pyplot.subplots(figsize=(9, 0.4 * len(shown) + 2), layout="constrained")
    for name, marker in zip(shown[0]["errors"], "oos^Dx", strict=True):
        values = [row["errors"][name]["normwise"] for row in shown]
        axes.scatter(values, range(len(shown)), label=name, marker=marker, alpha=0.8)
    axes.set_yticks(range(len(shown)), [row["family"] for row in shown])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel=f"normwise error against float64, K = {largest}", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    on_gpu = torch.cuda.is_available()
    sizes = [509, 511] if on_gpu else [33, 27]
    ks = [1, 2, 8, 15, 16, 64, 1024, 4095, 65536, 524288] if on_gpu else [1, 16, 300]
    parser.add_argument("--size", type=int, nargs=2, default=sizes, metavar=("M", "N"))
    parser.add_argument("--k", type=int, nargs="+", default=ks)
    parser.add_argument("--family", choices=FAMILIES, nargs="+", default=list(FAMILIES))
    parser.add_argument(
        "--packed", action="store_true", help="always pack, as big products do, at any size"
    )
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results/<device>)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    m, n = args.size
    # Every layout once, by the family that has nothing else to show.
    cases = [(family, k, "NN") for family in args.family for k in args.k]
    cases += [("randn", max(args.k), layout) for layout in LAYOUTS[1:]]
    rows = [
        measure(family, m, k, n, layout, device, args.packed)
        for family, k, layout in track(cases, description="accuracy")
    ]
    command = "python benchmarks/accuracy.py " + " ".join(arguments or sys.argv[1:])
    env = environment.describe(device, command.strip())
    default = Path("benchmarks/results") / environment.folder_name(env["gpu"])
    out = args.out or default
    out.mkdir(parents=True, exist_ok=True)
    (out / "accuracy.json").write_text(json.dumps({"env": env, "rows": rows}, indent=1) + "\n")
    (out / "accuracy.md").write_text(markdown(rows, env))
    plot(rows, out / "accuracy.png", f"Accuracy on {env['gpu']}")
    broken = [f"{row['family']}, K={row['K']}: {t}" for row in rows for t in row["broken"]]
    print("\n".join(broken) or f"{len(rows)} cases, every promise kept; wrote {out}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
