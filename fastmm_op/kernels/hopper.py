"""What the persistent Gluon kernels for Hopper share: work items, rings, TMA and its descriptors.

Of Triton 3.6 to 3.9 some names differ. Where one is missing, importing this raises ImportError, and
Hopper gets plans of plain Triton (running.py).
"""

import dataclasses

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.9 renamed them.
tma_load = getattr(tma, "async_load", None) or getattr(tma, "async_copy_global_to_shared", None)
tma_store = getattr(tma, "async_store", None) or getattr(tma, "async_copy_shared_to_global", None)
barrier = getattr(gl, "barrier", None) or getattr(gl, "thread_barrier", None)  # since 3.7; 3.6
if None in (tma_load, tma_store, barrier) or not hasattr(gl, "warp_specialize"):
    raise ImportError(f"Gluon of Triton {triton.__version__} lacks TMA or warp_specialize")

# Of Triton 3.6 it is asked otherwise (triton_compat.round_as_copied).
ROUNDS_BY_FIELD = "round_f32_to_tf32" in {f.name for f in dataclasses.fields(TensorDescriptor)}


@gluon.jit
def count_work(tiles, whole, split_k, TAIL: gl.constexpr):
    """Work items of so many tiles, batch included."""
    if TAIL:
        return whole + (tiles - whole) * split_k
    else:
        return tiles * split_k


@gluon.jit
def work_item(
    work, tiles_m, tiles_n, batch, whole, split_k, GROUP_M: gl.constexpr, TAIL: gl.constexpr
):
    """Where its tile is, which share of K it takes, and of how many.

    TAIL: tiles before `whole` are one item each, the others split_k: first the first shares of
    all of them, then the second ones. Else all tiles are counted once a split.
    """
    tiles = tiles_m * tiles_n
    if TAIL:
        tail_tiles = tiles * batch - whole
        in_tail = work >= whole
        after = gl.where(in_tail, work - whole, 0)
        split = after // tail_tiles
        splits = gl.where(in_tail, split_k, 1)
        work = gl.where(in_tail, whole + after % tail_tiles, work)
    z = work // tiles  # split * batch + batch index
    if not TAIL:
        split = z // batch
        splits = split_k
    tile = work % tiles
    group_size = GROUP_M * tiles_n
    first_m = tile // group_size * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    pid_m = first_m + tile % group_size % rows
    pid_n = tile % group_size // rows
    return pid_m, pid_n, z, split, splits


@gluon.jit
def share_of(steps, split, splits):
    """First and last of so many steps in one of splits shares, whose lengths differ by one."""
    each = steps // splits
    more = steps % splits  # shares, the first ones, have one step more
    first = split * each + min(split, more)
    return first, first + each + gl.where(split < more, 1, 0)


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def before(stage, STAGES: gl.constexpr):
    # Not a variable `previous = stage` of the loop: Triton 3.6 and 3.7 take that for a constant.
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def matrix_view(slot, K_INNER: gl.constexpr):
    """What TMA has brought, (1, rows, K) or (1, K, rows), as (rows, K)."""
    view = slot.reshape([slot.shape[1], slot.shape[2]])
    return view if K_INNER else view.permute([1, 0])


def box_layout(box: tuple[int, ...], dtype: str) -> gl.NVMMASharedLayout:
    """How a TMA box lies in shared memory, for wgmma too."""
    element = {"fp16": gl.float16, "bf16": gl.bfloat16, "fp32": gl.float32}[dtype]
    return gl.NVMMASharedLayout.get_default_for(list(box), element)


def tensor_descriptor(tensor, shape, strides, box, dtype: str, rounds: bool) -> TensorDescriptor:
    """A host TMA descriptor of a torch tensor's memory; sizes and strides in elements.

    rounds: TMA is to round fp32 to TF32 as it copies.
    """
    layout = box_layout(box, dtype)
    descriptor = TensorDescriptor(tensor, list(shape), list(strides), list(box), layout)
    if rounds and ROUNDS_BY_FIELD:
        descriptor.round_f32_to_tf32 = True
    return descriptor


def descriptor_type(box: tuple[int, ...], dtype: str) -> str:
    """The type of such a descriptor in a kernel's signature."""
    return f"tensordesc<{dtype}{list(box)},{box_layout(box, dtype)!r}>"
