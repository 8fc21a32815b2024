"""What torch's allocator will have reserved in every phase: a dry run's blocks, replayed in a run's order. No torch.

What a run needs is told apart (`PhaseEstimate.peak_vram_bytes`): where there is room, the allocator takes more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from framefit.ledger.allocator import MARK, PRODUCT, Allocator, Block
from framefit.planning.phase import PhaseTrace
from framefit.rates import CUBLASLT_BYTES

__all__ = ["reserved"]

TIMES = 3
"""That a step is replayed at most: those after it find what it found."""


def reserved(
    traces: Sequence[PhaseTrace], steps: Mapping[str, int], limit_bytes: int | None, cublas_bytes: int
) -> dict[str, int]:
    """Phase -> bytes, when they are most. Nothing is given back but where weights go (`Offloaded.use`), or a limit is
    in the way: what a phase leaves to the allocator is reserved in the next one, too.

    Args:
        steps: phase -> how often its trace is gone through; once where nothing is told.
        limit_bytes: that may be reserved; None: there is room for all.
        cublas_bytes: of its workspace, cuBLASLt's too, which comes with the first product and stays.
    """
    card, found, stepped = _Card(Allocator(limit_bytes), cublas_bytes), dict[str, int](), False
    gone_through = [trace for trace in traces if steps.get(trace.name, 1)]
    for trace, following in zip(gone_through, (*gone_through[1:], None), strict=True):
        first = trace.begins if stepped else (*trace.begins[: -1 - trace.after_one], *trace.begins[-1:])
        card.keep(first)
        card.allocator.forget()
        card.bring(trace)
        times = min(TIMES, steps.get(trace.name, 1))
        for index in range(times):
            swaps = index == times - 1 and following is not None and following.name.startswith("denoise")
            card.go(trace, trace.begins if index else first, following if swaps else None)
        stepped = stepped or trace.after_one > 0
        found[trace.name] = card.allocator.peak_bytes
    return found


@dataclass(slots=True)
class _Card:
    allocator: Allocator
    cublas_bytes: int
    """Of the workspace that is to come."""
    weights: tuple[str, ...] = ()
    """The components whose they are."""
    rooms: list[int] = field(default_factory=list)
    """Blocks that they lie in."""
    alive: dict[int, int] = field(default_factory=dict)
    """Of all else, the newest last."""
    names: count[int] = field(default_factory=count)

    def bring(self, trace: PhaseTrace) -> None:
        """The weights of a phase are here, and where weights come and go, no others."""
        if self.weights == tuple(trace.weights_bytes):
            return
        self.weights = tuple(trace.weights_bytes)
        for room in self.rooms:
            self.allocator.give(room)
        if self.rooms:
            self.allocator.trim()
        self.rooms = [self.take(size) for size in trace.rooms or (sum(trace.weights_bytes.values()),)]

    def take(self, bytes: int) -> int:
        name = next(self.names)
        self.allocator.take(name, bytes)
        return name

    def keep(self, begins: Sequence[Block]) -> dict[int, int]:
        """What a phase begins with is alive, where it lies, and nothing else. Returns number -> block.

        Every phase numbers anew, so that sizes tell what is the same: the latents, which come last, are the newest, all
        else is the oldest that there is.
        """
        now: dict[int, int] = {}
        left = self.alive
        for number, size in (*begins[-1:], *begins[:-1]):
            like = [name for name, of in left.items() if of == size]
            name = self.take(size) if not like else like[0] if now else like[-1]
            left.pop(name, None)
            now[number] = name
        for name in left:
            self.allocator.give(name)
        self.alive = {now[number]: size for number, size in begins}
        return now

    def go(self, trace: PhaseTrace, begins: Sequence[Block], following: PhaseTrace | None) -> None:
        """Through a phase's blocks; from its mark on the weights of the expert that follows are here."""
        now = self.keep(begins)
        for number, size in trace.blocks:
            if (number, size) == MARK:
                if following:
                    self.bring(following)
            elif (number, size) == PRODUCT:
                self.take(max(0, self.cublas_bytes - CUBLASLT_BYTES))
                self.take(min(self.cublas_bytes, CUBLASLT_BYTES))
                self.cublas_bytes = 0
            elif size:
                now[number] = name = self.take(size)
                self.alive[name] = size
            elif (gone := now.pop(number, None)) is not None:
                self.allocator.give(gone)
                del self.alive[gone]
