"""Hopper's Gluon kernels run on CPU tensors, as they are written.

Triton's interpreter cannot run Gluon. Here the functions of kernels/*hopper*.py run as Python, with
another ``gl`` beneath them: tensors are PyTorch's, layouts mean nothing, partitions are threads,
and mbarriers are what they wait on. So indices, masks, slots, phases, the two kinds of stores and
the sums over K are tested without a GPU; what is not is the compiler, memory ordering, and time.

TMA's copies and wgmma happen where they are asked for. Shared memory starts undefined: what is read
too early is NaN. Who waits for what never comes fails, and so does who stores where something else
than NaN is: nothing is stored twice.
"""

import builtins
import queue
import threading
from collections.abc import Callable, Sequence
from types import FunctionType, ModuleType, SimpleNamespace

import torch

from fastmm_op.launches import Descriptor, Launch, Pointer
from fastmm_op.problem import COPY_BYTES, ITEMSIZE, cdiv

WAIT_SECONDS = 60
BARRIERS = object()  # the layout of shared memory that holds mbarriers


class Number(int):
    """An integer as kernels have them: it stays one, and can be asked for another width."""

    def to(self, dtype) -> "Number":
        return self


def _closed(name: str) -> Callable:
    operation = getattr(int, name)

    def of_numbers(self, other):
        found = operation(self, other)
        return Number(found) if type(found) is int else found

    return of_numbers


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(Number, f"__{_name}__", _closed(f"__{_name}__"))
    setattr(Number, f"__r{_name}__", _closed(f"__r{_name}__"))


def number(x):
    return Number(x) if type(x) is int else x


class Values(torch.Tensor):
    """A tensor in registers."""

    type = SimpleNamespace(layout=None)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> "Values":
        return self.view(dtype) if bitcast else super().to(dtype)

    def split(self) -> tuple["Values", "Values"]:
        return self[..., 0], self[..., 1]


def values(x: torch.Tensor) -> Values:
    return x.as_subclass(Values)


class Addresses:
    """Pointers to elements of one buffer."""

    def __init__(self, buffer: torch.Tensor, offsets=0) -> None:
        self.buffer, self.offsets = buffer, offsets
        element = SimpleNamespace(primitive_bitwidth=8 * buffer.itemsize, torch=buffer.dtype)
        self.dtype = SimpleNamespace(element_ty=element)

    def __add__(self, offsets) -> "Addresses":
        return Addresses(self.buffer, self.offsets + offsets)

    def picked(self, mask) -> tuple[torch.Tensor, torch.Tensor]:
        """The mask and the places it lets through, all of which have to be in the buffer."""
        offsets = torch.as_tensor(self.offsets).as_subclass(torch.Tensor)
        mask = torch.as_tensor(mask).as_subclass(torch.Tensor).expand(offsets.shape)
        places = offsets[mask].long()
        assert not places.numel() or (places.min() >= 0 and places.max() < self.buffer.numel())
        return mask, places


class Shared:
    """A piece of shared memory."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    @property
    def shape(self) -> list[int]:
        return [Number(size) for size in self.data.shape]

    def index(self, i: int) -> "Shared":
        return Shared(self.data[i])

    def reshape(self, shape: list[int]) -> "Shared":
        return Shared(self.data.view(shape))

    def permute(self, order: list[int]) -> "Shared":
        return Shared(self.data.permute(order))

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.data.narrow(dim, start, length))

    def load(self, layout) -> Values:
        return values(self.data.clone())

    def store(self, x: torch.Tensor) -> None:
        assert x.dtype is self.data.dtype
        self.data.copy_(x)


class Barrier:
    """An mbarrier: phases that end when all have arrived and all bytes have."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = None

    def init(self, count: int) -> None:
        self.count = self.missing = count
        self.bytes = self.phase = 0

    def arrive(self, count: int = 1, expected: int = 0, copied: int = 0) -> None:
        with self.changed:
            assert self.count is not None, "not initialised"
            self.missing -= count
            self.bytes += expected - copied
            assert self.missing >= 0, "more have arrived than the barrier counts"
            if self.missing == 0 and self.bytes == 0:
                self.phase ^= 1
                self.missing = self.count
                self.changed.notify_all()

    def wait(self, phase: int) -> None:
        """Until the phase of this parity has ended; the one before the first has."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase != phase, WAIT_SECONDS):
                raise TimeoutError("nobody arrives at a barrier")


class Barriers:
    def __init__(self, count: int) -> None:
        self.all = [Barrier() for _ in range(count)]

    def index(self, i: int) -> Barrier:
        return self.all[i]


def box_places(descriptor: Descriptor, start: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a box: elements' offsets, and which of them the tensor has; it starts where TMA can."""
    itemsize = ITEMSIZE[descriptor.pointer.dtype]
    assert start[-1] * itemsize % COPY_BYTES == 0
    assert all(stride * itemsize % COPY_BYTES == 0 for stride in descriptor.strides[:-1])
    offsets, there = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
    for first, size, stride, box in zip(
        start, descriptor.shape, descriptor.strides, descriptor.box, strict=True
    ):
        along = first + torch.arange(box)
        offsets = offsets[..., None] + along * stride
        there = there[..., None] & (along >= 0) & (along < size)
    return offsets[0], there[0]


class Tensor:
    """What a TMA descriptor describes."""

    def __init__(self, descriptor: Descriptor, memory: torch.Tensor) -> None:
        self.memory, self.descriptor = memory, descriptor
        self.dtype, self.layout = memory.dtype, None
        self.block_shape = list(descriptor.box)

    def read(self, start: list[int]) -> torch.Tensor:
        places, there = box_places(self.descriptor, start)
        found = torch.zeros(there.shape, dtype=self.dtype)
        found[there] = self.memory[places[there]]
        return rounded_to_tf32(found) if self.descriptor.rounds else found

    def write(self, start: list[int], box: torch.Tensor) -> None:
        places, there = box_places(self.descriptor, start)
        put(self.memory, places[there], box[there])


def rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """To nearest, ties to even; NaN and Inf stay."""
    bits = x.view(torch.int32)
    rounded = (bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF
    return torch.where(x.isfinite(), rounded, bits).view(torch.float32)


def load(addresses: Addresses, mask=True, other=0.0, cache_modifier: str = "") -> Values:
    mask, places = addresses.picked(mask)
    found = torch.full(mask.shape, other, dtype=addresses.buffer.dtype)
    found[mask] = addresses.buffer[places]
    return values(found)


def store(addresses: Addresses, x: torch.Tensor, mask=True, cache_modifier: str = "") -> None:
    mask, places = addresses.picked(mask)
    x = x.as_subclass(torch.Tensor).expand(mask.shape)
    put(addresses.buffer, places, x[mask].to(addresses.buffer.dtype))


def put(buffer: torch.Tensor, places: torch.Tensor, x: torch.Tensor) -> None:
    assert buffer[places].isnan().all(), "nothing is stored twice"
    buffer[places] = x


def where(condition, x, y):
    if any(isinstance(arg, torch.Tensor) for arg in (condition, x, y)):
        return torch.where(torch.as_tensor(condition), x, y)
    return number(x if condition else y)


def maximum(x, y):
    return torch.maximum(x, torch.as_tensor(y, dtype=x.dtype))


def minimum(x, y):
    return torch.minimum(x, torch.as_tensor(y, dtype=x.dtype))


def multiple_of(addresses: Addresses, multiple: int) -> Addresses:
    offsets = torch.as_tensor(addresses.offsets) * addresses.buffer.itemsize
    assert not (offsets % multiple).any(), "the kernel says so"
    return addresses


def expand_dims(x, dim: int):
    if isinstance(x, Addresses):
        return Addresses(x.buffer, x.offsets.unsqueeze(dim))
    return x.unsqueeze(dim)


def tensor_core_operand(x) -> torch.Tensor:
    """In fp32, without the bits that the tensor core does not read of it."""
    x = (x.data if isinstance(x, Shared) else x).as_subclass(torch.Tensor)
    if x.dtype is not torch.float32:
        return x.float()
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def warpgroup_mma(a, b: Shared, acc, use_acc: bool = True, is_async: bool = False) -> Values:
    product = tensor_core_operand(a) @ tensor_core_operand(b)
    return values(acc.as_subclass(torch.Tensor) + product if use_acc else product)


def add_half_of_tf32(x: torch.Tensor) -> Values:
    """kernels/tf32.py's, which is assembly."""
    rounds = x.abs() < 2.0**128 - 2.0**116
    bits = x.view(torch.int32) + 0x1000 * rounds.int()
    return values(torch.where(x == x, bits.view(torch.float32), x))


def warpgroup_mma_wait(pending: int, deps: tuple):
    return deps[0] if len(deps) == 1 else deps


def tma_load(tensor: Tensor, start: list[int], bar: Barrier, target: Shared) -> None:
    box = tensor.read(start)
    target.data.copy_(box.view(target.data.shape))
    bar.arrive(0, copied=box.numel() * box.itemsize)


def tma_store(tensor: Tensor, start: list[int], source: Shared) -> None:
    tensor.write(start, source.data.view(tensor.block_shape))


def arrive(bar: Barrier, pred: bool = True) -> None:
    if pred:
        bar.arrive()


def activated(x: torch.Tensor, activation: str, dtype) -> torch.Tensor:
    assert activation in ("none", "relu")
    x = x.relu() if activation == "relu" else x
    return x.to(getattr(dtype, "torch", dtype))


class Program:
    """One program of a launch: its ids, and the names that kernels use, as they are here."""

    def __init__(self, index: int, grid: int) -> None:
        self.modules: dict[str, dict] = {}
        nothing = lambda *args, **kwargs: None  # noqa: E731
        gl = SimpleNamespace(
            program_id=lambda axis: Number(index),
            num_programs=lambda axis: Number(grid),
            num_warps=lambda: 4,
            arange=lambda first, last, layout=None: values(torch.arange(first, last)),
            zeros=lambda shape, dtype, layout=None: values(torch.zeros(shape, dtype=dtype)),
            zeros_like=lambda x: values(torch.zeros_like(x)),
            allocate_shared_memory=self.allocate,
            warp_specialize=self.specialize,
            convert_layout=lambda x, layout, assert_trivial=False: x,
            cdiv=lambda a, b: Number(cdiv(a, b)),
            static_range=self.range,
            static_assert=self.static_assert,
            abs=torch.abs, maximum=maximum, minimum=minimum,
            max=lambda x, axis: values(x.amax(axis)), min=lambda x, axis: values(x.amin(axis)),
            load=load, store=store, where=where, multiple_of=multiple_of, expand_dims=expand_dims,
            float32=torch.float32, float16=torch.float16, bfloat16=torch.bfloat16,
            int64=torch.int64, int32=torch.int32, constexpr=None,
            SliceLayout=nothing, BlockedLayout=nothing, NVMMADistributedLayout=nothing,
            DotOperandLayout=nothing, SwizzledSharedLayout=nothing,
            NVMMASharedLayout=SimpleNamespace(get_default_for=nothing),
        )  # fmt: skip
        mbarrier = SimpleNamespace(
            MBarrierLayout=lambda: BARRIERS,
            init=lambda bar, count: bar.init(count),
            wait=lambda bar, phase: bar.wait(phase),
            expect=lambda bar, size: bar.arrive(expected=size),
            arrive=arrive,
        )
        self.names = {
            "gl": gl, "mbarrier": mbarrier, "tma": SimpleNamespace(store_wait=nothing),
            "tma_load": tma_load, "tma_store": tma_store, "warpgroup_mma": warpgroup_mma,
            "warpgroup_mma_wait": warpgroup_mma_wait, "fence_async_shared": nothing,
            "barrier": nothing, "let_next_start": nothing, "wait_for_previous": nothing,
            "store_layout": nothing, "transposed_store_layout": nothing, "activated": activated,
            "add_residual": lambda y, residual: y + residual, "add_half_of_tf32": add_half_of_tf32,
            "tl": gl,
            "range": self.range, "min": lambda *args: number(builtins.min(*args)),
        }  # fmt: skip

    @staticmethod
    def range(*args):
        return map(Number, builtins.range(*args))

    @staticmethod
    def static_assert(condition, message: str = "") -> None:
        assert condition, message

    @staticmethod
    def allocate(dtype: torch.dtype, shape: list[int], layout):
        if layout is BARRIERS:
            return Barriers(shape[0])
        undefined = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min
        return Shared(torch.full(shape, undefined, dtype=dtype))

    @staticmethod
    def specialize(partitions: list, warps: list[int], registers: list[int]) -> None:
        """All partitions at once; the first that fails is what this raises."""
        ended = queue.SimpleQueue()

        def run(function: Callable, args: tuple) -> None:
            try:
                ended.put(function(*args))
            except BaseException as error:  # whoever waits for this thread has to be told
                ended.put(error)

        for each in partitions:
            threading.Thread(target=run, args=each, daemon=True).start()
        for _ in partitions:
            outcome = ended.get()
            if outcome is not None:
                raise outcome

    def port(self, jitted) -> FunctionType:
        """A function of a kernel module as Python that finds these names."""
        function = jitted.fn
        return FunctionType(
            function.__code__, self.module(function.__globals__), argdefs=function.__defaults__
        )

    def module(self, names: dict) -> dict:
        """A module's names, ported; functions find each other in it."""
        key = names["__name__"]
        if key not in self.modules:
            found = self.modules[key] = {}
            for name, value in names.items():
                if name in self.names or isinstance(value, ModuleType):
                    continue
                if callable(getattr(value, "fn", None)):
                    value = self.port(value)
                found[name] = getattr(value, "value", value)
            found |= self.names
        return self.modules[key]


def run(step: Launch, kernel, memory: Callable[[Pointer], torch.Tensor]) -> None:
    """All programs of a launch of a Gluon kernel, one after the other.

    Args:
        memory: a 1-dimensional tensor of what lies at a pointer and after it, in its dtype.
    """

    def argument(arg):
        if isinstance(arg, Descriptor):
            return Tensor(arg, memory(arg.pointer))
        return Addresses(memory(arg)) if isinstance(arg, Pointer) else number(arg)

    args = [argument(arg) for arg in step.args]
    constexprs = {name: number(value) for name, value in step.constexprs.items()}
    for index in range(step.grid):
        program = Program(index, step.grid)
        # Parameters in their order: the launch's arguments, then its compile-time ones by name.
        program.port(kernel)(*args, **constexprs)
