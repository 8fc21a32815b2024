"""What a dry run finds of one phase: nouns that a file can hold. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from framefit.ledger.allocator import Block
from framefit.rates import Quantity, Sort

__all__ = ["Given", "PhaseTrace", "Pieces"]

ROWS = ("blocks", "layers", "block_shares", "layer_shares")
"""Of `Pieces`, a figure for each."""
Given = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (precision as torch calls it, shape): tensors that one phase gives to another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """The weights of one component, cut as offloading moves them. All in bytes."""

    bytes: int
    """Of the whole, as an allocator gives them."""
    tables_bytes: int
    """Of these, token tables, which stay in host memory where something streams."""
    blocks: tuple[int, ...]
    """Of every block, in the model's order; empty: it comes as a whole always."""
    layers: tuple[int, ...]
    """Of every layer, likewise."""
    block_shares: tuple[float, ...] = ()
    """Of the seconds in which the component computes, those from when a block is called until the next one is."""
    layer_shares: tuple[float, ...] = ()
    """Of every layer, likewise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseTrace:
    """One phase of a run; of denoising one step."""

    name: str
    weights_bytes: Mapping[str, int]
    """Component -> bytes on the device for its parameters and buffers, rooms that they pass through too."""
    host_bytes: int = 0
    """Of weights in host memory."""
    pinned_bytes: int = 0
    """Of these, pinned."""
    onload_bytes: int = 0
    """Of weights that come to the device when the phase begins; what streams is in `bytes`."""
    disk_bytes: int = 0
    """Of weights in temporary files."""
    shelf_bytes: int = 0
    """Of RAM, pinned, in which what a VAE remembers lies."""
    peak_bytes: int
    """Of everything else on the device, when it is most."""
    held: Mapping[str, int]
    """The largest tensors at that moment: what each is, and its bytes."""
    flops: Mapping[tuple[str, str], int]
    """(kind of work, precision) -> floating-point operations."""
    bytes: Mapping[str, int]
    """"elementwise": read and written; "host_to_device", "device_to_host": moved; "block", "leaf": what would move to
    the device if weights streamed like that."""
    work: Mapping[tuple[Sort, Quantity], int] = field(default_factory=dict)
    """What seconds depend on: of every sort of operator its calls, amount and bytes."""
    shapes: tuple[int, ...] = ()
    """Of its convolutions, as the ledger numbers them: kernels are looked for once for each in a process."""
    streams: tuple[tuple[float, int], ...] = ()
    """Piece after piece of what streams, a room full of weights or what a stage of a VAE remembers: the share of a
    step's seconds that goes by meanwhile, and its bytes; empty where nothing is known of them."""
    pieces: Mapping[str, Pieces] = field(default_factory=dict)
    """Of the components that the phase needs; empty where they were traced in another place than on the device."""
    gives: Given = field(default_factory=dict)
    """To later phases."""
    begins: tuple[Block, ...] = ()
    """On a card when the phase begins, weights apart, the latents last."""
    after_one: int = 0
    """Of these, how many before the latents are not there before a step was taken."""
    blocks: tuple[Block, ...] = ()
    """That come and go there in it, or in one step of it."""
    rooms: tuple[int, ...] = ()
    """Bytes of what weights lie in on the device, in the order in which it is taken; empty: they lie there always."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "flops": [[*key, n] for key, n in self.flops.items()],
            "work": [[*sort, quantity, n] for (sort, quantity), n in self.work.items()],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        flops = {(kind, precision): n for kind, precision, n in data["flops"]}
        work = {(Sort(*sort), quantity): n for *sort, quantity, n in data["work"]}
        pieces = {
            name: Pieces(**each | {row: tuple(each[row]) for row in ROWS}) for name, each in data["pieces"].items()
        }
        gives = {name: (of, tuple(shape)) for name, (of, shape) in data["gives"].items()}
        shapes, streams = tuple(data["shapes"]), tuple((share, size) for share, size in data["streams"])
        blocks = {of: tuple((number, size) for number, size in data[of]) for of in ("begins", "blocks")}
        rest = {"flops": flops, "work": work, "shapes": shapes, "streams": streams, "pieces": pieces, "gives": gives}
        return cls(**{**data, **rest, **blocks, "rooms": tuple(data["rooms"])})
