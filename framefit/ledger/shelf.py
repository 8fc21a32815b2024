"""Tensors that lie in RAM between two uses: they leave the device after one and are back for the next.

They are put on places. What leaves is sent beside the computation, and what comes is called for before it is needed; so
the device holds those of the places at work, and of their neighbours. A place keeps its pieces of host memory, so that
they are pinned once however often it is used.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from framefit.ledger.transfer import Piece, Room, Transfer, without_holes

__all__ = ["Shelf"]


@dataclass(slots=True)
class _Place:
    spec: TreeSpec
    kept: list[Any] = field(default_factory=list)
    """Leaf by leaf: what is no tensor, or a tensor on the way."""
    lying: dict[int, tuple[torch.Size, tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    """Which of them are in RAM."""
    pieces: dict[tuple[int, int], Piece] = field(default_factory=dict)
    """By leaf and bytes."""
    rooms: list[Room] = field(default_factory=list)
    """That tensors come into."""


class Shelf:
    """For one way through a video."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._places: dict[Hashable, _Place] = {}
        self._leaving: list[tuple[torch.Tensor, Piece]] = []

    def put(self, name: Hashable, tree: Any) -> None:
        """Begin to send the tensors in `tree`, lists and dicts of anything, to the place `name`.

        The caller drops them. Their memory on the device is free after `settle`.

        Raises:
            Unpinnable: the host has no memory to pin.
        """
        leaves, spec = tree_flatten(tree)
        before = self._places.get(name)
        place = self._places[name] = _Place(spec, pieces=before.pieces if before else {})
        for index, leaf in enumerate(leaves):
            place.kept.append(None if isinstance(leaf, torch.Tensor) else leaf)
            if isinstance(leaf, torch.Tensor):
                tensor = leaf if without_holes(leaf) else leaf.contiguous()
                place.lying[index] = tensor.shape, tensor.stride(), tensor.dtype
                self._send(tensor, place, index)

    def _send(self, tensor: torch.Tensor, place: _Place, index: int) -> None:
        piece = place.pieces.get((index, tensor.nbytes))
        if piece is None:
            piece = place.pieces[index, tensor.nbytes] = self._transfer.piece(tensor.nbytes)
        self._transfer.send(tensor, piece)
        self._leaving.append((tensor, piece))

    def settle(self) -> None:
        """What is computed from here on comes after all that leaves: its memory on the device is free."""
        for _, piece in self._leaving:
            self._transfer.sent(piece)
        self._leaving.clear()

    def expect(self, name: Hashable) -> None:
        """Begin to bring back what lies at a place, if anything does."""
        place = self._places.get(name)
        if place is None:
            return
        for index, (shape, strides, dtype) in place.lying.items():
            tensor = torch.empty_strided(shape, strides, dtype=dtype, device=self._transfer.device)
            room = self._transfer.over(tensor)
            self._transfer.recall(place.pieces[index, tensor.nbytes], room)
            place.kept[index] = tensor
            place.rooms.append(room)
        place.lying.clear()

    def take(self, name: Hashable, usual: Any) -> Any:
        """What was put at a place, which computations may read from here on; `usual` where nothing was."""
        self.expect(name)
        place = self._places.get(name)
        if place is None:
            return usual
        for room in place.rooms:
            self._transfer.wait(room)
        place.rooms.clear()
        leaves, place.kept = place.kept, []
        return tree_unflatten(leaves, place.spec)

    def close(self) -> None:
        """Nothing is on the way any more: the device's memory for it is free."""
        try:
            self._transfer.settle()
        finally:
            self._leaving.clear()
            self._places.clear()
