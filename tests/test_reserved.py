"""What torch's allocator reserves: its rules replayed, the blocks of a dry run, and an H200's own figures."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from framefit.device import EXPANDING_BYTES, Device
from framefit.families import CHECKPOINTS
from framefit.ledger.allocator import MARK, PAGES, PRODUCT, Allocator
from framefit.ledger.live import Live
from framefit.plan import Offload, Plan
from framefit.planning import choose, dryrun
from framefit.planning.estimate import estimated
from framefit.planning.moved import moved
from framefit.planning.phase import PhaseTrace
from framefit.planning.reserved import reserved
from framefit.request import Request
from framefit.testing import tiny_row

MIB, GIB = 2**20, 2**30
PAGE = PAGES[False]
MEASURED = Path(__file__).parents[1] / "benchmarks" / "fit_h200_20261122.json"
CUBLAS = 33 * MIB


class Plainly:
    """The same rules over a list of (begin, end, what), "free" or "hole" or a block, without any index."""

    def __init__(self, page: int) -> None:
        self.page = page
        self.parts: list[tuple[int, int, object]] = [(0, 2**50, "hole")]

    @property
    def mapped(self) -> int:
        return sum(end - begin for begin, end, what in self.parts if what != "hole" and end < 2**50)

    def put(self, begin: int, end: int, what: object) -> None:
        parts = [(begin, end, what)] if begin < end else []
        for b, e, other in self.parts:
            parts += [(b, min(e, begin), other)] if b < begin else []
            parts += [(max(b, end), e, other)] if e > end else []
        parts.sort(key=lambda part: part[0])
        joined = parts[:1]
        for part in parts[1:]:
            if part[2] == joined[-1][2] and part[2] in ("free", "hole"):
                joined[-1] = (joined[-1][0], part[1], part[2])
            else:
                joined.append(part)
        self.parts = joined

    def free(self, size: int) -> list[tuple[int, int]]:
        return sorted((e - b, b) for b, e, what in self.parts if what == "free" and e - b >= size)

    def take(self, block: int, size: int) -> None:
        if found := self.free(size):
            holes = {b: e for b, e, what in self.parts if what == "hole"}
            best = found[0]
            for following in found[1:]:
                far = [holes.get(begin + z, begin + z) - begin for z, begin in (best, following)]
                if far[1] >= far[0]:
                    break
                best = following
            begin = best[1]
        else:
            begin = self.lowest(size)
            while (run := next(part for part in self.parts if part[0] <= begin < part[1])) and (
                run[2] == "hole" or run[1] - begin < size
            ):
                hole = run if run[2] == "hole" else next(part for part in self.parts if part[0] == run[1])
                lacks = size - (hole[0] - begin)
                self.put(hole[0], min(hole[1], hole[0] + -(-lacks // self.page) * self.page), "free")
        self.put(begin, begin + size, block)

    def lowest(self, size: int) -> int:
        for index, (_, _, what) in enumerate(self.parts):
            if what == "hole":
                first = index - (index > 0 and self.parts[index - 1][2] == "free")
                end = self.parts[first][0]
                for b, e, other in self.parts[first:]:
                    if other not in ("free", "hole") or b != end:
                        break
                    end = e
                if end - self.parts[first][0] >= size:
                    return self.parts[first][0]
        raise AssertionError

    def give(self, block: int) -> None:
        begin, end = next((b, e) for b, e, what in self.parts if what == block)
        self.put(begin, end, "free")

    def trim(self) -> None:
        for begin, end, what in self.parts:
            first, last = -(-begin // self.page) * self.page, end // self.page * self.page
            if what == "free" and first < last:
                self.put(first, last, "hole")


@pytest.mark.parametrize("seed", range(20))
def test_blocks_lie_where_the_rules_say(seed: int) -> None:
    draw, alive = random.Random(seed), list[int]()
    ours, plain = Allocator(), {small: Plainly(page) for small, page in PAGES.items()}
    for block in range(300):
        what = draw.random()
        if what < 0.5 or not alive:
            size = 512 * int(2 ** draw.uniform(0, 19))
            ours.take(block, size)
            plain[size <= MIB].take(block, size)
            alive.append(block)
        elif what < 0.96:
            gone = alive.pop(draw.randrange(len(alive)))
            ours.give(gone)
            next(each for each in plain.values() if any(part[2] == gone for part in each.parts)).give(gone)
        else:
            ours.trim()
            for each in plain.values():
                each.trim()
        assert ours.reserved_bytes == sum(each.mapped for each in plain.values())
        for small, each in plain.items():
            assert ours._ranges[small].taken == {what: (b, e) for b, e, what in each.parts if isinstance(what, int)}


def test_what_is_given_back_is_kept_until_a_limit_is_in_the_way() -> None:
    free, near = Allocator(), Allocator(limit_bytes=15 * PAGE)
    for card in (free, near):
        card.take("first", 9 * PAGE)
        card.take("behind", PAGE)
        card.give("first")
        assert card.reserved_bytes == 10 * PAGE
        card.take("large", 10 * PAGE)  # it finds no room before the one behind
    assert (free.reserved_bytes, near.reserved_bytes) == (20 * PAGE, 11 * PAGE)
    assert free.peak_bytes == 20 * PAGE
    assert near.peak_bytes == 11 * PAGE
    free.trim()
    free.forget()
    assert free.peak_bytes == 11 * PAGE


def test_what_is_small_asks_a_limit_for_a_page() -> None:
    card = Allocator(limit_bytes=2 * PAGE + MIB)
    card.take("gone", PAGE)
    card.take("stays", PAGE)
    card.give("gone")
    card.take("small", MIB // 2)
    assert card.reserved_bytes == PAGE + PAGES[True]


def test_small_ones_lie_apart_and_unknown_ones_are_passed_over() -> None:
    card = Allocator()
    card.take("small", MIB)
    assert card.reserved_bytes == PAGES[True]
    card.take("large", MIB + 1)
    assert card.reserved_bytes == PAGES[True] + PAGE
    card.take("none", 0)
    card.give("none")
    card.give("never")
    assert card.reserved_bytes == PAGES[True] + PAGE


def phase(
    name: str,
    *blocks: tuple[int, int],
    begins: tuple[tuple[int, int], ...] = (),
    rooms: tuple[int, ...] = (),
    of: str = "all",
) -> PhaseTrace:
    ways = {"elementwise": 0, "host_to_device": 0, "device_to_host": 0}
    return PhaseTrace(
        name=name, weights_bytes={of: PAGE}, peak_bytes=0, held={}, flops={}, bytes=ways, begins=begins,
        blocks=blocks, rooms=rooms,
    )  # fmt: skip


def test_weights_that_stay_lie_beside_all_phases_and_what_a_phase_leaves_is_kept() -> None:
    phases = [phase("encode", (1, 3 * PAGE), (1, 0)), phase("decode", (1, PAGE), (1, 0))]
    assert reserved(phases, {}, None, 0) == {"encode": 4 * PAGE, "decode": 4 * PAGE}
    assert reserved(phases[1:], {}, None, 0) == {"decode": 2 * PAGE}


def test_the_first_product_brings_the_workspace_and_the_small_one_apart() -> None:
    before, after = (phase(name, (1, PAGE), *also, (1, 0)) for name, also in (("encode", ()), ("decode", (PRODUCT,))))
    told = reserved([before, after, replace(after, name="again")], {}, None, PAGE + MIB)
    assert told == {"encode": 2 * PAGE, **dict.fromkeys(("decode", "again"), 3 * PAGE + PAGES[True])}


def test_a_phase_that_is_not_gone_through_is_not_there() -> None:
    phases = [phase("denoise:a", (1, 9 * PAGE), (1, 0)), phase("denoise:b", (1, PAGE), (1, 0))]
    assert reserved(phases, {"denoise:a": 0, "denoise:b": 2}, None, 0) == {"denoise:b": 2 * PAGE}


def test_weights_of_the_next_expert_come_before_a_step_ends() -> None:
    """And with them all goes back that nothing lies on. The VAE's come when decoding has begun."""
    step = (1, 6 * PAGE), (1, 0), MARK, (2, PAGE), (9, 0)
    first = phase("denoise:a", *step, begins=((9, PAGE),), rooms=(2 * PAGE,))
    following = phase("denoise:b", (3, PAGE), (3, 0), begins=((2, PAGE),), rooms=(4 * PAGE,), of="other")
    told = reserved([first, following], {"denoise:a": 5, "denoise:b": 1}, None, 0)
    assert told == {"denoise:a": 10 * PAGE, "denoise:b": 6 * PAGE}
    told = reserved([first, replace(following, name="decode")], {"denoise:a": 5}, None, 0)
    assert told == {"denoise:a": 10 * PAGE, "decode": 10 * PAGE}
    last = replace(following, name="decode", blocks=((3, 9 * PAGE), (3, 0)))
    assert reserved([first, last], {"denoise:a": 5}, None, 0)["decode"] == 14 * PAGE
    other = replace(first, name="denoise:b", weights_bytes={"other": PAGE})  # as large: they come all the same
    assert reserved([first, other], {"denoise:a": 2, "denoise:b": 1}, None, 0)["denoise:b"] == 9 * PAGE


def test_what_lies_between_steps_comes_with_the_first() -> None:
    """So that it is not there yet, where the first step finds place."""
    step = phase("denoise:a", (1, 4 * PAGE), (1, 0), begins=((7, PAGE), (8, 2 * PAGE), (9, PAGE)))
    assert reserved([step], {"denoise:a": 1}, None, 0)["denoise:a"] == 9 * PAGE
    later = replace(step, after_one=1)
    assert reserved([later], {"denoise:a": 1}, None, 0)["denoise:a"] == 7 * PAGE
    assert reserved([later], {"denoise:a": 2}, None, 0)["denoise:a"] == 9 * PAGE
    both = reserved([later, replace(later, name="denoise:b")], {"denoise:a": 1, "denoise:b": 1}, None, 0)
    assert both == {"denoise:a": 7 * PAGE, "denoise:b": 9 * PAGE}


def test_what_a_phase_begins_with_lies_where_it_was_left() -> None:
    """Of a size the latents are the newest, all else the oldest."""
    encode = phase("encode", (1, PAGE), (2, 3 * PAGE), (3, PAGE), (4, PAGE), (2, 0))
    later = phase("decode", (9, 4 * PAGE), (9, 0), begins=((7, PAGE), (8, PAGE)))
    # of three pages' blocks the one in the middle goes: three free ones before it, one in its place, and the end
    assert reserved([encode, later], {}, None, 0) == {"encode": 7 * PAGE, "decode": 7 * PAGE}
    kept = replace(later, begins=((7, PAGE), (6, PAGE), (8, PAGE)))
    assert reserved([encode, kept], {}, None, 0)["decode"] == 11 * PAGE


def test_a_step_is_replayed_with_what_the_one_before_left() -> None:
    """Each leaves new latents behind, and lets the old ones go: no more with every step."""
    step = (1, 2 * PAGE), (2, PAGE), (1, 0), (9, 0)
    once, often = (
        reserved([phase("denoise:a", *step, begins=((9, PAGE),))], {"denoise:a": times}, None, 0)["denoise:a"]
        for times in (1, 50)
    )
    assert once == 5 * PAGE
    assert once <= often <= once + PAGE


def test_what_ran_again_and_let_go_what_others_hold_ends_once() -> None:
    """Also where a call stands for another in which a call does."""

    def inner() -> torch.Tensor:
        nonlocal memory
        memory = memory + 1
        return memory

    with Live([]) as live, live.phase("all"):
        memory = torch.zeros(1024)
        with live.rise() as outer:
            with live.rise() as rise:
                held = inner()
            with live.rose(rise):
                again = torch.zeros(1024)
            del held
        with live.rose(outer):
            more = torch.zeros(1024)
        del again, more
        memory = torch.zeros(1)
    told = live.phases["all"].blocks
    ends = [number for number, size in told if not size]
    assert len(ends) == len(set(ends))
    assert {number for number, size in told if size} >= set(ends)


@pytest.mark.parametrize("settings", [{}, {"chunk": "rows:7", "decode": "frame"}, {"guidance": "apart"}])
@pytest.mark.parametrize("id", ["wan2.2-i2v-a14b", "wan2.2-ti2v-5b", "easyanimate-v5.1-7b-inp", "i2vgen-xl"])
def test_the_blocks_of_a_dry_run_hold_what_its_tensors_do(id: str, settings: dict[str, str], photo: Path) -> None:
    row = tiny_row(id)
    row = replace(row, sizes=replace(row.sizes, min_side=32, multiple=16))
    settings = {kind: value for kind, value in settings.items() if not (kind == "decode" and id == "i2vgen-xl")}
    request = Request(image=photo, prompt="x", model=id, width=64, height=64, num_frames=17, seed=1)
    plan = choose(request, row, Device.named("h200"), photo_size=(120, 80), settings=settings)
    for trace in dryrun.trace(plan, row):
        alive = dict(trace.begins)
        most = sum(alive.values())
        for number, size in trace.blocks:
            if (number, size) in (MARK, PRODUCT):
                continue
            if size:
                assert number not in alive
                alive[number] = size
                most = max(most, sum(alive.values()))
            else:
                del alive[number]
        assert most == trace.peak_bytes, trace.name
        assert trace.blocks.count(MARK) == trace.name.startswith("denoise")
        assert trace.blocks.count(PRODUCT) == (trace.name == "encode_text")


@pytest.mark.parametrize("value", ["part", "block", "block:1", "leaf", "disk"])
def test_rooms_are_those_of_the_offload_pass(value: str, photo: Path) -> None:
    row = tiny_row("easyanimate-v5.1-7b-inp")
    request = Request(image=photo, prompt="x", model=row.id, width=256, height=256, num_frames=5, seed=1)
    plan = choose(request, row, Device.named("h200"), photo_size=(120, 80), settings={"offload": value})
    stay = replace(plan, settings=tuple(s for s in plan.settings if not isinstance(s, Offload)))
    told = moved(dryrun.trace(stay, row), Offload(value=value))
    for one, other in zip(told, dryrun.trace(plan, row), strict=True):
        assert one.rooms == other.rooms, one.name
        assert sum(one.rooms) == sum(one.weights_bytes.values())


@pytest.mark.parametrize(
    ("work", "key", "name", "within"),
    [
        ("i2vgen-xl-512", "resident", "encode_image", 0.005),
        ("i2vgen-xl-512", "resident", "denoise:unet", 0.005),
        ("i2vgen-xl-512", "block", "denoise:unet", 0.01),
        ("i2vgen-xl-512", "rows", "denoise:unet", 0.02),  # under a cap 2 % above its need
    ],
)
def test_at_true_size_it_is_what_an_h200_reserved(
    work: str, key: str, name: str, within: float, planned: Callable[..., Plan]
) -> None:
    filed = next(each for each in json.loads(MEASURED.read_text()) if each["row"] == work)["plans"][key]
    plan = planned(filed["said"]["settings"], filed["cap_bytes"])
    there = next(phase for phase in plan.estimate.phases if phase.name == name)
    assert there.reserved_bytes == pytest.approx(filed["phases"][name]["reserved_bytes"], rel=within)


@pytest.fixture(scope="module")
def planned(photo: Path) -> Callable[..., Plan]:
    def plan(settings: dict[str, str], cap_bytes: int | None) -> Plan:
        row = CHECKPOINTS["i2vgen-xl"]
        request = Request(image=photo, prompt="x", model=row.id, width=512, height=512, num_frames=16, seed=1)
        device = Device.named("h200", ram_bytes=110 * GIB)
        device = replace(device, vram_limit_bytes=cap_bytes)
        return estimated(choose(request, row, device, photo_size=(640, 427), settings=settings), row)

    return plan


def test_more_room_is_taken_and_less_is_not_more_than_there_is(planned: Callable[..., Plan]) -> None:
    caps = [int(of * GIB) for of in (1.9, 2.4, 4, 20)]
    settings = {"chunk": "rows", "offload": "leaf"}
    most = [max(phase.reserved_bytes or 0 for phase in planned(settings, cap).estimate.phases) for cap in caps]
    assert all(reserved <= cap - EXPANDING_BYTES + PAGE for reserved, cap in zip(most, caps, strict=True))
    assert all(before <= after for before, after in pairwise(most))
