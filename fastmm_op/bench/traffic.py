"""What each kernel of a plan moves through the L2 cache, and how often its main loop goes round."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastmm_op.bench.gpu_model import Kernel, global_bytes
from fastmm_op.bench.l2 import Cache, Tiles, waves
from fastmm_op.codegen import Resources
from fastmm_op.launches import Launch, Pointer
from fastmm_op.packing import PACKING_KERNELS
from fastmm_op.problem import ITEMSIZE, cdiv


@dataclass(frozen=True)
class Step:
    """One launch of a plan, compiled.

    Attributes:
        launch: as planned.
        found: what the compiler made.
        kernel: the same, for the model.
        args: the launch's arguments by the names that the kernel gives them.
    """

    launch: Launch
    found: Resources
    kernel: Kernel
    args: dict[str, object]


def panel_rows(steps: list[Step]) -> dict[str, int]:
    """Rows of one panel of ``"a"`` and ``"b"``: the plan's tiles."""
    tile = next((step.launch.constexprs for step in steps if step.launch.kernel == "gemm"), {})
    return {"a": tile.get("BLOCK_M", 128), "b": tile.get("BLOCK_N", 128)}


def key(pointer: Pointer) -> tuple[str, int]:
    """A buffer, in the cache's words."""
    return pointer.buffer, pointer.offset


def packed_panels(step: Step, rows: int) -> Iterator[tuple[tuple[int, int], int]]:
    """(item and number, rows) of an operand's panels in the order in which packing walks them."""
    total = step.args["R"]
    for item in range(operand_items(step)):
        for panel in range(cdiv(total, rows)):
            yield (item, panel), min(rows, total - panel * rows)


def operand_items(step: Step) -> int:
    """Batch items that a packing kernel goes through, read off its grid."""
    args, constexprs = step.args, step.launch.constexprs
    strips, wraps = (cdiv(rows, constexprs["BLOCK_R"]) for rows in (args["R"], args["wrap"]))
    blocks = strips + wraps
    if step.launch.kernel != "pack_rows":
        blocks *= cdiv(args["pitch"], constexprs["BLOCK_K"])
    if step.launch.kernel == "pack_strips":
        blocks += strips * cdiv(args["K"], constexprs["BLOCK_K"])
    return step.launch.grid // blocks


def balance(step: Step, cache: Cache, rows: dict[str, int], slots: int) -> float:
    """A sample of each operand's rows, for every K; what it is is in kernels/balance.py."""
    args = step.args
    for operand in (args["a_ptr"], args["b_ptr"]):
        sampled = 32 * args["K"] * ITEMSIZE[operand.dtype]
        cache.read((*key(operand), "sample"), sampled * step.launch.grid / blocks_along_k(step))
    return 0.0


def blocks_along_k(step: Step) -> int:
    return cdiv(step.args["K"], step.launch.constexprs["BLOCK_K"])


def pack(step: Step, cache: Cache, rows: dict[str, int], slots: int) -> float:
    """Whole rows, or tiles, each once; strips a second time, soon after the first."""
    source, target = step.args["x_ptr"], step.args["packed_ptr"]
    read = step.args["K"] * ITEMSIZE[source.dtype]
    written = step.args["pitch"] * 2 * step.launch.constexprs.get("PARTS", 1)
    in_strips = step.launch.kernel == "pack_strips"
    # EF: "evict first".
    again = not any(name.startswith("LDG.E.EF") for name in step.found.opcodes)
    for panel, height in packed_panels(step, rows[source.buffer]):
        if in_strips:
            cache.read((*key(source), *panel), height * read)
        cache.read((*key(source), *panel), height * read, again)
        cache.write((*key(target), *panel), height * written)
    return 0.0


def unrolled(step: Step, elements: int, dtype: str) -> float:
    """Trips through the machine code's loop for each trip of the kernel's own.

    Args:
        elements: loaded in a trip of the kernel's own, by a block.
        dtype: of the elements.
    """
    loads = {name: n for name, n in step.kernel.loop.items() if name.startswith("LDG.")}
    loaded = global_bytes(loads, step.launch.num_warps)
    # What is loaded beside (a vector, say) is small: it rounds away.
    return 1.0 / max(1, round(loaded / (elements * ITEMSIZE[dtype])))


def gemm(step: Step, cache: Cache, rows: dict[str, int], slots: int) -> float:
    args, constexprs = step.args, step.launch.constexprs
    a, b, c = args["a_ptr"], args["b_ptr"], args["c_ptr"]
    block_m, block_n, block_k = (constexprs[f"BLOCK_{side}"] for side in "MNK")
    split, depth = args["split_k"], args["K"] / args["split_k"]
    tiles = Tiles(
        cdiv(args["M"], block_m),
        cdiv(args["N"], block_n),
        split,
        args["batch"],
        constexprs["GROUP_M"],
    )
    a_shared, b_shared = args["stride_ab"] == 0, args["stride_bb"] == 0
    parts = operand_parts(step, (block_m + block_n) * block_k * ITEMSIZE[a.dtype])
    a_row, b_row = (depth * parts * ITEMSIZE[operand.dtype] for operand in (a, b))

    def height(tile: int) -> int:
        return min(block_m, args["M"] - tile * block_m)

    def breadth(tile: int) -> int:
        return min(block_n, args["N"] - tile * block_n)

    for wave in waves(tiles, slots):
        # Blocks of a wave are at about the same K: each panel is fetched once.
        a_panels = {(0 if a_shared else item, m, s) for item, s, m, _ in wave}
        b_panels = {(0 if b_shared else item, n, s) for item, s, _, n in wave}
        for item, m, s in sorted(a_panels):
            read_part(cache, (*key(a), item, m), s, split, height(m) * a_row)
        for item, n, s in sorted(b_panels):
            read_part(cache, (*key(b), item, n), s, split, breadth(n) * b_row)
        for item, s, m, n in wave:
            size = height(m) * breadth(n) * ITEMSIZE[c.dtype]
            cache.write((*key(c), item, s, m, n), size)
    return cdiv(args["K"] // block_k, split)


def operand_parts(step: Step, tile_bytes: int) -> int:
    """Numbers that stand for one element of an operand: what a trip loads over its tiles' size."""
    loaded = global_bytes(step.kernel.loop, step.launch.num_warps)
    return max(1, round(loaded / tile_bytes))


def read_part(cache: Cache, panel: tuple, part: int, parts: int, size: float) -> None:
    """One of ``parts`` of a panel; as a whole where packing left it so."""
    if panel in cache.panels:
        cache.read(panel, size * parts)
    else:
        cache.read((*panel, part) if parts > 1 else panel, size)


def reduce(step: Step, cache: Cache, rows: dict[str, int], slots: int) -> float:
    args, constexprs = step.args, step.launch.constexprs
    partial = key(args["partial_ptr"])
    elements = args["M"] * args["N"] * args["batch"]
    total = elements * args["split_k"] * 4
    kept = [(p, size) for p, (size, _) in cache.panels.items() if p[:2] == partial]
    for panel, size in kept:
        cache.read(panel, size)
    cache.read(("partial sums that left L2",), max(0.0, total - sum(size for _, size in kept)))
    cache.write(("c", 0), elements * ITEMSIZE[args["c_ptr"].dtype])
    trips = cdiv(args["split_k"], constexprs["BLOCK_S"])
    return trips * unrolled(step, constexprs["BLOCK_S"] * constexprs["BLOCK_N"], "fp32")


def gemv(step: Step, cache: Cache, rows: dict[str, int], slots: int) -> float:
    args, constexprs = step.args, step.launch.constexprs
    matrix = args["w_ptr"]
    elements = args["R"] * args["K"] * (args["batch"] if args["stride_wb"] else 1)
    pieces = 64
    for piece in range(pieces):
        cache.read((*key(matrix), piece), elements / pieces * ITEMSIZE[matrix.dtype])
    sums = args["R"] * args["batch"] * args["split_k"] * ITEMSIZE[args["y_ptr"].dtype]
    cache.write((*key(args["y_ptr"]), 0), sums)
    trips = cdiv(cdiv(args["K"], constexprs["BLOCK_K"]), args["split_k"])
    return trips * unrolled(step, constexprs["BLOCK_R"] * constexprs["BLOCK_K"], matrix.dtype)


# A function a kernel: it moves the kernel's panels (of so many rows of A and B) through the cache,
# where so many blocks run at once, and returns the trips of one block through the main loop.
TRAFFIC: dict[str, Callable[[Step, Cache, dict[str, int], int], float]] = {
    "balance": balance,
    "pack_rows": pack,
    "pack_strips": pack,
    "copy_tiles": pack,
    "gemm": gemm,
    "reduce": reduce,
    "gemv": gemv,
}
# Kernels whose blocks share nothing: what they exchange with the cache is each panel once.
SHARE_NOTHING = PACKING_KERNELS
