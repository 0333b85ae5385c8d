"""What a plan's kernels read from and write to DRAM: the L2 cache as a list of panels.

A panel is the part of an operand that one row (or column) of output tiles needs, or one tile of the
result: a few hundred kilobytes, of which blocks that run at the same time share each line. Panels
leave the cache least recently used first; what was written is written back then.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

Panel = tuple[Hashable, ...]


class Cache:
    """An L2 cache of ``capacity`` bytes, and the traffic behind it so far.

    It starts full of ``dirty`` bytes of something else: a benchmark that overwrites a buffer before
    each call leaves its lines to be written back during the call.

    Attributes:
        fetched, written_back: bytes read from and written to DRAM.
        exchanged: bytes read and written by the SMs.
    """

    def __init__(self, capacity: float, dirty: float = 0.0) -> None:
        self.capacity = capacity
        self.panels: OrderedDict[Panel, tuple[float, bool]] = OrderedDict()
        self.used = 0.0
        self.fetched = 0.0
        self.written_back = 0.0
        self.exchanged = 0.0
        # In pieces, so that a small read does not evict them all.
        pieces = 64
        for piece in range(pieces if dirty else 0):
            self.insert(("flush", piece), min(dirty, capacity) / pieces, dirty=True)

    def insert(self, panel: Panel, size: float, dirty: bool, last: bool = True) -> None:
        self.panels[panel] = (size, dirty)
        self.panels.move_to_end(panel, last)
        self.used += size
        while self.used > self.capacity and self.panels:
            _, (old_size, was_dirty) = self.panels.popitem(last=False)
            self.used -= old_size
            self.written_back += old_size if was_dirty else 0.0

    def forget(self, panel: Panel) -> bool:
        """Take a panel out without writing it; returns whether it was dirty."""
        size, dirty = self.panels.pop(panel)
        self.used -= size
        return dirty

    def read(self, panel: Panel, size: float, again: bool = True) -> None:
        """Read a panel; if it is not wanted ``again``, it makes room before all others do."""
        dirty = False
        self.exchanged += size
        if panel in self.panels:
            dirty = self.forget(panel)
        else:
            self.fetched += size
        self.insert(panel, size, dirty, last=again)

    def write(self, panel: Panel, size: float) -> None:
        self.exchanged += size
        if panel in self.panels:
            self.forget(panel)
        self.insert(panel, size, dirty=True)

    def traffic(self) -> tuple[float, float, float]:
        """Bytes (fetched, written back, exchanged) since the last call of this."""
        found = self.fetched, self.written_back, self.exchanged
        self.fetched = self.written_back = self.exchanged = 0.0
        return found


@dataclass(frozen=True)
class Tiles:
    """The tiles of a product in the order in which its blocks take them.

    Attributes:
        tiles_m, tiles_n: rows and columns of tiles.
        split, batch: how often all of them are computed.
        group_m: rows of tiles that are walked together, column by column.
    """

    tiles_m: int
    tiles_n: int
    split: int
    batch: int
    group_m: int

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """(batch item, split, row, column), as kernels/common.py's tile_coordinates has them."""
        for item in range(self.batch):
            for split in range(self.split):
                for first in range(0, self.tiles_m, self.group_m):
                    rows = range(first, min(first + self.group_m, self.tiles_m))
                    for n in range(self.tiles_n):
                        for m in rows:
                            yield item, split, m, n


def waves(blocks: Iterable, concurrent: int) -> Iterator[list]:
    """Blocks in groups that run at the same time."""
    wave = []
    for block in blocks:
        wave.append(block)
        if len(wave) == concurrent:
            yield wave
            wave = []
    if wave:
        yield wave
