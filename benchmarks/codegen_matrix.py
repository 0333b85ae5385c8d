"""What several versions of Triton make of the same plan, each in a throw-away environment.

    python benchmarks/codegen_matrix.py --arch sm_89 --tritons 3.6.0 3.7.1 3.8.0 3.9.0

Needs the package index and some 2 GB of disk at a time, no GPU. Writes the table and its JSON to
``benchmarks/results/codegen/<arch>.{md,json}``: a regression between versions shows as a column
that differs.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import venv
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/codegen"
# The seed workload: packed from fp32, packed from 16 bits, and strict fp32.
PROBLEMS = (("fp32", "tf32"), ("bf16", "tf32"), ("fp32", "ieee"))
SEED = ("8205", "2949", "5921")
COLUMNS = {
    "registers": "registers",
    "spills": "spills",
    "shared": "shared_memory",
    "blocks/SM": "blocks_per_sm",
    "loop": "loop_instructions",
    "MMA": "mma",
    "loop/MMA": "loop_instructions_per_mma",
}


def environment(folder: str, torch: str, triton: str) -> Path:
    """A virtual environment in ``folder`` with these versions; returns its interpreter."""
    venv.create(folder, with_pip=True)
    python = Path(folder) / "bin/python"
    # torch first and alone: its pin finds a local CPU build where there is one.
    for packages in ([f"torch=={torch}"], [f"triton=={triton}", "rich"]):
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def figures(python: Path, arch: str) -> list[dict]:
    """``python -m fastmm_op codegen`` of every problem: one entry a kernel."""
    found = []
    for dtype, precision in PROBLEMS:
        command = [python, "-m", "fastmm_op", "codegen", "--arch", arch, "--shape", *SEED]
        command += ["--dtype", dtype, "--precision", precision, "--json"]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        for kernel in json.loads(done.stdout)["kernels"]:
            found.append({"dtype": dtype, "precision": precision, **kernel})
    return found


def table(results: dict) -> str:
    """Markdown: a row for each kernel and version."""
    lines = [
        f"`python {results['command']}` on {results['date']}, commit `{results['commit'][:12]}`.",
        "",
        "| product | kernel | Triton | " + " | ".join(COLUMNS) + " |",
        "|---|---|---|" + "---:|" * len(COLUMNS),
    ]
    rows = [
        (kernel["dtype"], kernel["precision"], order, kernel["kernel"], version, kernel)
        for version, kernels in results["tritons"].items()
        for order, kernel in enumerate(kernels)
    ]
    for dtype, precision, _, name, version, kernel in sorted(rows, key=lambda row: row[:5]):
        product = f"{dtype}, {precision}" if dtype == "fp32" else dtype
        cells = ["-" if kernel[c] is None else str(kernel[c]) for c in COLUMNS.values()]
        lines.append(f"| {product} | {name} | {version} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Build the environments, compile, write; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="sm_89")
    parser.add_argument("--torch", default="2.13.0")
    parser.add_argument("--tritons", nargs="+", default=["3.6.0", "3.7.1", "3.8.0", "3.9.0"])
    options = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    from fastmm_op.bench.environment import commit

    results = {
        "command": shlex.join(["benchmarks/codegen_matrix.py", *argv]),
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": options.torch,
        "tritons": {},
    }
    console = Console()
    for version in options.tritons:
        with (
            console.status(f"Triton {version}"),
            tempfile.TemporaryDirectory(prefix="codegen_matrix_") as folder,
        ):
            python = environment(folder, options.torch, version)
            results["tritons"][version] = figures(python, options.arch)
        console.print(f"Triton {version}: done")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{options.arch}.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / f"{options.arch}.md").write_text(table(results))
    console.print(f"wrote {RESULTS.relative_to(ROOT)}/{options.arch}.md", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
