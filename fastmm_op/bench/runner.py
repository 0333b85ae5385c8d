"""One case: check every contender, then time those that passed, then write the rows."""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmm_op.bench.cases import Case
from fastmm_op.bench.contenders import Contender, ours, peers
from fastmm_op.bench.environment import device_arch
from fastmm_op.oracle import Oracle, Verdict, poison
from fastmm_op.plan import make_plan
from fastmm_op.timing import Timer, Timing, l2_bytes


class DeviceLost(RuntimeError):
    """The device no longer works (an illegal access, say): nothing more can be measured."""


@dataclass
class Outcome:
    """What became of one contender: its verdict, and its time if it passed.

    Attributes:
        allowed: the normwise error it was allowed.
        wrong: it ran, and its result failed the check.
    """

    verdict: Verdict
    allowed: float
    timing: Timing | None = None
    wrong: bool = False


@dataclass
class Runner:
    """Measures cases on a device.

    Attributes:
        device: where.
        ceilings: ``environment.measure``'s result.
        seconds: of timing for each case, shared by its contenders.
        timer: a ``timing.Timer``, or anything called like one.
    """

    device: torch.device
    ceilings: dict
    seconds: float
    timer: Timer | Callable[[Callable, float], Timing]

    def run(self, case: Case, peer_names: set[str]) -> list[dict]:
        """The rows of a case, one a mode.

        Raises:
            DeviceLost: after a failure that the device did not survive.
        """
        a, b = case.inputs(self.device)
        oracle = Oracle(a, b)
        outcomes: dict[str, Outcome] = {}
        # Peers first: what torch itself loses is part of what is allowed to us.
        contenders = [*peers(case, peer_names, self.device), *ours(case)]
        share = self.seconds / len(contenders)
        for contender in contenders:
            allowed = oracle.plausible(contender.precision)
            if contender.name.startswith("fastmm"):
                torch_outcome = outcomes.get("torch")
                torch_error = None
                if torch_outcome and torch_outcome.verdict.failure is None:
                    torch_error = torch_outcome.verdict.error
                allowed = oracle.allowed(case.precision, torch_error)
            outcomes[contender.name] = self.measure(contender, oracle, a, b, allowed, share)
        del a, b, oracle
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.rows(case, outcomes)

    def measure(
        self,
        contender: Contender,
        oracle: Oracle,
        a: Tensor,
        b: Tensor,
        allowed: float,
        seconds: float,
    ) -> Outcome:
        """Check one contender, and time it if it passes; its exceptions become failures."""
        try:
            with contender.setting():
                product = contender.make()
                poison(oracle.out_shape, oracle.out_dtype, self.device)
                out = product(a, b)
                verdict = oracle.check(out, allowed)
                del out
                if verdict.failure is not None:
                    return Outcome(verdict, allowed, wrong=True)
                timing = self.timer(lambda: product(a, b), seconds)
                return Outcome(verdict, allowed, timing)
        except Exception as error:  # one contender's trouble must not end the run
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            require_device(self.device, f"{contender.name}: {text}")
            return Outcome(Verdict(float("nan"), text), allowed)

    def rows(self, case: Case, outcomes: dict[str, Outcome]) -> list[dict]:
        peer_entries = {
            name: peer_entry(outcome)
            for name, outcome in outcomes.items()
            if not name.startswith("fastmm")
        }
        flops_limit = case.flops / self.ceilings["matmul_ceiling_flops"][case.precision]
        limit = max(flops_limit, case.bytes / self.ceilings["copy_bandwidth_bytes_per_s"]) * 1e6
        rows = []
        for name, mode in (("fastmm", "eager"), ("fastmm-compiled", "compiled")):
            if name not in outcomes:
                continue
            outcome = outcomes[name]
            timing = outcome.timing
            row = {
                "case": case.name,
                "group": case.group,
                "M": case.M,
                "K": case.K,
                "N": case.N,
                "batch": case.batch,
                "layout": case.layout,
                "dtype": case.dtype,
                "precision": case.precision,
                "mode": mode,
                "us": rounded(timing and timing.us),
                "us_p20": rounded(timing and timing.us_p20),
                "us_p80": rounded(timing and timing.us_p80),
                "repetitions": timing and timing.repetitions,
                "tflops": timing and rounded(case.flops / timing.us / 1e6),
                "limit_us": rounded(limit),
                "limit_fraction": timing and rounded(limit / timing.us, 4),
                "error": finite(outcome.verdict.error),
                "allowed_error": outcome.allowed,
                "strategy": self.strategy(case),
                "fits_l2": case.bytes <= l2_bytes(self.device),
                "peers": peer_entries,
            }
            if case.fold:
                row["fold"] = list(case.fold)
            rows.append(row | failure_fields(outcome))
        return rows

    def strategy(self, case: Case) -> str | None:
        """The plan's strategy for a case on this device; None where ATen runs."""
        arch = device_arch(self.device)
        return make_plan(case.problem(arch)).strategy if arch else None


def require_device(device: torch.device, text: str) -> None:
    """Raise DeviceLost, with this text, unless the device still runs something."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except RuntimeError as error:
        raise DeviceLost(text) from error


def peer_entry(outcome: Outcome) -> dict:
    timing = outcome.timing
    entry = {"us": rounded(timing and timing.us), "error": finite(outcome.verdict.error)}
    return entry | failure_fields(outcome)


def failure_fields(outcome: Outcome) -> dict:
    """``failed`` (a sentence) and ``wrong`` (it ran, with a wrong result); nothing if it passed."""
    if outcome.verdict.failure is None:
        return {}
    return {"failed": outcome.verdict.failure, "wrong": outcome.wrong}


def rounded(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)


def finite(value: float) -> float | None:
    """A number that JSON can hold."""
    return value if abs(value) < float("inf") else None
