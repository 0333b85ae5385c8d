"""Starts compiled kernels again with other addresses.

Two ways: Triton's own launcher, and its C function directly with what the launcher would give it,
which takes the host a fraction of the time and is the usual way.
"""

import copy
from collections.abc import Callable

from fastmm_op import triton_compat
from fastmm_op.launches import Descriptor, Launch, Pointer

# Encoded descriptors (256 bytes) kept an argument. PyTorch's allocator returns to a few addresses.
MAX_ENCODED = 32


class Address:
    """Stands for a tensor in a TMA descriptor, of which Triton's launcher asks only this."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class CompiledLaunch:
    """A compiled kernel with all its arguments but the addresses, for Triton's own launcher.

    Calling it skips what the launcher does to find the kernel again; profilers' hooks are called.

    Args:
        kernel: Triton's ``CompiledKernel``.
        step: what it was compiled for.
        args: the launch's arguments, with tensors for pointers and TensorDescriptors for
            descriptors. The tensors are not kept.

    Attributes:
        fastest: what starts the same kernel fastest, if no hook is installed: a ``DirectLaunch``,
            or this.
    """

    def __init__(self, kernel, step: Launch, args: list) -> None:
        grid = (step.grid, 1, 1)
        self.start = kernel[grid]
        self.template = [*args, *step.constexprs.values()]
        self.pointers = []
        self.descriptors = []
        for i, arg in enumerate(step.args):
            if isinstance(arg, Pointer):
                self.template[i] = None
                self.pointers.append((i, arg.buffer, arg.offset))
            elif isinstance(arg, Descriptor):
                first = Address(args[i].base.data_ptr())
                self.template[i] = copy.copy(args[i])
                self.template[i].base = first
                self.descriptors.append((i, arg.pointer.buffer, arg.pointer.offset))
        self.fastest = direct_launch(kernel, grid, self) or self

    def __call__(self, addresses: dict[str, int], stream: int) -> None:
        args = self.template.copy()
        for i, buffer, offset in self.pointers:
            args[i] = addresses[buffer] + offset
        for i, buffer, offset in self.descriptors:
            args[i] = copy.copy(args[i])
            args[i].base = Address(addresses[buffer] + offset)
        self.start(*args, stream=stream)


class EncodedDescriptor:
    """A descriptor argument of one kernel: encoded once for an address, then remembered.

    All else that an encoding depends on is the template's and the kernel's, which do not change; a
    CUtensorMap refers to no device, stream or allocation, so it holds wherever the address does.

    Args:
        template: a host TensorDescriptor, of any address.
        encode: makes an encoded descriptor of such a one.
    """

    def __init__(self, template, encode: Callable[[object], object]) -> None:
        self.template = template
        self.encode = encode
        self.known: dict[int, object] = {}

    def __call__(self, address: int) -> object:
        """Encode it for an address that ``known`` does not have."""
        moved = object.__new__(type(self.template))
        moved.__dict__.update(self.template.__dict__)  # what copy.copy does, but slowly
        moved.base = Address(address)
        encoded = self.encode(moved)
        if len(self.known) >= MAX_ENCODED:
            self.known.clear()
        self.known[address] = encoded
        return encoded


class DirectLaunch:
    """A recorded launch, started by Triton's C function with other addresses on any stream.

    Args:
        recorded: the launch; its addresses and encoded descriptors are replaced.
        pointers: (place in ``recorded.args``, buffer, offset in bytes).
        descriptors: the same, and what encodes it.
    """

    def __init__(
        self,
        recorded: triton_compat.Recorded,
        pointers: list[tuple[int, str, int]],
        descriptors: list[tuple[int, str, int, EncodedDescriptor]],
    ) -> None:
        self.kernel = recorded.kernel
        self.start = recorded.start
        self.before = recorded.before
        self.after = recorded.after
        self.as_list = recorded.as_list
        self.template = recorded.args
        self.pointers = pointers
        self.descriptors = [
            (i, buffer, offset, encode.known, encode) for i, buffer, offset, encode in descriptors
        ]
        for i, *_ in (*pointers, *descriptors):
            self.template[i] = None

    def __call__(self, addresses: dict[str, int], stream: int) -> None:
        # A copy: other threads make the same call.
        args = self.template.copy()
        for i, buffer, offset in self.pointers:
            args[i] = addresses[buffer] + offset
        for i, buffer, offset, known, encode in self.descriptors:
            address = addresses[buffer] + offset
            args[i] = known.get(address) or encode(address)
        if self.as_list:
            self.start(*self.before, stream, *self.after, args)
        else:
            self.start(*self.before, stream, *self.after, *args)


def direct_launch(
    kernel, grid: tuple[int, int, int], launch: CompiledLaunch
) -> DirectLaunch | None:
    """The same launch by Triton's C function; None if this Triton does not allow it."""
    args = launch.template.copy()
    marks = [object() for _ in launch.pointers]
    for mark, (i, _, _) in zip(marks, launch.pointers, strict=True):
        args[i] = mark
    recorded = triton_compat.record(kernel, grid, args)
    if recorded is None:
        return None
    places = [[i for i, arg in enumerate(recorded.args) if arg is mark] for mark in marks]
    encoded = [i for i, arg in enumerate(recorded.args) if triton_compat.is_encoded_descriptor(arg)]
    metadata = triton_compat.descriptor_metadata(kernel) or []
    if any(len(place) != 1 for place in places) or not (
        len(encoded) == len(metadata) == len(launch.descriptors)
    ):
        return None
    pointers = [
        (place, buffer, offset)
        for (place,), (_, buffer, offset) in zip(places, launch.pointers, strict=True)
    ]
    descriptors = [
        (place, buffer, offset, EncodedDescriptor(launch.template[i], triton_compat.encoder(meta)))
        for place, meta, (i, buffer, offset) in zip(
            encoded, metadata, launch.descriptors, strict=True
        )
    ]
    return DirectLaunch(recorded, pointers, descriptors)
