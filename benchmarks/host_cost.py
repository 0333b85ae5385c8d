"""Measure what calls cost the host: beside torch's, in parts, and the first one of a process.

    python benchmarks/host_cost.py [--calls N] [--no-first] [--out FOLDER]

Calls are small and nobody waits for them, so their time is the host's. A first call is timed in a
new process after the CUDA context and cuBLAS are up, with Triton's cache empty and then with what
that left; without threads too, which says what compiling at once saves. Results are checked before
anything is timed. Prints, writes host_cost.json with --out, and returns 1 if a target is missed.

Without a GPU it only shows that it runs: every kernel is interpreted, or the product is ATen's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

import fastmm_op
from fastmm_op import compat, ops
from fastmm_op.bench import environment
from fastmm_op.oracle import Oracle
from fastmm_op.timing import host_microseconds, torch_tf32

# Microseconds beyond torch's own call, by whether a plan has one kernel or more.
ALLOWED_US = {True: 10.0, False: 25.0}
FIRST_CALL_SECONDS = 3.0
# Kinds whose first call is timed: one kernel, the most, and with an epilogue. Each takes processes.
FIRST_CALLS = ("fp32 direct", "fp32 tf32, odd", "fp16 linear, odd")
# A stream holds 1024 launches.
LAUNCHES = 800


@dataclass(frozen=True)
class Kind:
    """A kind of call: sizes of A (..., M, K) and B (..., K, N), or of a linear's x and w.T."""

    name: str
    a: tuple[int, ...]
    b: tuple[int, ...]
    dtype: str
    precision: str = "tf32"
    linear: bool = False

    def operands(self, device: torch.device) -> list[Tensor]:
        dtype = getattr(torch, self.dtype)
        sizes = [self.a, self.b]
        if self.linear:
            sizes = [self.a, self.b[::-1], self.b[-1:], (*self.a[:-1], self.b[-1])]
        return [torch.randn(size, dtype=dtype, device=device) for size in sizes]

    def ours(self, x: list[Tensor]) -> Callable[[], Tensor]:
        if self.linear:
            how = {"precision": self.precision, "residual": x[3]}
            return lambda: fastmm_op.linear(x[0], x[1], x[2], **how)
        return lambda: fastmm_op.matmul(x[0], x[1], precision=self.precision)

    def torchs(self, x: list[Tensor]) -> Callable[[], Tensor]:
        """torch.mm where it serves; of a linear its product and bias, which torch has as one."""
        if self.linear:
            return lambda: torch.nn.functional.linear(x[0], x[1], x[2])
        product = torch.mm if len(self.a) == len(self.b) == 2 else torch.matmul
        return lambda: product(x[0], x[1])


KINDS = [
    Kind("fp32 direct", (256, 256), (256, 256), "float32"),
    Kind("fp16 direct", (256, 256), (256, 256), "float16"),
    Kind("fp16 direct, batched", (8, 128, 128), (8, 128, 128), "float16"),
    Kind("fp32 tf32, odd", (1025, 1025), (1025, 1025), "float32"),
    Kind("fp32 in two parts, odd", (1025, 1025), (1025, 1025), "float32", "fp32"),
    Kind("fp16, odd", (1025, 1025), (1025, 1025), "float16"),
    Kind("fp16, long K", (64, 32769), (32769, 64), "float16"),
    Kind("fp16 linear", (4, 64, 256), (256, 256), "float16", linear=True),
    Kind("fp16 linear, odd", (1025, 1025), (1025, 1025), "float16", linear=True),
]


def remembered(kind: Kind, x: list[Tensor]):
    """The Call that the op remembers for these operands, having made it; None if it is ATen's."""
    if not ops.HAVE_TRITON:
        return None
    from fastmm_op import launch

    launch._calls.clear()
    kind.ours(x)()
    call = next(iter(launch._calls.values()), None)
    return call if isinstance(call, launch.Call) and call.kernels else None


def check(kind: Kind, x: list[Tensor]) -> None:
    """The second call, which starts kernels again, is as accurate as promised.

    Raises:
        RuntimeError: it is not.
    """
    if kind.linear:
        wanted = torch.nn.functional.linear(*(t.double() for t in x[:3])) + x[3].double()
        got = kind.ours(x)().double()
        failure = None if (got - wanted).norm() <= 4e-3 * wanted.norm() else "error above 4e-3"
    else:
        oracle = Oracle(x[0], x[1])
        precision = kind.precision if kind.dtype == "float32" else {"float16": "fp16"}[kind.dtype]
        with torch_tf32(precision == "tf32"):
            allowed = oracle.allowed(precision, oracle.error(torch.matmul(x[0], x[1])))
        failure = oracle.check(kind.ours(x)(), allowed).failure
    if failure is not None:
        raise RuntimeError(f"{kind.name}: {failure}")


def measure(kind: Kind, device: torch.device, calls: int) -> dict[str, object]:
    """One row: microseconds a call of ours and of torch's, and what is allowed."""
    x = kind.operands(device)
    call = remembered(kind, x)
    check(kind, x)
    kernels = len(call.kernels) if call else 1
    count = min(calls, LAUNCHES // kernels)
    found = {
        name: host_microseconds(fn, device, count)
        for name, fn in (("fastmm", kind.ours(x)), ("torch", kind.torchs(x)))
    }
    # Once more each, in turns: a host has other work, and the better of two is nearer the cost.
    for name, fn in (("torch", kind.torchs(x)), ("fastmm", kind.ours(x))):
        found[name] = min(found[name], host_microseconds(fn, device, count))
    allowed = found["torch"] + ALLOWED_US[kernels == 1]
    return {
        "kind": kind.name,
        "shape": [*kind.a, *kind.b],
        "dtype": kind.dtype,
        "strategy": call.plan.strategy if call else None,
        "kernels": [step.kernel for step in call.plan.launches] if call else None,
        "direct": all(f is not k for f, k in zip(call.fastest, call.kernels, strict=True))
        if call
        else None,
        "fastmm_us": round(found["fastmm"], 2),
        "torch_us": round(found["torch"], 2),
        "allowed_us": round(allowed, 2),
        "met": found["fastmm"] <= allowed,
        "parts_us": parts(kind, x, call, device, count) if call else None,
    }


def parts(kind: Kind, x: list[Tensor], call, device: torch.device, calls: int) -> dict[str, object]:
    """Microseconds of what a call consists of, each alone; and of what it used to do instead."""
    from fastmm_op import launch

    a, b = x[:2]
    more = [launch.dense(t) for t in x[2:]]
    size = (call.plan.workspace_bytes,)
    out, workspace = call(a, b, *more), torch.empty(size, dtype=torch.uint8, device=device)
    buffers = {"a": a, "b": b, "c": out, "workspace": workspace}
    buffers |= dict(zip(("bias", "residual"), more, strict=False))
    addresses = {name: tensor.data_ptr() for name, tensor in buffers.items()}
    stream = compat.current_raw_stream(call.device_index)

    def us(fn: Callable[[], object]) -> float:
        return round(host_microseconds(fn, device, calls), 2)

    if kind.linear:
        implementation = lambda: launch.linear(*x, "none", kind.precision)  # noqa: E731
    else:
        implementation = lambda: launch.matmul(a, b, kind.precision)  # noqa: E731
    found = {
        "checks of the short path": us(lambda: compat.takes_short_path(*x)),
        "the op's implementation": us(implementation),
        "of it: all but the lookup": us(lambda: call(a, b, *more)),
        "output": us(lambda: compat.empty_strided_cuda(call.out_shape, call.out_strides, a.dtype)),
        "output by torch.empty": us(
            lambda: torch.empty(call.out_shape, dtype=a.dtype, device=a.device)
        ),
        "device and stream": us(
            lambda: (compat.current_device(), compat.current_raw_stream(call.device_index))
        ),
    }
    if call.plan.workspace_bytes:
        found["workspace"] = us(lambda: compat.empty_strided_cuda(size, (1,), torch.uint8))
    steps = zip(call.plan.launches, call.fastest, call.kernels, strict=True)
    found["launches"] = [
        {
            "kernel": step.kernel,
            "direct": us(lambda start=start: start(addresses, stream)),
            "by Triton's launcher": us(lambda kernel=kernel: kernel(addresses, stream)),
        }
        for step, start, kernel in steps
    ]
    return found


# First calls: each in a process of its own.


def first_call(kind: Kind, in_threads: bool) -> float:
    """Seconds of this process's first call, imports of kernels and compilation included."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = kind.operands(device)
    kind.torchs(x)()
    if not in_threads:
        from fastmm_op import launch

        launch.compile_together = lambda kernels: None
    wait(device)
    start = time.perf_counter()
    kind.ours(x)()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_calls(kind: Kind) -> dict[str, object]:
    """Seconds of first calls with Triton's cache empty and warm, and empty without threads."""
    found: dict[str, object] = {"kind": kind.name}
    for name, threads, caches in (
        ("threads", True, ("cold", "warm")),
        ("serial", False, ("cold",)),
    ):
        with tempfile.TemporaryDirectory() as folder:
            env = os.environ | {"TRITON_CACHE_DIR": folder}
            for cache in caches:
                command = [sys.executable, __file__, "--child", kind.name]
                command += [] if threads else ["--serial"]
                done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
                found[f"{cache}_{name}_s"] = round(float(done.stdout.split()[-1]), 3)
    found["met"] = found["cold_threads_s"] <= FIRST_CALL_SECONDS
    return found


def show(results: dict) -> None:
    print(f"{'kind':26}{'strategy':16}{'kernels':>8}{'ours':>8}{'torch':>8}{'allowed':>9}  us")
    for row in results["calls"]:
        kernels = len(row["kernels"]) if row["kernels"] else "ATen"
        verdict = "" if row["met"] else "  MISSED"
        verdict += "" if row["direct"] in (True, None) else "  (by Triton's launcher)"
        print(
            f"{row['kind']:26}{row['strategy'] or '':16}{kernels:>8}{row['fastmm_us']:8.1f}"
            f"{row['torch_us']:8.1f}{row['allowed_us']:9.1f}{verdict}"
        )
    for row in results["calls"]:
        if row["parts_us"]:
            print(f"\n{row['kind']}, parts in us:")
            for part, us in row["parts_us"].items():
                for line in us if part == "launches" else [{"": us}]:
                    print(f"    {line.pop('kernel', part):28}", *line.values())
    for row in results["first_calls"]:
        times = ", ".join(f"{k[:-2].replace('_', ' ')} {v} s" for k, v in row.items() if "_s" in k)
        print(f"first call, {row['kind']}: {times}{'' if row['met'] else '  MISSED'}")


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=100, help="calls a measurement (100)")
    parser.add_argument("--only", default="", help="only kinds whose name contains this")
    parser.add_argument("--no-first", action="store_true", help="no first calls")
    parser.add_argument("--out", type=Path, help="folder for host_cost.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--serial", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    os.environ["FASTMM_NO_CACHE"] = "1"  # what ships, not what this user has tuned
    if options.child:
        (kind,) = [kind for kind in KINDS if kind.name == options.child]
        print(first_call(kind, not options.serial))
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds = [kind for kind in KINDS if options.only in kind.name]
    results = {
        "env": environment.describe(device, " ".join(["python benchmarks/host_cost.py", *argv])),
        "targets": {"beyond_torch_us": [10, 25], "first_call_s": FIRST_CALL_SECONDS},
        "calls": [measure(kind, device, options.calls) for kind in kinds],
        "first_calls": [
            first_calls(kind) for kind in kinds if kind.name in FIRST_CALLS and not options.no_first
        ],
    }
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "host_cost.json").write_text(json.dumps(results, indent=1) + "\n")
    show(results)
    return int(not all(row["met"] for row in (*results["calls"], *results["first_calls"])))


if __name__ == "__main__":
    sys.exit(main())
