"""What leaves the device is there when it is needed again, and nothing overwrites it in between.

Streams and events are played on the CPU, as in `test_transfer`: copies run as late or as early as CUDA may run them.
Memory that nobody refers to is another's at once: it is filled with NaN where the program drops it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from test_transfer import CPU, Runtime, Stream, runtime  # noqa: F401

from framefit.errors import DoesNotFit
from framefit.families import magvit_vae
from framefit.families.pieces import Pieces, Stage, through
from framefit.families.shelved import shelved
from framefit.ledger import shelf
from framefit.ledger.shelf import Shelf
from framefit.ledger.transfer import CardTransfer, NoTransfer, Transfer
from framefit.passes import decode
from framefit.plan import Decode
from framefit.testing import random_parts, randomise, tiny_row

GROUPS = (1, 4, 4, 4)
"""Frames."""


def on_device(values: torch.Tensor) -> torch.Tensor:
    """Whose memory is another's once it is dropped, in the order of what computes."""
    made = values.clone()
    weakref.finalize(made, made.detach().fill_, torch.nan)
    return made


@pytest.fixture(autouse=True)
def reused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Torch:
        """As the shelf sees it: what it allocates is memory of the device."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def empty_strided(self, *shape: Any, **how: Any) -> torch.Tensor:
            return on_device(torch.empty_strided(*shape, **how).fill_(torch.nan))

    monkeypatch.setattr(shelf, "torch", Torch())
    with torch.no_grad():
        yield


def remembering(number: int, takes: int = 1) -> Stage:
    """Adds to a frame what it remembers of the two before; the second is something else than a tensor at first."""
    memory: list[Any] = [None, {"before": "nothing"}]

    def run(x: torch.Tensor) -> torch.Tensor:
        last, before = memory
        out = (x[:, :, -1:] + number) / 2
        if last is not None:
            out = out + last
        if isinstance(before["before"], torch.Tensor):
            out = out - 0.3 * before["before"].reshape(out.shape)
        memory[:] = on_device(x[:, :, -1:]), {"before": on_device(out.flatten())}
        return on_device(out)

    return Stage(run=run, takes=takes, memory=memory)


def stages() -> list[Stage]:
    return [remembering(1), remembering(2, takes=2), remembering(3), remembering(4, takes=2), remembering(5)]


def groups() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, frames, 3, 3, generator=generator) for frames in GROUPS]


def way_of(transfer: Transfer) -> Generator[torch.Tensor]:
    given = (on_device(group) for group in groups())
    return cast(Any, shelved([{None: stages()}], given, len(GROUPS), Pieces(shelf=partial(Shelf, transfer))))


def made(transfer: Transfer) -> torch.Tensor:
    return torch.cat([frame.clone() for frame in way_of(transfer)], dim=2)


def expected() -> torch.Tensor:
    frames = (frame for group in groups() for frame in group.split(1, dim=2))
    return torch.cat(list(through(stages(), frames, one_by_one=True)), dim=2)


def test_what_lies_in_ram_is_there_when_it_is_needed(runtime: Runtime) -> None:  # noqa: F811
    assert torch.equal(made(CardTransfer(CPU)), expected())


def test_without_a_card_it_is_the_same() -> None:
    way = Transfer(CPU)
    assert torch.equal(made(way), expected())
    memories = 5 * 2 * 2 * 3 * 3 * 4
    assert way.moved_bytes == way.returned_bytes == (len(GROUPS) - 1) * memories


@pytest.mark.parametrize(
    ("forgotten", "instead"), [("sent", lambda self, piece: None), ("wait", lambda self, room: None)]
)
def test_a_forgotten_wait_is_seen(
    forgotten: str, instead: Callable[..., None], runtime: Runtime, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr(CardTransfer, forgotten, instead)
    assert torch.equal(made(CardTransfer(CPU)), expected()) == (Stream.when == "early")


@pytest.mark.parametrize("waits", [True, False])
def test_what_just_left_can_be_taken_at_once(
    waits: bool, runtime: Runtime, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """It is read after it is written, or that is seen."""
    if not waits:
        monkeypatch.setattr(CardTransfer, "put_piece", Transfer.put_piece)
    there, values = Shelf(CardTransfer(CPU)), torch.randn(7)
    there.put("here", [on_device(values), "and this"])
    tensor, told = there.take("here", None)
    assert told == "and this"
    assert torch.equal(tensor, values) == (waits or Stream.when == "early")
    there.close()


def test_memory_is_given_back_after_the_copies_only(runtime: Runtime) -> None:  # noqa: F811
    """Of a way that nobody goes to its end."""
    way = way_of(CardTransfer(CPU))
    for _ in range(3):
        next(way)
    way.close()
    assert not any(stream.queue for stream in Stream.played)
    gc.collect()
    assert not runtime.pinned


def test_ram_is_pinned_once_for_a_way(runtime: Runtime) -> None:  # noqa: F811
    transfer = CardTransfer(CPU)
    way = way_of(transfer)
    seen = [set(runtime.pinned) for _ in way]
    assert all(now == seen[0] for now in seen)
    assert len(seen[0]) == 10
    gc.collect()
    assert not runtime.pinned
    assert transfer.pinned_bytes == 0


def test_memory_that_cannot_be_pinned_is_told(runtime: Runtime) -> None:  # noqa: F811
    runtime.code = 2
    with pytest.raises(DoesNotFit, match=r"host memory cannot be pinned \(error 2\)"):
        made(CardTransfer(CPU))


def test_the_card_decodes_as_the_reference(runtime: Runtime) -> None:  # noqa: F811
    parts = random_parts(tiny_row("easyanimate-v5.1-7b-inp"), dtype=torch.float32, device=CPU)
    randomise(parts["vae"], torch.Generator().manual_seed(0))
    latents = torch.randn(1, 16, 3, 6, 7, generator=torch.Generator().manual_seed(1))
    known = [chunk.clone() for chunk in magvit_vae.decoded(parts["vae"], latents, Pieces())]
    decode.apply(parts, Decode(value="ram"))
    pieces = replace(parts.pieces, shelf=partial(Shelf, CardTransfer(CPU)))
    frames = torch.cat(list(magvit_vae.decoded(parts["vae"], latents, pieces)))
    assert (frames.int() - torch.cat(known).int()).abs().max() <= 1
    decode.remove(parts)
    again = torch.cat(list(magvit_vae.decoded(parts["vae"], latents, parts.pieces)))
    assert torch.equal(again, torch.cat(known))


def test_without_contents_nothing_moves_and_all_is_counted() -> None:
    way, real = NoTransfer(CPU), Transfer(CPU)
    made(way)
    made(real)
    assert (way.moved_bytes, way.returned_bytes) == (real.moved_bytes, real.returned_bytes)
    assert way.pieces_bytes == real.pieces_bytes == way.moved_bytes // (len(GROUPS) - 1)


def test_tensors_come_back_as_they_lay(runtime: Runtime) -> None:  # noqa: F811
    """Channels-last, one frame of two, and a piece with holes, of which there is a copy."""
    there, values = Shelf(CardTransfer(CPU)), torch.randn(1, 3, 2, 4, 5)
    last = values.contiguous(memory_format=torch.channels_last_3d)
    given = [on_device(last), on_device(last)[:, :, 1:], on_device(values)[..., 1:3]]
    there.put("here", given)
    there.settle()
    back = there.take("here", None)
    for one, other in zip(back, [last, last[:, :, 1:], values[..., 1:3]], strict=True):
        assert torch.equal(one, other)
    assert [each.stride(1) for each in back] == [1, 1, 16]
    there.close()
