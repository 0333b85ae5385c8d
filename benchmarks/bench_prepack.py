"""Time linear layers by torch, by the patched module and by the prepacked one; each checked first.

    python benchmarks/bench_prepack.py [--rows 1 17 256 4096] [--seconds 0.1] [--out FILE]

A row a weight, precision and number of rows of x: microseconds, whether the plan reads the copy,
the error against float64, and the memory that the copy takes. Exit code 1 if an error is too large.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn

import fastmm_op
from fastmm_op.bench import environment
from fastmm_op.bench.runner import rounded
from fastmm_op.timing import Timer, torch_tf32

# Weights (N, K): ViT-B's and GPT-2's layers, its vocabulary, and odd ones.
WEIGHTS = ((3072, 768), (768, 3072), (50257, 768), (11009, 4097), (4096, 4096))
ROWS = (1, 2, 8, 17, 64, 256, 1023, 4096, 12608)
KINDS = {"tf32": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}
# Normwise, beside torch's own error under the same setting.
ALLOWED, FLOOR = 2.0, {"tf32": 4e-4, "fp32": 1e-6, "bf16": 4e-3}


def measure(
    shape: tuple[int, int], kind: str, rows: int, device: torch.device, timer: Timer, seconds: float
) -> dict:
    """One row of the table; both of ours fail together if either's error is too large."""
    n, k = shape
    dtype = KINDS[kind]
    like = {"device": device, "dtype": dtype}
    x = torch.randn(rows, k, **like)
    layer = nn.Linear(k, n, bias=False, **like).requires_grad_(False)
    weight = layer.weight
    precision = kind if dtype is torch.float32 else "tf32"
    want = x.double() @ weight.double().mT
    row = {"N": n, "K": k, "kind": kind, "rows": rows}

    def checked(name: str, allowed: float | None = None) -> float:
        error = ((layer(x).double() - want).norm() / want.norm()).item()
        row[f"{name}_error"] = error
        if allowed is not None and not error <= allowed:
            row["failed"] = f"{name}'s error is {error:.2e}, allowed {allowed:.2e}"
        row[f"{name}_us"] = rounded(timer(lambda: layer(x), seconds).us)
        return error

    with torch.no_grad(), torch_tf32(kind == "tf32"):
        allowed = max(FLOOR[kind], ALLOWED * checked("torch"))
        fastmm_op.patch(layer, precision=precision)
        checked("patched", allowed)
        report = fastmm_op.prepack(layer, precision=precision)
        row["kept_bytes"] = report.total_bytes
        row["read"] = report.total_bytes > 0 and reads_copy(layer, x, precision)
        checked("prepacked", allowed)
    return row


def reads_copy(layer: nn.Linear, x: torch.Tensor, precision: str) -> bool:
    """Whether the plan for this x reads the layer's copy."""
    from fastmm_op import launch, launch_kept

    arch, bias = launch.arch_of(x), layer.bias is not None
    problem = launch_kept.weight_problem(layer.weight, precision, arch, bias, len(x))
    return launch_kept.reads_copy(problem, launch.make_plan(problem))


def line(row: dict) -> str:
    gain = row["patched_us"] / row["prepacked_us"]
    times = "  ".join(
        f"{name} {row[f'{name}_us']:9.1f}" for name in ("torch", "patched", "prepacked")
    )
    what = f"{row['rows']:>6} x ({row['N']}, {row['K']}) {row['kind']}"
    return (
        f"{what}: {times} us, {gain:.2f}x patched"
        f"{'' if row['read'] else ', copy not read'}{', FAILED' if 'failed' in row else ''}"
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--weights", type=int, nargs="+", help="N K N K ..., in place of the list")
    parser.add_argument("--seconds", type=float, default=0.1, help="of timing each")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(argv: list[str] | None = None, timer: Timer | None = None) -> int:
    """Run with command line arguments ``argv``; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    options = make_parser().parse_args(argv)
    device = torch.device(options.device)
    given = options.weights or []
    weights = list(zip(given[::2], given[1::2], strict=True)) or WEIGHTS
    command = shlex.join(["python", "benchmarks/bench_prepack.py", *argv])
    results = {"env": environment.describe(device, command), "rows": []}
    timer = timer or Timer(device)
    torch.manual_seed(0)
    for shape in weights:
        for kind in options.kinds:
            for rows in options.rows:
                row = measure(shape, kind, rows, device, timer, options.seconds)
                print(line(row), flush=True)
                results["rows"].append(row)
                if options.out:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(any("failed" in row for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
