"""What torch's allocator reserves on a card for blocks that come and go: its rules, replayed. No torch.

Small blocks and large ones lie in a range of addresses each, which is mapped page by page (`expandable_segments`). A
block is cut from the smallest free one that is large enough; next to what is not mapped, one counts as large as it may
grow. Where none is, pages are mapped at the lowest address that has room. Free neighbours join. Nothing is unmapped
until it is asked for, or a limit is in the way.
Source: c10/cuda/CUDACachingAllocator.cpp of torch 2.11.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable
from dataclasses import dataclass, field

__all__ = ["MARK", "PRODUCT", "Allocator", "Block", "block_bytes"]

Block = tuple[int, int]
"""(its number, its bytes), where it is taken; (its number, 0), where it goes."""
MARK: Block = (0, 0)
"""Among them: the next expert's weights come here, where this step is the last before it."""
PRODUCT: Block = (-1, 0)
"""Among them: the first product of matrices was made, which brings cuBLAS's workspace."""

BLOCK = 512
"""Bytes: kMinBlockSize."""
SMALL = 2**20
"""Bytes: kSmallSize, the largest that lies with small ones."""
PAGES = {True: 2 * 2**20, False: 20 * 2**20}
"""Bytes of a page for small ones, and for large: kSmallBuffer, kLargeBuffer."""
LARGE = 10 * 2**20
"""Bytes: kMinLargeAlloc. What is smaller asks for a page, what is not for itself in steps of kRoundLarge."""
ADDRESSES = 2**50


def block_bytes(bytes: int) -> int:
    """What the allocator gives for `bytes`."""
    return -(-bytes // BLOCK) * BLOCK


class Allocator:
    """Blocks by a key of the caller's.

    Args:
        limit_bytes: that may be reserved; None: there is room for all. What does not fit is reserved all the same.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self._limit = limit_bytes
        self._ranges = {small: _Range(page) for small, page in PAGES.items()}
        self._where: dict[Hashable, _Range] = {}
        self.peak_bytes = 0
        """Reserved at most since `forget`."""

    @property
    def reserved_bytes(self) -> int:
        return sum(each.mapped for each in self._ranges.values())

    def take(self, key: Hashable, bytes: int) -> None:
        size = block_bytes(bytes)
        if not size:
            return
        there = self._ranges[size <= SMALL]
        if not there.has(size) and self._limit is not None:
            asked = PAGES[size <= SMALL] if size < LARGE else -(-size // 2**21) * 2**21
            if self.reserved_bytes + asked > self._limit:
                self.trim()
        there.take(key, size)
        self._where[key] = there
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)

    def give(self, key: Hashable) -> None:
        """What was never taken is passed over."""
        if there := self._where.pop(key, None):
            there.give(key)

    def trim(self) -> None:
        """Unmap all pages that nothing lies on, as `torch.cuda.empty_cache` does."""
        for each in self._ranges.values():
            each.trim()

    def forget(self) -> None:
        """The peak begins anew."""
        self.peak_bytes = self.reserved_bytes


@dataclass(slots=True)
class _Range:
    page: int
    mapped: int = 0
    taken: dict[Hashable, tuple[int, int]] = field(default_factory=dict)
    """Block -> where it begins and ends."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Of free blocks, in order: bytes, and where it begins."""
    begins: dict[int, int] = field(default_factory=dict)
    """Where a free block begins -> where it ends."""
    ends: dict[int, int] = field(default_factory=dict)
    holes: dict[int, int] = field(default_factory=lambda: {0: ADDRESSES})
    """What is not mapped: where it begins, lowest first -> where it ends."""

    def has(self, size: int) -> bool:
        """Whether a free block is as large."""
        return bool(self.sizes) and self.sizes[-1][0] >= size

    def take(self, key: Hashable, size: int) -> None:
        begin = self._best(size) if self.has(size) else self._grown(size)
        end = self._out(begin)
        self.taken[key] = begin, begin + size
        if begin + size < end:
            self._into(begin + size, end)

    def give(self, key: Hashable) -> None:
        self._into(*self.taken.pop(key))

    def trim(self) -> None:
        for begin, end in list(self.begins.items()):
            first, last = -(-begin // self.page) * self.page, end // self.page * self.page
            if first >= last:
                continue
            self._out(begin)
            for rest in ((begin, first), (last, end)):
                if rest[0] < rest[1]:
                    self._into(*rest)
            self.mapped -= last - first
            self.holes[first] = last
        joined: dict[int, int] = {}
        at = None
        for begin, end in sorted(self.holes.items()):
            at = at if at is not None and joined[at] == begin else begin
            joined[at] = end
        self.holes = joined

    def _best(self, size: int) -> int:
        at = bisect_left(self.sizes, (size, 0))
        while at + 1 < len(self.sizes) and self._may_grow_to(at + 1) < self._may_grow_to(at):
            at += 1
        return self.sizes[at][1]

    def _may_grow_to(self, at: int) -> int:
        size, begin = self.sizes[at]
        return self.holes.get(begin + size, begin + size) - begin

    def _grown(self, size: int) -> int:
        """Where a free block of at least `size` begins, for which pages were mapped."""
        hole, begin = next((hole, begin) for hole in self.holes if self._room(begin := self.ends.get(hole, hole), size))
        end = hole
        if begin < hole:
            self._out(begin)
        while end - begin < size:
            far = self.holes.pop(end)
            near = min(far, end + -(-(size - (end - begin)) // self.page) * self.page)
            self.mapped += near - end
            if near < far:
                self.holes[near] = far
            end = near
            if end in self.begins:
                end = self._out(end)
        self.holes = dict(sorted(self.holes.items()))
        self._into(begin, end)
        return begin

    def _room(self, begin: int, size: int) -> bool:
        """Whether as much from `begin` on is free, or not mapped."""
        end: int | None = begin
        last = begin
        while end is not None and last - begin < size:
            end = self.begins.get(last) or self.holes.get(last)
            last = end or last
        return last - begin >= size

    def _into(self, begin: int, end: int) -> None:
        """It is free, with the free ones beside it."""
        if end in self.begins:
            end = self._out(end)
        if begin in self.ends:
            begin = self.ends[begin]
            self._out(begin)
        insort(self.sizes, (end - begin, begin))
        self.begins[begin], self.ends[end] = end, begin

    def _out(self, begin: int) -> int:
        """Where the free block that begins there ends; it is none any more."""
        end = self.begins.pop(begin)
        del self.ends[end]
        del self.sizes[bisect_left(self.sizes, (end - begin, begin))]
        return end
