"""One model under one setting: contenders are checked against float64, then timed, then trained."""

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.models import Workload
from fastmm_op.bench.runner import finite, rounded
from fastmm_op.compile import explain, options
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


# Eager first: what it loses is what the others are judged by.
CONTENDERS = {f.__name__.replace("_", "-"): f for f in (eager, inductor, max_autotune, fastmm)}


@dataclass
class ModelRun:
    """A workload under a setting, on a device.

    Attributes:
        workload: the model and its data.
        setting: ``"fp32"``, ``"tf32"`` or ``"bf16"`` (autocast).
        device: where.
        tiny: the model's small version.
        steps: of training, for the loss curves.
        seconds: of timing, a contender.
        timer: a ``timing.Timer`` or its like.
    """

    workload: Workload
    setting: str
    device: torch.device
    tiny: bool
    steps: int
    seconds: float
    timer: Timer | Callable[[Callable, float], Timing]

    def __post_init__(self) -> None:
        torch.manual_seed(SEED)
        self.initial = self.workload.make(self.tiny).to(self.device)
        self.data = tuple(x.to(self.device) for x in self.workload.data(self.tiny))
        exact = copy.deepcopy(self.initial).double()
        data = tuple(x.double() if x.is_floating_point() else x for x in self.data)
        self.reference = self.results(exact, lambda: exact(*data))

    def rows(self, contenders: dict[str, Callable]) -> list[dict]:
        """A row for each contender, eager's first."""
        rows = []
        for name, make in contenders.items():
            row = {"workload": self.workload.name, "setting": self.setting, "contender": name}
            rows.append(row)
            try:
                row |= self.measure(make, rows[0] if rows[0] is not row else None)
                if name == "fastmm":
                    row |= self.products()
            except Exception as error:  # one contender's trouble must not end the run
                row["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            torch.compiler.reset()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return rows

    def forward(self, run: Callable) -> Tensor | tuple[Tensor, Tensor]:
        """A forward pass under the setting: logits, or logits and loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.setting == "bf16"):
            return run(*self.data)

    def results(self, model: nn.Module, forward: Callable) -> list[Tensor]:
        """Logits in float64 and, of a model that trains, its gradients as one vector."""
        if not self.workload.trains:
            with torch.no_grad():
                return [forward().double()]
        logits, loss = forward()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return [logits.detach().double(), torch.cat([g.double().flatten() for g in gradients])]

    def measure(self, make: Callable, baseline: dict | None) -> dict:
        """Errors, then (if they are allowed) times, memory and losses."""
        model = copy.deepcopy(self.initial)
        with torch_tf32(self.setting == "tf32"):
            run = make(model)
            found = self.results(model, lambda: self.forward(run))
            errors = [normwise(*pair) for pair in zip(found, self.reference, strict=True)]
            del found
            names = ("logits_error", "gradient_error")
            row = {name: finite(error) for name, error in zip(names, errors, strict=False)}
            for name, error in zip(names, errors, strict=False):
                allowed = plausible(self.setting)
                if baseline and name in baseline:
                    allowed = max(FLOOR, ALLOWED * baseline[name])
                row[f"allowed_{name}"] = allowed
                if not error <= allowed:
                    return row | {"failed": f"{name} is {error:.2e}, allowed {allowed:.2e}"}
            row |= self.time(model, run)
            if self.workload.trains:
                row |= self.train(make, baseline)
        return row

    def time(self, model: nn.Module, run: Callable) -> dict:
        """Milliseconds of a step, and the most memory that it held."""
        if self.workload.trains:
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

    def train(self, make: Callable, baseline: dict | None) -> dict:
        """The loss curve from the common start, held against eager's."""
        model = copy.deepcopy(self.initial)
        step = self.training_step(model, make(model))
        losses = torch.stack([step() for _ in range(self.steps)]).tolist()
        row = {"losses": [rounded(loss, 6) for loss in losses]}
        if baseline and "losses" in baseline:
            pairs = zip(losses, baseline["losses"], strict=True)
            apart = max(abs(loss - other) for loss, other in pairs) / abs(losses[0])
            row["losses_apart"] = finite(apart)
            if not apart <= LOSS_TOLERANCE:
                row["failed"] = f"the loss curve is {apart:.3f} of the first loss from eager's"
        return row

    def products(self) -> dict:
        """How many matrix products there are, and how many of them fastmm took."""
        run = explain(copy.deepcopy(self.initial))
        with torch_tf32(self.setting == "tf32"), torch.set_grad_enabled(self.workload.trains):
            report = self.forward(run)
        return {"products": len(report.decisions), "products_taken": len(report.taken)}


def plausible(setting: str) -> float:
    """More than a sound computation of a whole model loses: for eager itself."""
    return {"fp32": 1e-3, "tf32": 0.05, "bf16": 0.25}[setting]


def normwise(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()
