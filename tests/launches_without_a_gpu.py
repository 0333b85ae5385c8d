"""Starts compiled kernels on a driver that only remembers what it was given.

Run by test_starting.py, in a process of its own in which tests/fake_libcuda.c is libcuda. Kernels
of real plans are compiled for sm_90 and started both ways; what reaches the driver is compared to
the last byte, between the ways and with the plan. Prints "direct" and the names of the kernels.
"""

import ctypes
import struct
import threading
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

from fastmm_op import launch, running, triton_compat
from fastmm_op.arch import ARCHES
from fastmm_op.choices import choices
from fastmm_op.codegen import compile_launch
from fastmm_op.estimate import estimate
from fastmm_op.launches import Descriptor, Launch, Pointer
from fastmm_op.plan import make_plan, write_plan
from fastmm_op.problem import Epilogue, Operand, Problem
from fastmm_op.starting import Address, CompiledLaunch, DirectLaunch

BUFFERS = ("a", "b", "c", "workspace", "bias", "residual")
CALLS = [{name: (i << 40) + (n << 20) for n, name in enumerate(BUFFERS, 1)} for i in (1, 2)]
STREAM = 0x5000


class Driver(CudaDriver):
    """Triton's, for a card that PyTorch does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.get_current_device = lambda: 0
        self.get_device_capability = lambda device=0: (9, 0)
        self.get_current_stream = lambda device: STREAM


def launches():
    """(problem, launch) of plans that have every kind of argument, each kernel once a dtype."""
    seen = set()
    nothing, all_of_it = Epilogue(), Epilogue(True, "relu", True)
    for kernel, (m, n, k), dtype, epilogue, fits in (
        (
            "gemm_hopper",
            (4096, 2113, 4096),
            "fp32",
            nothing,
            lambda c: c.pack_a and c.tail_split > 1,
        ),
        ("gemm", (255, 257, 4097), "fp32", nothing, lambda c: c.pack_a and c.split > 1),
        ("gemm_hopper", (512, 1024, 512), "fp16", all_of_it, lambda c: not c.pack_a),
        ("gemm_tf32_hopper", (512, 768, 512), "fp32", nothing, lambda c: c.split == 1),
    ):
        operands = Operand(0, k, 1), Operand(0, 1, n)
        problem = Problem(1, m, n, k, dtype, "tf32", *operands, ARCHES["sm_90"], epilogue)
        fitting = [c for c in choices(problem) if c.tile.kernel == kernel and fits(c)]
        best = min(fitting, key=lambda choice: estimate(problem, choice))
        for step in write_plan(problem, best).launches:
            if (step.kernel, dtype) not in seen:
                seen.add((step.kernel, dtype))
                yield problem, step


def tensor(pointer: Pointer) -> Address:
    found = Address(CALLS[0][pointer.buffer] + pointer.offset)
    found.dtype = running.TORCH_DTYPES[pointer.dtype]
    return found


def argument(arg):
    """As ``running.run_plan`` passes it, tensors aside."""
    if isinstance(arg, Descriptor):
        how = arg.shape, arg.strides, arg.box, arg.pointer.dtype, arg.rounds
        return running.hopper.tensor_descriptor(tensor(arg.pointer), *how)
    return tensor(arg) if isinstance(arg, Pointer) else arg


def parameters(kernel, step: Launch, addresses: dict[str, int]) -> list[bytes | None]:
    """What the kernel must be given by the plan; None for an encoded descriptor."""
    found = []
    for arg, kind in zip(step.args, kernel.src.signature.values(), strict=False):
        if kind == "constexpr":
            continue
        if isinstance(arg, Pointer):
            found.append(struct.pack("<Q", addresses[arg.buffer] + arg.offset))
        elif isinstance(arg, Descriptor):
            found.append(None)
            found += [struct.pack("<i", size) for size in arg.shape]
            found += [struct.pack("<q", stride) for stride in arg.strides]
        else:
            found.append(struct.pack({"i32": "<i", "i64": "<q"}[kind], arg))
    return [*found, bytes(8), bytes(8)]  # no scratch memory


def check(fake: ctypes.CDLL, problem: Problem, step: Launch) -> None:
    kernel = compile_launch(problem, step)
    rounds = [arg.rounds for arg in step.args if isinstance(arg, Descriptor)]
    if any(rounds) and not running.hopper.ROUNDS_BY_FIELD:
        triton_compat.round_as_copied(kernel, rounds)
    started = CompiledLaunch(kernel, step, [argument(arg) for arg in step.args])
    assert isinstance(started.fastest, DirectLaunch), step.kernel
    sizes = [128 if p is None else len(p) for p in parameters(kernel, step, CALLS[0])]
    fake.fake_expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
    descriptors = [arg for arg in step.args if isinstance(arg, Descriptor)]

    def given(start, addresses: dict[str, int]) -> bytes:
        start(addresses, STREAM)
        return ctypes.string_at(fake.fake_last_launch(), fake.fake_last_launch_size())

    for addresses in CALLS:
        by_triton = given(started, addresses)
        for encodings in (len(descriptors), 0):
            before = fake.fake_encoded()
            assert given(started.fastest, addresses) == by_triton, step
            assert fake.fake_encoded() - before == encodings
        *grid_and_block, _, _, dependent, _ = struct.unpack_from("<8I", by_triton)
        assert grid_and_block == [step.grid, 1, 1, 32 * kernel.metadata.num_warps]
        assert dependent == step.dependent
        assert struct.unpack_from("<Q", by_triton, 32) == (STREAM,)
        at = 48
        encoded = iter(descriptors)
        for wanted, size in zip(parameters(kernel, step, addresses), sizes, strict=True):
            found = by_triton[at : at + size]
            if wanted is None:
                arg = next(encoded)
                address, *dims = struct.unpack_from(f"<{1 + len(arg.shape)}Q", found)
                assert address == addresses[arg.pointer.buffer] + arg.pointer.offset
                assert dims == list(reversed(arg.shape))
                (types,) = struct.unpack_from("<Q", found, 12 * 8)
                assert (types // 10000 == triton_compat.TFLOAT32) == arg.rounds
            else:
                assert found == wanted, (step, found, wanted)
            at += size
        assert at == len(by_triton)


def check_hooks(problem: Problem, step: Launch) -> None:
    """Triton's own way tells profilers of a launch."""
    kernel = compile_launch(problem, step)
    started = CompiledLaunch(kernel, step, [argument(arg) for arg in step.args])
    heard = []

    def hook(metadata) -> None:
        heard.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    started(CALLS[0], STREAM)
    assert heard == [kernel.name]
    knobs.runtime.launch_enter_hook.remove(hook)


def check_first_call() -> None:
    """Kernels are compiled in threads before the first is launched, and started directly later."""
    a, b = torch.zeros(1023, 1031).half(), torch.zeros(1031, 1025).half()
    launch.current_raw_stream = lambda index: STREAM
    launch.empty_strided_cuda = lambda size, stride, dtype: torch.empty(size, dtype=dtype)
    compilations, launched = [], []
    compile_kernel = triton.compiler.compile

    def compile_and_tell(*args, **kwargs):
        compilations.append((threading.current_thread(), len(launched)))
        return compile_kernel(*args, **kwargs)

    triton.compiler.compile = compile_and_tell
    knobs.runtime.launch_enter_hook.add(launched.append)
    plan = make_plan(launch.describe(a[None], b[None], "tf32", ARCHES["sm_90"]))
    call = launch.Call(a, b, "tf32", ARCHES["sm_90"], plan=plan)
    call(a, b)
    steps = len(call.plan.launches)
    assert steps == len(launched) > 1
    assert 1 < len(compilations) <= steps
    for thread, launches_before in compilations:
        assert thread is not threading.main_thread()
        assert launches_before == 0
    call(a, b)
    assert len(launched) == 2 * steps, "hooks are called"
    knobs.runtime.launch_enter_hook.remove(launched.append)
    call(a, b)
    assert len(launched) == 2 * steps
    assert all(isinstance(start, DirectLaunch) for start in call.fastest)


def check_compiled_before() -> None:
    """What compile_plan has compiled a first call finds, wherever its operands start."""
    wide = torch.zeros(1023 * 1031 + 1).half()
    for a in (wide[1:].view(1023, 1031), torch.zeros(300, 4096)):
        b = torch.zeros(a.shape[1], 1025, dtype=a.dtype)
        problem = launch.describe(a[None], b[None], "tf32", ARCHES["sm_90"])
        plan = make_plan(problem)
        running.compile_plan(problem, plan)
        with mock.patch.object(triton.compiler, "compile") as compile_kernel:
            launch.Call(a, b, "tf32", ARCHES["sm_90"], plan=plan)(a, b)
        compile_kernel.assert_not_called()


def check_rounding(fake: ctypes.CDLL) -> None:
    """A first call has TMA round already, and so have later ones, both ways."""
    a, b = torch.zeros(512, 512), torch.zeros(512, 768)
    problem = launch.describe(a[None], b[None], "tf32", ARCHES["sm_90"])
    (plan, *_) = (
        write_plan(problem, choice)
        for choice in choices(problem)
        if choice.tile.kernel == "gemm_tf32_hopper" and choice.split == 1
    )
    call = launch.Call(a, b, "tf32", ARCHES["sm_90"], plan=plan)
    for _ in range(2):
        call(a, b)
        first_descriptor = ctypes.string_at(fake.fake_last_launch(), 48 + 128)[48:]
        (types,) = struct.unpack_from("<Q", first_descriptor, 12 * 8)
        assert types // 10000 == triton_compat.TFLOAT32


def main() -> None:
    driver.set_active(Driver())
    fake = ctypes.CDLL("libcuda.so.1")
    fake.fake_last_launch.restype = ctypes.c_void_p
    fake.fake_last_launch_size.restype = ctypes.c_size_t
    names = []
    for problem, step in launches():
        check(fake, problem, step)
        names.append(step.kernel)
    check_hooks(problem, step)
    fake.fake_expect(0, None)
    check_first_call()
    check_compiled_before()
    check_rounding(fake)
    print("direct", *names)


if __name__ == "__main__":
    main()
