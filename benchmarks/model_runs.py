"""One model under one setting: contenders are checked against float64, then timed, then trained."""

import copy
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

import fastmm_op
from benchmarks.models import Workload
from fastmm_op.bench.runner import finite, rounded
from fastmm_op.compile import activations, explain, options
from fastmm_op.compile.graph_pass import Decision, MatmulPass
from fastmm_op.plan import make_plan
from fastmm_op.timing import Timer, Timing, torch_tf32

SETTINGS = ("fp32", "tf32", "bf16")
# A contender may lose this much more of its logits and gradients than eager PyTorch does under the
# same setting, or than float32 rounding leaves where eager happens to lose nothing.
ALLOWED, FLOOR = 2.0, 1e-6
# Two runs of training from the same start differ by rounding; by less than this much of the first
# loss, at every step.
LOSS_TOLERANCE = 0.02
SEED = 0


def eager(model: nn.Module) -> Callable:
    return model


def inductor(model: nn.Module) -> Callable:
    return torch.compile(model)


def max_autotune(model: nn.Module) -> Callable:
    return torch.compile(model, mode="max-autotune-no-cudagraphs")


def fastmm(model: nn.Module) -> Callable:
    # As backend="fastmm", which is known by that name where the package is installed.
    return torch.compile(model, options=options())


def prepacked(model: nn.Module) -> Callable:
    fastmm_op.prepack(model)
    return torch.compile(model, options=options())


# Eager first: what it loses is what the others are judged by.
CONTENDERS = {
    f.__name__.replace("_", "-"): f for f in (eager, inductor, max_autotune, fastmm, prepacked)
}
FOR_INFERENCE = ("prepacked",)


@dataclass
class Subject:
    """A workload on a device, and what float64 makes of it, computed once.

    Attributes:
        workload: the model and its data.
        device: where.
        tiny: the model's small version.
    """

    workload: Workload
    device: torch.device
    tiny: bool

    # All that follows is made when a row first needs it: what fails then is that row.

    @cached_property
    def initial(self) -> nn.Module:
        torch.manual_seed(SEED)
        return self.workload.make(self.tiny).to(self.device)

    @cached_property
    def data(self) -> tuple[Tensor, ...]:
        torch.manual_seed(SEED + 1)
        return tuple(x.to(self.device) for x in self.workload.data(self.tiny))

    @cached_property
    def reference(self) -> list[Tensor]:
        """``results`` in float64, of a part of the data at a time: all of it takes much memory."""
        exact = copy.deepcopy(self.initial).double()
        data = (x.double() if x.is_floating_point() else x for x in self.data)
        pieces = zip(*(x.chunk(self.workload.parts) for x in data), strict=True)
        found = [self.results(exact, lambda piece=piece: exact(*piece)) for piece in pieces]
        logits, *gradients = zip(*found, strict=True)
        # The loss is a mean, and the pieces are alike.
        return [torch.cat(logits), *(sum(parts) / len(parts) for parts in gradients)]

    def results(self, model: nn.Module, forward: Callable) -> list[Tensor]:
        """Logits in float64 and, of a model that trains, its gradients as one vector."""
        if not self.workload.trains:
            with torch.no_grad():
                return [forward().double()]
        logits, loss = forward()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return [logits.detach().double(), torch.cat([g.double().flatten() for g in gradients])]


@dataclass
class ModelRun:
    """A subject under a setting.

    Attributes:
        subject: model, data, reference.
        setting: ``"fp32"``, ``"tf32"`` or ``"bf16"`` (autocast).
        steps: of training, for the loss curves.
        seconds: of timing, a contender.
        timer: a ``timing.Timer`` or its like.
    """

    subject: Subject
    setting: str
    steps: int
    seconds: float
    timer: Timer | Callable[[Callable, float], Timing]

    @property
    def device(self) -> torch.device:
        return self.subject.device

    @property
    def trains(self) -> bool:
        return self.subject.workload.trains

    def row(self, name: str, make: Callable, baseline: dict | None) -> dict:
        """What one contender is worth; ``baseline`` is eager's row, unless this is eager's."""
        row = {
            "workload": self.subject.workload.name,
            "setting": self.setting,
            "contender": name,
        }
        started = time.monotonic()
        try:
            make_plan.cache_clear()
            activations.patterns.cache_clear()
            with pass_log() as log:
                row |= self.measure(make, baseline)
            if name == "fastmm":
                row |= log.summary() or self.products()
        except Exception as error:  # one contender's trouble must not end the run
            row["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        row["row_seconds"] = rounded(time.monotonic() - started, 3)
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return row

    def forward(self, run: Callable) -> Tensor | tuple[Tensor, Tensor]:
        """A forward pass under the setting: logits, or logits and loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.setting == "bf16"):
            return run(*self.subject.data)

    def measure(self, make: Callable, baseline: dict | None) -> dict:
        """Errors, then (if they are allowed) times, memory and losses."""
        model = copy.deepcopy(self.subject.initial)
        reference = self.subject.reference
        with torch_tf32(self.setting == "tf32"):
            started = time.monotonic()
            run = make(model)
            found = self.subject.results(model, lambda: self.forward(run))
            self.wait()
            row = {"first_call_seconds": rounded(time.monotonic() - started, 3)}
            errors = [normwise(*pair) for pair in zip(found, reference, strict=True)]
            del found
            names = ("logits_error", "gradient_error")
            row |= {name: finite(error) for name, error in zip(names, errors, strict=False)}
            for name, error in zip(names, errors, strict=False):
                allowed = plausible(self.setting)
                if baseline and name in baseline:
                    allowed = max(FLOOR, ALLOWED * baseline[name])
                row[f"allowed_{name}"] = allowed
                if not error <= allowed:
                    return row | {"failed": f"{name} is {error:.2e}, allowed {allowed:.2e}"}
            row |= self.time(model, run)
            if self.trains:
                row |= self.train(model, run, baseline)
        return row

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, model: nn.Module, run: Callable) -> dict:
        """Milliseconds of a step, and the most memory that it held."""
        if self.trains:
            step = self.training_step(model, run)
        else:

            def step() -> None:
                with torch.no_grad():
                    self.forward(run)

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        timing = self.timer(step, self.seconds)
        row = {
            "ms": rounded(timing.us / 1e3, 4),
            "ms_p20": rounded(timing.us_p20 / 1e3, 4),
            "ms_p80": rounded(timing.us_p80 / 1e3, 4),
            "repetitions": timing.repetitions,
        }
        if self.device.type == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return row

    def training_step(self, model: nn.Module, run: Callable) -> Callable[[], Tensor]:
        """Forward, backward and AdamW; returns the loss, on the device."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=self.device.type == "cuda")

        def step() -> Tensor:
            optimizer.zero_grad()
            _, loss = self.forward(run)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def train(self, model: nn.Module, run: Callable, baseline: dict | None) -> dict:
        """The loss curve from the common start, held against eager's.

        The model is the one that was timed, set back: another would be compiled once more.
        """
        model.load_state_dict(self.subject.initial.state_dict())
        step = self.training_step(model, run)
        losses = torch.stack([step() for _ in range(self.steps)]).tolist()
        row = {"losses": [rounded(loss, 6) for loss in losses]}
        if baseline and "losses" in baseline:
            pairs = list(zip(losses, baseline["losses"], strict=False))
            apart = max(abs(loss - other) for loss, other in pairs) / abs(losses[0])
            row["losses_apart"] = finite(apart)
            row["losses_compared"] = len(pairs)
            if not apart <= LOSS_TOLERANCE:
                row["failed"] = f"the loss curve is {apart:.3f} of the first loss from eager's"
        return row

    def products(self) -> dict:
        """``PassLog.summary`` of a model whose compiled code was found in a cache."""
        make_plan.cache_clear()
        activations.patterns.cache_clear()
        run = explain(copy.deepcopy(self.subject.initial))
        tf32, grad = torch_tf32(self.setting == "tf32"), torch.set_grad_enabled(self.trains)
        with tf32, grad, pass_log() as log:
            self.forward(run)
        return log.summary()


@dataclass
class PassLog:
    """What fastmm's passes did.

    Attributes:
        seconds: of each run of a pass over a graph.
        decisions: about products, in order.
    """

    seconds: list[float] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)

    def summary(self) -> dict:
        """How many products there are, how many fastmm took, and the seconds that asking took.

        Nothing if no pass was run.
        """
        if not self.seconds:
            return {}
        return {
            "products": len(self.decisions),
            "products_taken": sum(decision.verdict.take for decision in self.decisions),
            "pass_seconds": rounded(sum(self.seconds), 3),
        }


@contextmanager
def pass_log() -> Iterator[PassLog]:
    """What fastmm's passes do while this is open."""
    log, call = PassLog(), MatmulPass.__call__

    def logged(self, graph) -> None:
        given, self.record = self.record, []
        started = time.perf_counter()
        try:
            call(self, graph)
        finally:
            log.seconds.append(time.perf_counter() - started)
            log.decisions += self.record
            if given is not None:
                given += self.record
            self.record = given

    MatmulPass.__call__ = logged
    try:
        yield log
    finally:
        MatmulPass.__call__ = call


def plausible(setting: str) -> float:
    """More than a sound computation of a whole model loses: for eager itself."""
    return {"fp32": 1e-3, "tf32": 0.05, "bf16": 0.25}[setting]


def normwise(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; got is overwritten."""
    return (got.sub_(want).norm() / want.norm()).item()
