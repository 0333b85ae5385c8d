"""What this project needs of Triton beyond its documented API, in one place.

``CompiledKernel[grid](...)``, Triton's own way to start a kernel that is known already, assembles
for each launch what its C function takes: it encodes the TMA descriptors, and builds what profilers
may ask for, if none listens too. ``record`` has Triton do that once and keeps the outcome, so
nothing here repeats how Triton arranges arguments. Checked against Triton 3.6 to 3.9 by
``tests/test_starting.py``; where anything is not as known, ``record`` answers None and kernels are
started Triton's own way, as they all are if the environment has FASTMM_TRITON_LAUNCHER=1.
"""

import contextvars
import copy
import inspect
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import BuiltinFunctionType

import triton
from triton import knobs

try:
    from triton.backends.nvidia import driver as nvidia
except ImportError:
    nvidia = None  # a Triton for other cards


def compile_together(kernels: Sequence[tuple[Callable, tuple[int, int, int], list, dict]]) -> None:
    """Compile those of the kernels that are not compiled yet at once, each in a thread.

    Most of a compilation leaves Python alone. One that fails fails again, and is heard, when the
    kernel is launched.

    Args:
        kernels: (kernel, grid, arguments, compile-time arguments and options), as for launches.
    """
    if len(kernels) > 1 and hasattr(triton, "AsyncCompileMode"):
        # A context of its own: the mode, which Triton keeps in a context variable, ends with it.
        contextvars.copy_context().run(_compile_together, kernels)


def _compile_together(kernels: Sequence[tuple[Callable, tuple[int, int, int], list, dict]]) -> None:
    mode = triton.AsyncCompileMode
    try:
        with ThreadPoolExecutor(len(kernels)) as threads, mode(threads, ignore_errors=True):
            for kernel, grid, args, options in kernels:
                kernel.warmup(*args, grid=grid, **options)
    except Exception:  # our caller is compiling in this mode, for example
        return


def hooks_installed() -> bool:
    """Whether somebody, a profiler for example, is to be told of each launch."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # A chain of hooks, which may be empty; else one hook, or None.
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@dataclass(frozen=True)
class Recorded:
    """One launch as Triton's C function takes it: ``start(*before, stream, *after, *args)``.

    Attributes:
        kernel: the compiled kernel; Triton 3.8 unloads its code when nobody has it any more.
        start: the C function.
        before, after: its arguments ahead of and behind the stream.
        args: the kernel's arguments, with compile-time ones, and descriptors encoded and expanded;
            before Triton 3.7 what is ``after`` stands in front of them.
        as_list: whether they are one argument: a list, not many (Triton 3.7).
    """

    kernel: object
    start: Callable
    before: tuple
    after: tuple
    args: list
    as_list: bool


def record(kernel, grid: tuple[int, int, int], args: Sequence) -> Recorded | None:
    """What Triton would start a compiled kernel with, were no hooks installed; starts nothing.

    Args:
        kernel: a ``CompiledKernel``.
        args: as ``kernel[grid]`` takes them. Addresses may be any objects: they are passed on.

    Returns:
        None if this Triton is not as known, or the kernel needs more of its launcher: scratch
        memory of its own, or the sanitizer's arguments.
    """
    if nvidia is None or os.environ.get("FASTMM_TRITON_LAUNCHER") == "1":
        return None
    try:
        return _record(kernel, grid, args)
    except Exception:  # a private API may do anything, and Triton's own way is still there
        return None


def _record(kernel, grid: tuple[int, int, int], args: Sequence) -> Recorded | None:
    launcher = kernel.run
    if (
        type(launcher) is not nvidia.CudaLauncher
        or launcher.global_scratch_size
        or launcher.profile_scratch_size
        or getattr(launcher, "gsan_enabled", False)
    ):
        return None
    calls = []
    recorder = copy.copy(launcher)
    recorder.launch = nvidia.wrap_handle_tensordesc(
        lambda *given: calls.append(given), kernel.src.signature, descriptor_metadata(kernel)
    )
    stream = object()
    no_hooks = (None, None, None)
    recorder(*grid, stream, kernel.function, kernel.packed_metadata, *no_hooks, *args)
    (given,) = calls
    before, rest = given[: given.index(stream)], given[given.index(stream) + 1 :]
    if before != grid:
        return None
    start = c_function(launcher.launch)
    if isinstance(rest[-1], (list, tuple)):
        return Recorded(kernel, start, before, rest[:-1], list(rest[-1]), as_list=True)
    return Recorded(kernel, start, before, (), list(rest), as_list=False)


def c_function(launch: Callable) -> Callable:
    """The C function that a launcher calls, directly or after it has encoded descriptors.

    Raises:
        ValueError: no function of C is found, or several.
    """
    if isinstance(launch, BuiltinFunctionType):
        return launch
    held = [cell.cell_contents for cell in launch.__closure__]
    (start,) = [value for value in held if isinstance(value, BuiltinFunctionType)]
    return start


def descriptor_metadata(kernel) -> list[dict] | None:
    """How the TMA descriptors among a kernel's arguments are encoded, in order."""
    return getattr(kernel.metadata, "tensordesc_meta", None)


def is_encoded_descriptor(arg: object) -> bool:
    """Whether an argument of the C function is an encoded TMA descriptor (a CUtensorMap)."""
    return type(arg) is nvidia.PyCUtensorMap


def encoder(metadata: dict) -> Callable[[object], object]:
    """What encodes a host TensorDescriptor for a kernel's argument with such metadata."""
    make = nvidia.make_tensordesc_arg
    # Triton 3.8 has a third parameter, which NVIDIA's cards do not use.
    more = (None,) * (len(inspect.signature(make).parameters) - 2)
    return lambda descriptor: make(descriptor, metadata, *more)[0]


# CUDA's CU_TENSOR_MAP_DATA_TYPE_TFLOAT32: fp32 that TMA rounds to TF32 as it copies it.
TFLOAT32 = 11


def tma_can_round() -> bool:
    """Whether this Triton can have TMA round fp32 to TF32: by a descriptor's field, since 3.7.

    Of 3.6 it is known how to have it too (``round_as_copied``).
    """
    if nvidia is None:
        return False
    if hasattr(nvidia, "TMA_TF32"):
        return True
    is_known = triton.__version__.startswith("3.6.")
    return is_known and nvidia.TMA_DTYPE_DEVICE_TO_HOST.get(TFLOAT32) == TFLOAT32


def round_as_copied(kernel, rounds: Sequence[bool]) -> object:
    """Have TMA round what a kernel's descriptors copy to TF32, in Triton 3.6.

    There the type that a descriptor is encoded with is the compiled kernel's own.

    Args:
        kernel: what ``warmup`` returns: a ``CompiledKernel``, or one that is still compiled, if our
            caller is in Triton's asynchronous mode.
        rounds: whether, of each descriptor among its arguments.

    Returns:
        The compiled kernel.
    """
    kernel = kernel.result() if hasattr(kernel, "result") else kernel
    for metadata, wanted in zip(descriptor_metadata(kernel), rounds, strict=True):
        if wanted:
            metadata["elem_type"] = TFLOAT32
    return kernel
