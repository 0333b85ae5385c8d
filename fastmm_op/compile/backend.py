"""The ``fastmm`` backend of torch.compile: Inductor, with the products it would do slowly taken."""

from collections.abc import Callable, Mapping, Sequence

import torch

from fastmm_op.arch import Arch
from fastmm_op.compile.compat import chain, list_mode_options, option_names
from fastmm_op.compile.graph_pass import HOOKS, Decision, MatmulPass
from fastmm_op.compile.settings import Settings

# Our own options stand beside Inductor's, under this prefix.
PREFIX = "fastmm."


def options(
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
    *,
    always: bool = False,
    arch: str | Arch | None = None,
) -> dict[str, object]:
    """Options that make ``torch.compile(model, options=...)`` use fastmm where it should win.

    For torch.compile's default backend, and for AOTInductor's ``inductor_configs``.
    ``torch.compile(model, backend="fastmm", mode=..., options=...)`` does the same.

    Args:
        mode: one of torch.compile's (``"reduce-overhead"``, ``"max-autotune"``, ...), which it
            refuses beside options.
        options: Inductor's own options. Graph passes in them, or else in
            ``torch._inductor.config``, are kept; in the two hooks that fastmm uses they run first.
        always: take every product the op supports, whatever is predicted, on any device. For tests.
        arch: decide as for this card (``"sm_80"``, ``"sm_89"``, ``"sm_90"``), for tensors on any
            device; default: for the card that they are on.

    Raises:
        TypeError, ValueError: as Settings; unknown mode or option.
    """
    return inductor_options(mode, options, Settings(always, arch))


def inductor_options(
    mode: str | None,
    given: Mapping[str, object] | None,
    settings: Settings,
    record: list[Decision] | None = None,
) -> dict[str, object]:
    """Inductor's options for a mode and given options, with our passes added."""
    patches = mode_options(mode)
    names = option_names()
    for name, value in (given or {}).items():
        name = name.replace("-", "_")
        if name not in names:
            raise ValueError(
                f"fastmm_op.compile: unknown option {name!r}; torch._inductor.list_options() names "
                f"Inductor's, and '{PREFIX}always' and '{PREFIX}arch' are fastmm's"
            )
        patches[name] = value
    for hook in HOOKS:
        present = patches.get(hook, getattr(torch._inductor.config, hook))
        patches[hook] = chain(present, MatmulPass(hook, settings, record))
    return patches


def mode_options(mode: str | None) -> dict[str, object]:
    modes = list_mode_options()
    if mode is not None and mode not in modes:
        raise ValueError(f"fastmm_op.compile: mode must be one of {tuple(modes)}, got {mode!r}")
    return dict(modes[mode]) if mode else {}


def split_settings(given: Mapping[str, object] | None) -> tuple[Settings, dict[str, object]]:
    """The backend's options as ours and Inductor's: ``"fastmm.always"`` and ``"fastmm.arch"``."""
    ours, theirs = {}, {}
    for name, value in (given or {}).items():
        (ours if name.startswith(PREFIX) else theirs)[name] = value
    known = {name: ours.pop(PREFIX + name) for name in ("always", "arch") if PREFIX + name in ours}
    if ours:
        raise ValueError(
            f"fastmm_op.compile: unknown option {next(iter(ours))!r}; there are "
            f"'{PREFIX}always' and '{PREFIX}arch'"
        )
    return Settings(**known), theirs


def backend(
    graph: torch.fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Callable:
    """``torch.compile(model, backend="fastmm")``: the entry point that Dynamo calls.

    Args:
        graph, inputs: what Dynamo traced.
        mode: torch.compile's.
        options: torch.compile's: Inductor's options, ``"fastmm.always"`` and ``"fastmm.arch"``
            (the arguments of ``fastmm_op.compile.options``).
    """
    from torch._inductor.compile_fx import compile_fx

    settings, theirs = split_settings(options)
    return compile_fx(graph, inputs, config_patches=inductor_options(mode, theirs, settings))
