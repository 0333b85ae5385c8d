"""The space that a search walks: the planner's choices, and other pipeline depths of their tiles.

Pure, as planning is; what is measured and kept is the matter of tune.py and cache.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

from fastmm_op.choices import choices, classes_as_batch
from fastmm_op.estimate import estimate
from fastmm_op.problem import Problem
from fastmm_op.shared_memory import shared_memory
from fastmm_op.tiles import Choice

# Pipeline depths that may be tried for a plain Triton tile. The Hopper kernel's tiles have as many
# as shared memory holds, and the one-wide kernel has no pipeline.
STAGES = (1, 2, 3, 4)


def legal(problem: Problem, stages: Sequence[int] = ()) -> Iterator[Choice]:
    """Every choice that may run: the planner's, then each again with other numbers of stages.

    Args:
        stages: of STAGES; numbers that fit shared memory are tried for plain Triton tiles.

    None for a product with a size of zero, which is not computed by any kernel.
    """
    if 0 in (problem.batch, problem.M, problem.N, problem.K):
        return
    yield from choices(problem)
    for choice in choices(problem) if stages else ():
        yield from other_stages(problem, choice, stages)


def other_stages(problem: Problem, choice: Choice, stages: Sequence[int]) -> Iterator[Choice]:
    """The choice with other numbers of pipeline stages that fit shared memory, if it has any."""
    if choice.tile.kernel != "gemm":
        return
    by_classes = choice.b_classes > 1
    product = classes_as_batch(problem, choice.b_classes) if by_classes else problem
    for count in stages:
        other = replace(choice, tile=replace(choice.tile, num_stages=count))
        if other != choice and shared_memory(product, other) <= problem.arch.shared_memory:
            yield other


def shortlist(problem: Problem, top: int | None, stages: Sequence[int] = ()) -> list[Choice]:
    """What to measure, the planner's own choice first.

    Args:
        top: so many choices with the smallest estimates, and the best of every road that is not
            among them; all choices if None.
        stages: as ``legal``; tried for each of them.
    """
    ranked = sorted(legal(problem), key=lambda choice: estimate(problem, choice))
    picked = ranked[:top]
    seen = {road(choice) for choice in picked}
    for choice in ranked[len(picked) :]:
        if road(choice) not in seen:
            seen.add(road(choice))
            picked.append(choice)
    return [c for choice in picked for c in (choice, *other_stages(problem, choice, stages))]


def road(choice: Choice) -> tuple:
    """How a choice goes about it, whatever its tile: what is packed and split, which kernel."""
    others = tuple(
        getattr(choice, f.name)
        for f in fields(choice)
        if f.name not in ("tile", "split", "tail_split", "slabs", "edge_n", "b_classes")
    )
    shares = (choice.split > 1, choice.tail_split > 1, choice.slabs > 1, choice.b_classes > 1)
    return (choice.tile.kernel, choice.edge_n > 0, *shares, *others)


def label(choice: Choice) -> str:
    """A choice in a few words: ``"a+b packed, gemm 128x256x32, 3 stages, split 2"``."""
    tile = choice.tile
    packed = [name for name, is_packed in (("a", choice.pack_a), ("b", choice.pack_b)) if is_packed]
    parts = [f"{'+'.join(packed)} packed"] if packed else []
    parts.append(f"{tile.kernel} {tile.block_m}x{tile.block_n}x{tile.block_k}")
    if tile.kernel != "gemv":
        parts.append(f"{tile.num_stages} stage{'s' if tile.num_stages > 1 else ''}")
    if choice.slabs > 1:
        parts.append(f"{choice.slabs} slabs")
    if choice.b_classes > 1:
        parts.append(f"{choice.b_classes} classes")
    if choice.split > 1:
        parts.append(f"split {choice.split}")
    if choice.tail_split > 1:
        parts.append(f"tail split {choice.tail_split}")
    if choice.edge_n:
        parts.append(f"edge {choice.edge_n}")
    return ", ".join(parts)
