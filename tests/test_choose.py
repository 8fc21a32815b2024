"""The fastest settings that fit: against brute force, more budget is never slower, and the reasons have numbers."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from framefit import plan as vocabulary
from framefit.cli import main
from framefit.device import Device
from framefit.errors import DoesNotFit
from framefit.families import CHECKPOINTS, Checkpoint
from framefit.plan import ASKED, Decode, Offload, Plan, Quantize, Setting, Tier
from framefit.planning import candidates, changes, choose, differences, dryrun, estimate, fit, fits, fitted, traces
from framefit.planning.candidates import CANDIDATES, RUNG, Candidates
from framefit.planning.moved import moved
from framefit.planning.phase import PhaseTrace, Pieces
from framefit.rates import Sort
from framefit.request import Request
from framefit.streaming import spread
from framefit.testing import tiny_row

GIB = 2**30
A14B = CHECKPOINTS["wan2.2-i2v-a14b"]
I2VGEN = CHECKPOINTS["i2vgen-xl"]


class _Rows(Setting):
    """A setting of the denoiser, as another pass would add it."""

    type = "rows"
    title = "rows"
    values = ("all", "half", "few")
    phases = ("denoise",)


class _Tiles(Setting):
    type = "tiles"
    title = "tiles"
    values = ("whole", "tiled", "faded", "small")
    tier: ClassVar[Any] = property(lambda self: "near" if self.value in ("faded", "small") else "exact")
    phases = ("encode_image", "decode")


class _Storage(Setting):
    type = "storage"
    title = "storage"
    values = ("bf16", "int8")
    tier: ClassVar[Any] = property(lambda self: "near" if self.value == "int8" else "exact")
    phases = ("encode_text", "denoise")


NEW = (
    Candidates(_Rows, lambda row: _Rows.values),
    Candidates(_Tiles, lambda row: _Tiles.values, lightens=lambda value: _Tiles(value=value).tier == "near"),
    Candidates(_Storage, lambda row: _Storage.values, lightens=lambda value: value != _Storage.values[0]),
)


@pytest.fixture
def more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three types more, so that the search has something to search."""
    table = (*CANDIDATES, *NEW)
    for module in (candidates, fit):
        monkeypatch.setattr(module, "CANDIDATES", table)
    monkeypatch.setattr(vocabulary, "SETTINGS", vocabulary.SETTINGS | {c.kind.type: c.kind for c in NEW})


def made_up(seed: int, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """A model of random sizes in place of a dry run. Returns the settings that were traced."""
    draw = random.Random(seed)
    blocks = tuple(int(draw.uniform(0.5, 1.5) * GIB) for _ in range(draw.randint(3, 6)))
    activations = {name: int(draw.uniform(1, 9) * GIB) for name in ("encode_text", "encode_image", "denoise", "decode")}
    flops = {name: int(draw.uniform(1, 50) * 1e12) for name in activations}
    shrink = {"apart": 0.5, "half": 0.7, "few": 0.4, "tiled": 0.3, "faded": 0.25, "small": 0.1}
    slower = {value: draw.uniform(0.8, 1.2) for value in (*shrink, "frame", "int8")}
    asked: list[dict[str, str]] = []

    def resident(plan: Plan, checkpoint: Checkpoint, folder: Any = None) -> tuple[PhaseTrace, ...]:
        values = {s.type: s.value for s in plan.settings}
        asked.append(values)
        width = 2 if values.get("storage") == "int8" else 1

        def phase(name: str, part: str, units: tuple[int, ...]) -> PhaseTrace:
            stage = name.partition(":")[0]
            size, amount = activations[stage], flops[stage]
            for setting in plan.settings:
                if setting.touches(name) and not isinstance(setting, Offload):
                    size = int(size * shrink.get(setting.value, 1))
                    amount = int(amount * slower.get(setting.value, 1))
            units = tuple(unit // width for unit in units)
            whole = sum(units) + GIB // (8 if part == "vae" and values.get("tiles") in ("faded", "small") else 4)
            pieces = {part: Pieces(bytes=whole, tables_bytes=0, blocks=units, layers=tuple(u // 4 for u in units * 4))}
            moves = {"block": sum(units), "leaf": sum(units) // 4 * 4}
            return PhaseTrace(
                name=name, weights_bytes={}, peak_bytes=size, held={}, flops={("matmul", "bf16"): flops[stage]},
                bytes={"elementwise": 0, "host_to_device": 0, "device_to_host": 0, **moves}, pieces=pieces,
                work={(Sort("matmul", "bf16", 0), "amount"): amount},
            )  # fmt: skip

        found = (
            phase("encode_text", "text_encoder", blocks[:2]), phase("encode_image", "vae", ()),
            phase("denoise:unet", "unet", blocks), phase("decode", "vae", ()),
        )  # fmt: skip
        return moved(found, Offload(value="none"))

    for module in (fit, traces):
        monkeypatch.setattr(module, "resident", resident)
    monkeypatch.setattr(estimate, "traced", lambda plan, row: moved(resident(plan, row), plan.setting(Offload)))
    return asked


def plan_for(
    vram_gib: float, ram_gib: float = 200.0, card: str = "h100-80gb", pinned_gib: float | None = None, **settings: str
) -> Plan:
    request = Request(image=Path("x.jpg"), prompt="x", model="i2vgen-xl", width=512, height=512, seed=1, steps=10)
    device = Device.named(card, vram_bytes=int(vram_gib * GIB), ram_bytes=int(ram_gib * GIB))
    device = replace(device, pinned_limit_bytes=None if pinned_gib is None else int(pinned_gib * GIB))
    plan = choose(request, I2VGEN, device, photo_size=(512, 512), settings=settings)
    extra = tuple(c.kind(value=c.values(I2VGEN)[0]) for c in candidates.CANDIDATES if c not in CANDIDATES)
    return replace(plan, settings=(*plan.settings, *extra))


def every(plan: Plan, tiers: Sequence[str]) -> list[Plan]:
    """All combinations there are, estimated one by one."""
    found = []
    values = {c.kind: c.values(I2VGEN) for c in candidates.CANDIDATES}
    values[Offload] = fit.places(plan, traces.resident(plan, I2VGEN))
    choices = [[type(s)(value=value) for value in values[type(s)]] for s in plan.settings]
    for settings in itertools.product(*choices):
        if all(s.tier in tiers for s in settings):
            each = replace(plan, settings=settings)
            there = moved(traces.resident(each, I2VGEN), each.setting(Offload))
            found.append(estimate.with_phases(each, I2VGEN, there))
    return found


def told(plans: Sequence[Plan]) -> list[float]:
    """Seconds of each, no phase of which is sooner by `RUNG` a rung than with values before, fewer weights apart."""
    ladders = {
        c.kind.type: [value for value in c.values(I2VGEN) if not c.lightens(value)] for c in candidates.CANDIDATES
    }
    known = {tuple(s.value for s in plan.settings): plan for plan in plans}

    def phase(settings: tuple[Setting, ...], index: int) -> float:
        plan = known[tuple(s.value for s in settings)]
        name, least = plan.estimate.phases[index].name, plan.estimate.phases[index].seconds or 0.0
        for i, setting in enumerate(settings):
            values = ladders.get(setting.type, [])
            if setting.touches(name) and setting.value in values and (rung := values.index(setting.value)):
                before = type(setting)(value=values[rung - 1])
                least = max(least, RUNG * phase((*settings[:i], before, *settings[i + 1 :]), index))
        return least

    return [sum(phase(plan.settings, i) for i in range(1, len(plan.estimate.phases))) for plan in plans]


@pytest.mark.usefixtures("more")
@pytest.mark.parametrize("seed", [*range(8), 20])
def test_it_is_the_fastest_of_all_that_fit(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(seed, monkeypatch)
    budget = random.Random(seed).uniform(3, 16)
    for tier, tiers in (("exact", ("exact",)), ("near", ("exact", "near"))):
        plan = plan_for(budget)
        found = fitted(plan, I2VGEN, tier=tier)  # type: ignore[arg-type]
        plans = every(plan, tiers)
        fitting = [seconds for each, seconds in zip(plans, told(plans), strict=True) if each.feasible]
        assert found.feasible == bool(fitting)
        assert {s.tier for s in found.settings} <= set(tiers)
        if found.feasible:
            assert found.estimate.seconds == pytest.approx(min(fitting), rel=1e-9)


@pytest.mark.usefixtures("more")
@pytest.mark.parametrize(("seed", "tier"), [*((seed, "exact") for seed in range(5)), (2, "near"), (4, "near")])
def test_more_budget_is_never_slower_and_what_fits_stays_within(
    seed: int, tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(seed, monkeypatch)
    before: float | None = None
    for budget in (2.5, 4, 5, 6, 7.5, 9, 12, 30, 70):
        asked = plan_for(budget)
        plan = fitted(asked, I2VGEN, tier=tier)
        assert plan == fitted(asked, I2VGEN, tier=tier), "the same inputs give the same plan"
        if plan.feasible:
            assert all(phase.peak_vram_bytes <= plan.device.budget_bytes for phase in plan.estimate.phases)
            assert all(phase.host_bytes <= plan.device.ram_free_bytes for phase in plan.estimate.phases)
            assert plan.estimate.seconds is not None
            assert before is None or plan.estimate.seconds <= before
            before = plan.estimate.seconds
        else:
            assert before is None, "what fitted fits with more"
    assert before is not None


def test_more_budget_is_never_slower_where_chunks_are_told_to_be_sooner() -> None:
    """Dry runs of A14B for an L4, on which a forward in one chunk is reckoned sooner than diffusers' own."""
    row = CHECKPOINTS["wan2.2-i2v-a14b"]
    card = Device.named("l4", ram_bytes=200 * GIB)
    work = {"width": 832, "height": 480, "num_frames": 81}
    request = Request(image=Path("x.jpg"), prompt="x", model=row.id, seed=1, steps=4, **work)
    seconds = []
    for budget in (3.6, 4, 4.5, 6, 9, 10, 20):
        device = replace(card, vram_limit_bytes=int(budget * GIB))
        plan = fitted(choose(request, row, device, photo_size=(832, 480)), row)
        assert plan.feasible
        assert all(phase.peak_vram_bytes <= device.budget_bytes for phase in plan.estimate.phases)
        assert plan.estimate.seconds
        seconds.append(plan.estimate.seconds)
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.usefixtures("more")
def test_a_value_may_leave_a_block_less_to_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """As chunks of I2VGen-XL's UNet do; so that there are fewer places, where nothing fits."""
    made_up(0, monkeypatch)
    known = fit.resident

    def fewer(plan: Plan, row: Any) -> tuple[PhaseTrace, ...]:
        cut = plan.setting(_Rows).value != _Rows.values[0]
        return tuple(
            replace(trace, pieces={name: replace(p, blocks=p.blocks[cut:]) for name, p in trace.pieces.items()})
            for trace in known(plan, row)
        )

    monkeypatch.setattr(fit, "resident", fewer)
    hopeless: list[bool] = []
    asks = fit._Search.hopeless
    monkeypatch.setattr(fit._Search, "hopeless", lambda self: hopeless.append(asks(self)) or hopeless[-1])
    assert not fitted(plan_for(0.9), I2VGEN).feasible
    assert hopeless == [True]


@pytest.mark.usefixtures("more")
@pytest.mark.parametrize("seed", range(3))
def test_more_to_pin_is_never_slower_and_what_fits_pins_no_more(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(seed, monkeypatch)
    found = [(pinned, fitted(plan_for(12, pinned_gib=pinned), I2VGEN)) for pinned in (0, 2, 6, 12, 200)]
    fitting = [(pinned, plan) for pinned, plan in found if plan.feasible]
    assert all(phase.pinned_bytes <= pinned * GIB for pinned, plan in fitting for phase in plan.estimate.phases)
    seconds = [plan.estimate.seconds or 0.0 for _, plan in fitting]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[-1], "files are slower than RAM"
    assert not found[0][1].feasible
    asked = estimate.estimated(plan_for(12, pinned_gib=1, offload="block"), I2VGEN)
    assert asked.lacks("pinned")
    with pytest.raises(DoesNotFit, match=r"pins [\d.]+ GiB of RAM and 1\.00 GiB may be: .*offload=disk.*--pinned"):
        estimate.check_fits(asked)


@pytest.mark.usefixtures("more")
def test_where_everything_fits_nothing_is_changed_and_little_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = made_up(1, monkeypatch)
    plan = fitted(plan_for(75), I2VGEN)
    assert [(s.value, s.because) for s in plan.settings] == [(s.value, s.because) for s in plan_for(75).settings]
    assert len(asked) == 1


@pytest.mark.usefixtures("more")
@pytest.mark.parametrize("tier", ["exact", "near"])
def test_where_weights_lie_as_it_was_tuned_they_stay_where_all_fits(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(3, monkeypatch)
    tuned = Offload(value="block", because="tuned: 1.2x")
    plan = plan_for(70)
    plan = replace(plan, settings=tuple(tuned if isinstance(s, Offload) else s for s in plan.settings))
    assert tuned in fitted(plan, I2VGEN, tier=tier).settings


def test_without_rates_the_order_of_the_table_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(2, monkeypatch)
    monkeypatch.setattr(estimate.rates, "of", lambda device: None)
    places = [fitted(plan_for(budget), I2VGEN).setting(Offload).value for budget in (75, 13, 10, 8, 6)]
    order = ("none", "part", *(f"block:{k}" for k in range(6, 0, -1)), "block", "leaf")
    ranks = [order.index(place) for place in places]
    assert ranks == sorted(ranks)
    assert ranks[0] == 0
    assert ranks[-1] > 1


@pytest.mark.usefixtures("more")
def test_what_was_asked_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(3, monkeypatch)
    free = fitted(plan_for(9), I2VGEN)
    assert free.feasible
    assert free.setting(Offload).value not in ("none", "leaf")
    told = fitted(plan_for(9, offload="leaf"), I2VGEN)
    assert (told.setting(Offload).value, told.setting(Offload).because) == ("leaf", ASKED)
    refused = fitted(plan_for(9, offload="none"), I2VGEN)
    assert refused.setting(Offload).value == "none"
    assert not refused.feasible
    ways = changes(refused, I2VGEN)
    assert ways[0].flag == "without --set offload=none"
    assert ways[0].seconds == free.estimate.seconds


@pytest.mark.usefixtures("more")
def test_every_derived_setting_has_a_reason_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(5, monkeypatch)
    derived = 0
    for budget in (4, 5, 6, 8, 10, 12):
        plan, usual = fitted(plan_for(budget), I2VGEN), plan_for(budget)
        for setting, stood in zip(plan.settings, usual.settings, strict=True):
            if plan.feasible and setting.value != stood.value:
                derived += 1
                assert "GiB" in setting.because or ", and " in setting.because, setting
                if setting.type == "offload" and "GiB" in setting.because:
                    assert f"{budget:.1f} GiB are there" in setting.because
    assert derived > 3


def test_ram_is_a_budget_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = made_up(3, monkeypatch)
    assert fitted(plan_for(9), I2VGEN).feasible
    asked.clear()
    assert not fitted(plan_for(2, ram_gib=0.05), I2VGEN).feasible
    values = {tuple(value for kind, value in each.items() if kind != "offload") for each in asked}
    assert len(values) == 2, "no other value makes weights fewer, so that the leanest alone are traced"
    kept = fitted(plan_for(9, ram_gib=2, offload="block"), I2VGEN)
    assert not kept.feasible
    assert kept.lacks("host")


@pytest.mark.usefixtures("more")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.9, 0.05], ids=["some bytes too many", "weights alone too heavy"])
def test_where_nothing_fits_it_says_what_would(seed: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(seed, monkeypatch)
    least = min((e for e in every(plan_for(70), ("exact",))), key=lambda e: e.estimate.peak_bytes)
    budget = least.estimate.peak_bytes / GIB * share
    plan = fitted(plan_for(budget), I2VGEN)
    assert not plan.feasible
    ways = changes(plan, I2VGEN)
    assert 1 <= len(ways) <= 3
    assert ways[-1].flag.startswith("a card with")
    assert ways[-1].peak_bytes == least.estimate.peak_bytes
    wider = fitted(plan_for(ways[-1].peak_bytes / GIB + 1e-6), I2VGEN)
    assert wider.feasible
    if ways[0].flag == "--quality near":
        assert fitted(plan_for(budget), I2VGEN, tier="near").feasible


@pytest.mark.usefixtures("more")
def test_where_nothing_fits_little_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the plan a few states and the leanest, of smaller requests the leanest alone."""
    asked = made_up(1, monkeypatch)
    plan = plan_for(2.5)
    assert not fitted(plan, I2VGEN).feasible
    assert len({tuple(each.items()) for each in asked}) <= fit.TRIED + 1
    asked.clear()
    changes(plan, I2VGEN)
    shapes = {kind: {each[kind] for each in asked} for kind in ("chunk", "guidance", "rows", "tiles")}
    assert shapes == {"chunk": {"rows"}, "guidance": {"apart"}, "rows": {"few"}, "tiles": {"tiled", "small"}}


@pytest.mark.parametrize(
    ("id", "size"), [("wan2.2-i2v-a14b", (832, 480, 9)), ("easyanimate-v5.1-12b-inp", (672, 384, 9))]
)
def test_the_last_values_leave_least_beside_the_weights(id: str, size: tuple[int, int, int], tmp_path: Path) -> None:
    """What `hopeless` rests on."""
    row = CHECKPOINTS[id]
    width, height, num_frames = size
    request = Request(
        image=Path("x.jpg"), prompt="x", model=id, width=width, height=height, num_frames=num_frames, seed=1
    )
    plan = choose(request, row, Device.named("rtx-4090"), photo_size=(9, 9))
    for each in CANDIDATES:
        peaks: dict[str, list[int]] = {}
        for value in candidates.ladder(each, plan, row, "exact"):
            settings = tuple(type(s)(value=value) if isinstance(s, each.kind) else s for s in plan.settings)
            for trace in traces.resident(replace(plan, settings=settings), row, tmp_path):
                peaks.setdefault(trace.name, []).append(trace.peak_bytes)
        assert all(fit.LEAST * of[-1] <= min(of) for of in peaks.values()), (each.kind.type, peaks)


# against the pass


@pytest.mark.parametrize("id", ["wan2.2-i2v-a14b", "easyanimate-v5.1-7b-inp", "i2vgen-xl"])
def test_a_place_that_is_computed_is_the_place_that_is_traced(id: str, tmp_path: Path) -> None:
    """Bytes on the card, in RAM, pinned, moved at the beginning and in a step: figure for figure."""
    row = deep(id)
    plan = tiny_plan(row)
    base = traces.resident(plan, row, tmp_path)
    for value in ("part", "block:3", "leaf"):
        there = replace(plan, settings=(*plan.settings[:-1], Offload(value=value)))
        for computed, traced in zip(moved(base, Offload(value=value)), dryrun.trace(there, row), strict=True):
            for fact in ("name", "weights_bytes", "host_bytes", "pinned_bytes", "onload_bytes", "peak_bytes", "flops"):
                assert getattr(computed, fact) == getattr(traced, fact), (value, computed.name, fact)
            ways = ("host_to_device", "elementwise")
            # which of the blocks stay decides what a share of them moves: exact where blocks are alike
            within = 1e-9 if "i2vgen" not in id or ":" not in value else 0.02
            for way in ways:
                assert computed.bytes[way] == pytest.approx(traced.bytes[way], rel=within), (value, computed.name, way)


def test_layers_have_their_own_shares(tmp_path: Path) -> None:
    """Not those of the blocks, which come first among what streams: in chunks a block is one of the layers."""
    row = deep("wan2.2-i2v-a14b")
    plan = tiny_plan(row)
    chunked = tuple(replace(s, value="rows:32") if s.type == "chunk" else s for s in plan.settings)
    for trace in traces.resident(replace(plan, settings=chunked), row, tmp_path):
        if trace.name.startswith("denoise"):
            (pieces,) = trace.pieces.values()
            at = [i for i, size in enumerate(pieces.layers) if size == pieces.blocks[0]]
            assert len(at) == len(pieces.blocks) < len(pieces.layers)
            assert [pieces.layer_shares[i] for i in at] == pytest.approx([max(pieces.layer_shares)] * len(at), rel=0.05)
            assert min(pieces.layer_shares) < max(pieces.layer_shares) / 2


@pytest.mark.parametrize("id", ["wan2.2-i2v-a14b", "i2vgen-xl"])
def test_a_stage_alone_is_as_in_a_whole_run(id: str, tmp_path: Path) -> None:
    row = deep(id)
    plan = tiny_plan(row)
    whole = traces.resident(plan, row, tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == len(traces.STAGES)
    for file in files:
        file.unlink()
        again = traces.resident(plan, row, tmp_path)
        assert file.exists()
        for one, other in zip(whole, again, strict=True):
            assert replace(one, held={}) == replace(other, held={})


def test_a_setting_of_the_denoiser_leaves_the_other_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = deep("i2vgen-xl")
    plan = tiny_plan(row)
    traces.resident(plan, row, tmp_path)
    traced: list[set[str]] = []
    original = dryrun.trace

    def spied(plan: Plan, checkpoint: Checkpoint, known: Any = None) -> Any:
        found = original(plan, checkpoint, known)
        traced.append({phase.name for phase in found})
        return found

    monkeypatch.setattr(dryrun, "trace", spied)
    apart = replace(plan, settings=(type(plan.settings[0])(value="apart"), *plan.settings[1:]))
    traces.resident(apart, row, tmp_path)
    assert traced == [{"denoise:unet"}]


def deep(id: str) -> Checkpoint:
    """Tiny, with five blocks, and sizes that it takes."""
    row = tiny_row(id)
    names = ("transformer", "transformer_2")
    layers = {"num_layers": 5}
    parts = (replace(c, config={**c.config, **layers}) if c.name in names else c for c in row.components)
    return replace(row, components=tuple(parts), sizes=replace(row.sizes, min_side=32, multiple=16))


def tiny_plan(row: Checkpoint, device: Device | None = None) -> Plan:
    request = Request(image=Path("x.jpg"), prompt="x", model=row.id, width=64, height=64, num_frames=5, seed=1)
    return choose(request, row, device or Device.named("rtx-4090"), photo_size=(64, 64))


def test_what_is_sooner_than_the_reference_is_chosen_where_all_fits() -> None:
    row = tiny_row("easyanimate-v5.1-7b-inp")
    row = replace(row, sizes=replace(row.sizes, min_side=32, multiple=16))
    plan = tiny_plan(row, Device.named("h200", ram_bytes=2**37))
    sooner, int8 = fitted(plan, row), Quantize(value="int8", because="tuned: 1.2x")
    assert sooner.feasible
    assert [s.value for s in sooner.settings if s not in plan.settings] == ["frame"]
    assert sooner.setting(Decode).because.endswith("with decode=whole")
    asked = replace(plan, settings=tuple(replace(s, because=ASKED) for s in plan.settings))
    assert fitted(asked, row).setting(Decode).value == "whole"
    tuned = replace(plan, settings=tuple(int8 if s.type == "quantize" else s for s in plan.settings))
    assert int8 in fitted(tuned, row).settings
    assert fitted(replace(plan, device=replace(plan.device, id="cpu")), row).setting(Decode).value == "whole"


# the table of candidates


@pytest.mark.parametrize("row", CHECKPOINTS.values(), ids=lambda row: row.id)
def test_what_stands_first_is_what_a_plan_has_by_itself(row: Checkpoint) -> None:
    plan = choose(
        Request(image=Path("x.jpg"), prompt="x", model=row.id, seed=1), row, Device.named("rtx-4090"), photo_size=(9, 9)
    )
    sooner = {Decode: "frame"} if row.family == "easyanimate" else {}  # than the reference
    for each in CANDIDATES:
        assert sooner.get(each.kind, plan.setting(each.kind).value) == each.values(row)[0]
        assert all(each.kind.accepts(value) for value in each.values(row))
    assert {each.kind for each in CANDIDATES} | {Offload} == set(vocabulary.SETTINGS.values())


def test_seconds_grow_with_what_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """All on the card, by component, by block, by layer; and where much is computed, blocks cost next to nothing."""
    made_up(4, monkeypatch)
    plan = plan_for(75)
    seconds = {
        value: estimate.with_phases(p, I2VGEN, moved(traces.resident(p, I2VGEN), Offload(value=value))).estimate.seconds
        for value in ("none", "part", "block:2", "block", "leaf")
        for p in [replace(plan, settings=(plan.settings[0], Offload(value=value)))]
    }
    assert all(value is not None for value in seconds.values())
    assert list(seconds.values()) == sorted(seconds.values())  # type: ignore[type-var]
    assert seconds["leaf"] > seconds["none"]  # type: ignore[operator]
    known = estimate.rates.of(plan.device)
    assert known
    few, many = 28 * 10**9, 28 * 10**11
    assert estimate._beside(21.0, few, ((1.0, few),), "block", known) < 21 * 1.01
    assert estimate._beside(21.0, many, ((1.0, many),), "block", known) > many / 60e9
    # as much in all, but a large piece has to come while little is computed
    uneven = estimate._beside(21.0, few, ((0.999, few // 10), (0.001, few - few // 10)), "block", known)
    assert uneven > 21 + 0.9 * few / 60e9 - 0.03


def test_blocks_that_stay_compute_while_the_next_one_comes() -> None:
    shares = (0.1, 0.2, 0.3, 0.4)
    pieces = Pieces(bytes=100, tables_bytes=0, blocks=(1, 2, 3, 4), layers=(10,), block_shares=shares)
    trace = traces.PhaseTrace(
        name="denoise:unet", weights_bytes={}, peak_bytes=0, held={}, flops={}, pieces={"unet": pieces},
        bytes={"host_to_device": 0, "block": 10, "leaf": 0},
    )  # fmt: skip
    whole, some = (moved([trace], Offload(value=value))[0].streams for value in ("block", "block:2"))
    # a room holds the largest alone, and the first two together
    assert whole == ((0.4, 3), (pytest.approx(0.3), 3), (0.3, 4))
    assert sum(share for share, _ in some) == pytest.approx(1.0)
    assert len(some) == 2
    assert {size for _, size in some} == {size for i, size in enumerate(pieces.blocks) if i not in spread(2, 4)}


# saved plans


def test_two_saved_plans_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up(3, monkeypatch)
    small, large = fitted(plan_for(9), I2VGEN), fitted(plan_for(60), I2VGEN)
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(small.dumps())
    b.write_text(large.dumps())
    assert Plan.read(a) == small
    found = {each.what: each for each in differences(Plan.read(a), Plan.read(b))}
    assert found["offload"].b == "none"
    assert "with offload=part" in found["offload"].because[0]
    assert {"budget_bytes", "seconds", "denoise:unet.peak_vram_bytes"} <= set(found)
    assert "request.width" not in found
    assert differences(small, small) == ()
    assert run_cli("plan", "--diff", str(a), str(b), "--json") == 0
    told = json.loads(capsys.readouterr().out)["differences"]
    assert {each["what"] for each in told} == set(found)
    assert run_cli("plan", "--diff", str(a), str(b)) == 0
    assert "denoise:unet.peak_vram GiB" in capsys.readouterr().out
    b.write_text('{"a": 1}')
    assert run_cli("plan", "--diff", str(a), str(b)) == 3
    assert "b.json holds no plan" in capsys.readouterr().err
    assert run_cli("plan", "--diff", str(a), str(tmp_path / "none.json")) == 3


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--table", "--vram", "8GiB"], "--vram would not count"),
        (["--table", "--device", "l4"], "--device would not count"),
        (["--table", "--size", "832x480"], "--size would not count"),
        (["--diff", "a", "b", "--pinned", "8GiB"], "--pinned asks for another"),
        (["--diff", "a", "b", "--table"], "--table asks for another"),
    ],
)
def test_a_flag_that_would_not_count_is_refused(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("plan", *flags) == 2
    assert told in capsys.readouterr().err


def test_a_saved_plan_is_run_again(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = (
        str(photo), "-p", "pan", "--size", "64x64", "--frames", "5", "--steps", "2", "--seed", "4", "--device", "cpu",
        "--set", "guidance=together", "--json",
    )  # fmt: skip
    assert run_cli("plan", *asked) == 0
    file = tmp_path / "plan.json"
    file.write_text(capsys.readouterr().out)
    replayed, made = tmp_path / "a", tmp_path / "b"
    assert run_cli("run", "--plan", str(file), "-o", str(replayed), "--no-checkpoint") == 0
    assert run_cli("run", *asked, "-o", str(made), "--no-checkpoint") == 0
    frames = sorted(path.name for path in replayed.glob("*.png"))
    assert frames
    from PIL import Image

    for name in frames:
        assert Image.open(replayed / name).tobytes() == Image.open(made / name).tobytes()
    capsys.readouterr()
    assert run_cli("run", "--plan", str(file), "--seed", "5") == 2
    assert "--seed would change it" in capsys.readouterr().err
    card = Plan.read(file)
    file.write_text(replace(card, device=Device.named("rtx-4090")).dumps())
    assert run_cli("run", "--plan", str(file)) == 2
    assert "rtx-4090 is a card to plan for" in capsys.readouterr().err


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_what_a_vae_remembers_in_ram_is_asked_of_ram() -> None:
    """With all weights on the card, too; another decode relieves that, and fewer weights do not."""
    row = CHECKPOINTS["easyanimate-v5.1-7b-inp"]
    request = Request(image=Path("x.jpg"), prompt="x", model=row.id, width=672, height=384, num_frames=9, seed=1)
    device = Device.named("h200", ram_bytes=GIB // 4)
    plan = choose(request, row, device, photo_size=(672, 384), settings={"decode": "ram"})
    short = estimate.estimated(plan, row)
    assert short.lacks("shelf")
    assert not short.lacks("host")
    assert not short.feasible
    with pytest.raises(DoesNotFit, match=r"decode=ram keeps .* in RAM in its phase .*another decode"):
        estimate.check_fits(short)
    option = fit.Option(short, traces.traced(plan, row), (0,), (0.0, 0, 0))
    assert not option.too_heavy
    relieved = {each.kind.type for each in CANDIDATES if option.relieved_by(each, each.values(row))}
    assert relieved == {"decode", "quantize"}


def test_the_leanest_keeps_no_more_in_ram_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(changes.__globals__, "PROBES", 0)
    row = tiny_row("easyanimate-v5.1-7b-inp")
    row = replace(row, sizes=replace(row.sizes, min_side=32, multiple=16))

    def leanest(ram_bytes: int, vram_bytes: int, pinned_bytes: int | None = None, **settings: Setting) -> Plan:
        device = replace(
            Device.named("h200", ram_bytes=ram_bytes), vram_limit_bytes=vram_bytes, disk_free_bytes=1,
            pinned_limit_bytes=pinned_bytes,
        )  # fmt: skip
        plan = candidates.usual(tiny_plan(row, device), row)
        plan = replace(plan, settings=tuple(settings.get(s.type, s) for s in plan.settings))
        return fit.leanest(plan, row)

    assert leanest(GIB, 1).setting(Decode).value == "ram"
    plan = leanest(1, 1)
    assert plan.setting(Decode).value == "frame"
    *_, card = changes(plan, row)
    assert card.flag.startswith("a card with")
    assert leanest(1, card.peak_bytes).feasible
    asked_leaf = Offload(value="leaf", because=ASKED)
    asked = leanest(1, 1, decode=Decode(value="ram", because=ASKED))
    assert not any(way.flag.startswith("a card") for way in changes(asked, row)), "RAM is short there, too"
    wide = leanest(2**40, 1)
    assert wide.offload == "leaf"
    pinned = max(phase.pinned_bytes for phase in wide.estimate.phases) - 1
    plan = leanest(2**40, 1, pinned)  # enough for the weights, or for what the VAE remembers
    assert (plan.offload, plan.setting(Decode).value) == ("leaf", "frame")
    assert leanest(2**40, plan.estimate.peak_bytes, pinned).feasible
    assert not plan.lacks("pinned")
    *_, card = changes(plan, row)
    assert card.peak_bytes == plan.estimate.peak_bytes
    assert not any(way.flag.startswith("a card") for way in changes(leanest(2**40, 1, 1, offload=asked_leaf), row))


# the table of what fits


def test_the_filed_table_is_what_the_command_writes() -> None:
    """Its columns, its models and its cards; the numbers follow the code when it is made anew (`make fits`)."""
    page = (Path(__file__).parents[1] / "docs" / "fits.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert lines[0] == f"| {' | '.join(fits.COLUMNS)} |"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    models = list(dict.fromkeys(row[0] for row in cells))
    assert models == [id for id in CHECKPOINTS if id in models]
    assert [(row[0], row[1]) for row in cells] == [
        (id, f"{gb} GB ({card})") for id in models for card, gb in fits.MACHINES.items()
    ]
    for row in cells:
        assert len(row) == len(fits.COLUMNS)
        if row[2] != "nothing":
            card = row[1].partition("(")[2].rstrip(")")
            assert float(row[6]) <= Device.named(card).budget_bytes / GIB + 0.05
            assert row[4] == "-" or all("=" in setting for setting in row[4].split())


def test_a_row_is_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    works: list[tuple[int, int, int]] = []

    def planned(plan: Plan, checkpoint: Checkpoint, tier: str) -> Plan:
        request = plan.request
        works.append((request.width, request.height, request.num_frames))
        weights = 0 if request.width * request.height <= 832 * 480 else 2**60
        return replace(plan, estimate=replace(plan.estimate, weights_bytes=weights))

    monkeypatch.setattr(fits, "fitted", planned)
    told: list[str] = []
    plan = fits._largest(A14B, Device.named("rtx-4090"), "exact")
    assert plan
    assert (plan.request.width, plan.request.height, plan.request.num_frames) == (832, 480, 81)
    pixels = [w * h * n for w, h, n in works]
    assert pixels == sorted(pixels, reverse=True)
    assert works[0] == (1280, 720, 81)
    monkeypatch.setattr(fits, "_largest", lambda *_: None)
    first = next(fits.rows(models=("i2vgen-xl",), told=told.append))
    assert first.cells()[2] == "nothing"
    assert told == ["i2vgen-xl on rtx-3070"]
