"""The search: the fastest settings that fit the budget, and why each of them.

States are rungs: for every type of setting, how far down its candidates. From a state only a type leads on that
touches a phase which does not fit, or leaves fewer bytes of weights. States are met in the order of the least seconds
that they can take so that the first that nothing can beat is the fastest; every place for the weights is compared at
each state, without another trace. A value is reckoned slower than those before it (`candidates.RUNG`, and `LIGHTER`),
so that more budget, which only adds states that fit, never makes a plan slower. No clock, no chance: the same inputs
give the same plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

from framefit.families import Checkpoint
from framefit.plan import Offload, Plan, Setting, Tier
from framefit.planning.because import reasoned
from framefit.planning.candidates import CANDIDATES, RUNG, Candidates, ladder, places, usual
from framefit.planning.choose import untouched
from framefit.planning.estimate import estimated, replayed, with_phases
from framefit.planning.moved import blocks, can_move, moved
from framefit.planning.phase import PhaseTrace
from framefit.planning.traces import resident, traced

__all__ = ["fitted", "leanest"]

Rungs = tuple[int, ...]

LEAST = 0.9
"""Bytes beside the weights over those with the last values, at least: of a short video, chunks take 6 % more than a
whole forward does (EasyAnimate 12B)."""
LIGHTER = 0.25
"""Least seconds of a phase over those with the value before, where that leaves fewer bytes of weights: half of them to
move, or a VAE in 16 bits (0.69 by the dry run), with room."""
TRIED = 3
"""States that do not fit after which it is asked whether any can."""


@dataclass(frozen=True, slots=True)
class Option:
    """A plan with its estimate, and what that rests on."""

    plan: Plan
    traces: tuple[PhaseTrace, ...]
    rungs: Rungs
    cost: tuple[float, int, int]
    """Seconds, 0 where they are not known; then the place of its offload in the order, and its rungs in all."""

    @property
    def place(self) -> str:
        return self.plan.setting(Offload).value

    def no_sooner(self, before: Option, each: Candidates) -> Option:
        """Where `before` differs by the value of a type that comes before."""
        known = {phase.name: phase.seconds for phase in before.plan.estimate.phases}
        touches = self.plan.setting(each.kind).touches
        phases = tuple(
            replace(phase, seconds=max(phase.seconds, RUNG * least))
            if phase.seconds is not None and (least := known[phase.name]) is not None and touches(phase.name)
            else phase
            for phase in self.plan.estimate.phases
        )
        plan = replace(self.plan, estimate=replace(self.plan.estimate, phases=phases))
        return replace(self, plan=plan, cost=(plan.estimate.seconds or 0.0, *self.cost[1:]))

    def relieved_by(self, each: Candidates, values: Sequence[str]) -> bool:
        """Whether another value of a type could help where it does not fit: where weights alone are too much, or RAM
        is, only one with fewer of them. That may be sooner, too."""
        if _lighten(each, values):
            return True
        free = self.plan.estimate.free_bytes
        weights = {trace.name: sum(trace.weights_bytes.values()) for trace in self.traces}
        touched = [p for p in self.plan.estimate.phases if self.plan.setting(each.kind).touches(p.name)]
        over = {phase.name: self.plan.excess(phase) for phase in touched}
        return any(
            (excess["device"] > 0 and weights.get(name, free + 1) <= free) or excess.get("shelf", 0) > 0
            for name, excess in over.items()
        )

    @property
    def too_heavy(self) -> bool:
        """Whether its weights alone are too much for the card, or what RAM or the disk is to hold of them: only fewer
        of them could help."""
        free, on_card = self.plan.estimate.free_bytes, self.plan.device.id != "cpu"
        weights = (sum(trace.weights_bytes.values()) for trace in self.traces)
        return (on_card and max(weights) > free) or any(map(self.plan.lacks, ("host", "pinned", "disk")))


def fitted(plan: Plan, checkpoint: Checkpoint, *, tier: Tier = "exact") -> Plan:
    """`plan` with its estimate and the fastest settings that fit, and a reason for each that was changed.

    What the user asked for stays.

    Where nothing fits, with the leanest settings: it is not feasible then.

    Args:
        tier: the weakest that a setting may have that nobody asked for.
    """
    soonest = _soonest(plan, checkpoint)
    first = estimated(soonest, checkpoint)
    if not first.estimate.phases:
        return replace(plan, estimate=first.estimate)
    search = _Search(soonest, checkpoint, tier)
    sooner = any(_lighten(each, values[1:]) for each, values in search.ladders) and plan.offload == "none"
    if first.feasible and soonest == plan and not sooner:
        return first
    found = search.best() or search.leanest()
    before = {
        s.type: search.before(found, s, stood) if found.plan.feasible else found.plan  # nothing fits: it is the leanest
        for s, stood in zip(found.plan.settings, plan.settings, strict=True)
        if s != stood
    }
    return reasoned(replayed(found.plan, checkpoint, found.traces), before, blocks(found.traces))


def _soonest(plan: Plan, checkpoint: Checkpoint) -> Plan:
    """`plan` with the first candidate where a card would do as the reference does; what was tuned stays."""
    if plan.device.id == "cpu":
        return plan
    theirs = {setting.type: setting.value for setting in untouched(checkpoint)}
    firsts = usual(plan, checkpoint).settings
    pairs = zip(plan.settings, firsts, strict=True)
    return replace(plan, settings=tuple(first if s.value == theirs.get(s.type, s.value) else s for s, first in pairs))


def leanest(plan: Plan, checkpoint: Checkpoint, *, tier: Tier = "exact") -> Plan:
    """`plan` with the settings that need least, whatever they take; quicker than `fitted`."""
    return _Search(plan, checkpoint, tier).leanest().plan


@dataclass(frozen=True, slots=True)
class _Search:
    plan: Plan
    checkpoint: Checkpoint
    tier: Tier
    _met: dict[Rungs, tuple[Option, ...]] = field(default_factory=dict)
    _ranked: dict[Rungs, tuple[Option, ...]] = field(default_factory=dict)

    @property
    def ladders(self) -> list[tuple[Candidates, tuple[str, ...]]]:
        kinds = {setting.type for setting in self.plan.settings}
        return [
            (each, ladder(each, self.plan, self.checkpoint, self.tier))
            for each in CANDIDATES if each.kind.type in kinds
        ]  # fmt: skip

    def best(self) -> Option | None:
        """The fastest option that fits."""
        ladders = self.ladders
        start = (0,) * len(ladders)
        waiting: list[tuple[float, int, Rungs]] = [(0.0, 0, start)]
        met, best = set[Rungs](), None
        while waiting:
            least_s, _, rungs = heappop(waiting)
            if best and (least_s, 0, sum(rungs)) >= best.cost:
                break
            if rungs in met:
                continue
            met.add(rungs)
            options = self.ranked(rungs)
            if best is None and len(met) == TRIED and self.hopeless():
                break
            fitting = [option for option in options if option.plan.feasible]
            best = min([*fitting, *([best] if best else [])], key=lambda option: option.cost, default=None)
            lighter = any(
                _lighten(each, values[rung + 1 :]) for rung, (each, values) in zip(rungs, ladders, strict=True)
            )
            hopeful = [o for o in options if lighter or not o.too_heavy]
            for i, (each, values) in enumerate(ladders):
                further = (*rungs[:i], rungs[i] + 1, *rungs[i + 1 :])
                if further[i] == len(values):
                    continue
                slower = LIGHTER if _lighten(each, values[further[i] :]) else RUNG
                led = [o for o in hopeful if best is None or o.cost < best.cost or slower < 1]
                if bounds := [_bound(o, each, slower) for o in led if o.relieved_by(each, values)]:
                    heappush(waiting, (min(bounds), sum(further), further))
        return best

    def hopeless(self) -> bool:
        """Whether nothing can fit: in every place some phase has too many bytes with the last values, which leave least
        beside the weights, even with the weights of the first ones. Not known where there are fewer weights to choose:
        in 8 bits they leave a little more."""
        first, last = ({option.place: option for option in self.options(rungs)} for rungs in (self.lightest, self.last))
        # another value may leave a block more or less to stream, and so a place
        both = [place for place in first if place in last]
        return not any(self.lightest) and all(self._least(first[p], last[p]).lacks("device") for p in both)

    def _least(self, first: Option, last: Option) -> Plan:
        """Less than any plan with their place can need. Blocks that compute in chunks come as a whole, and take more
        room than layers."""
        traces = [
            replace(
                least, peak_bytes=int(LEAST * least.peak_bytes),
                weights_bytes=min(trace.weights_bytes, least.weights_bytes, key=lambda each: sum(each.values())),
            )
            for trace, least in zip(first.traces, last.traces, strict=True)
        ]  # fmt: skip
        return with_phases(last.plan, self.checkpoint, traces)

    def leanest(self) -> Option:
        """Of the last values of all types, where the weights lie so that least is needed; where RAM has no room for
        what is no weight (a VAE's memories), the last ones that need none, too."""

        def need(option: Option) -> tuple[bool, bool, int, tuple[float, int, int]]:
            return not option.plan.feasible, option.plan.lacks("shelf"), _excess(option.plan), option.cost

        options = self.options(self.last)
        if not min(options, key=need).plan.feasible and any(option.plan.lacks("shelf") for option in options):
            options = (*options, *self.options(self.last_on_card))
        return min(options, key=need)

    @property
    def last(self) -> Rungs:
        return tuple(len(values) - 1 for _, values in self.ladders)

    @property
    def last_on_card(self) -> Rungs:
        """As `last`, of the values that keep on the card what is no weight, where there is one."""
        return tuple(
            max((i for i, value in enumerate(values) if not each.in_ram(value)), default=0)
            for each, values in self.ladders
        )

    @property
    def lightest(self) -> Rungs:
        """The last values of what makes weights fewer, and the first ones of all else."""
        return tuple(
            rung * _lighten(each, values) for rung, (each, values) in zip(self.last, self.ladders, strict=True)
        )

    def before(self, option: Option, setting: Setting, stood: Setting) -> Plan:
        """As `option`, with the value of one type that comes before its own; of offload, the level before. Before
        the first one comes what `stood` there."""
        if isinstance(setting, Offload) and setting.level != "none":
            level = {"part": "none", "block": "part", "leaf": "block", "disk": "block"}[setting.level]
            return next(o.plan for o in self.ranked(option.rungs) if o.plan.offload == level)
        rungs = tuple(
            rung - (each.kind.type == setting.type) for (each, _), rung in zip(self.ladders, option.rungs, strict=True)
        )
        told = () if min(rungs) < 0 or isinstance(setting, Offload) else self.ranked(rungs)
        there = next((o.plan for o in told if o.place == option.place), None)
        return there or estimated(_with(option.plan, {setting.type: stood.value}), self.checkpoint)

    def ranked(self, rungs: Rungs) -> tuple[Option, ...]:
        """As `options`, each phase `RUNG` slower than with the value before, or more. Where that leaves fewer bytes of
        weights to move, it may well be sooner."""
        if rungs not in self._ranked:
            options = {option.place: option for option in self.options(rungs)}
            for i, (each, values) in enumerate(self.ladders):
                if rungs[i] and not _lighten(each, values[: rungs[i] + 1]):
                    for before in self.ranked((*rungs[:i], rungs[i] - 1, *rungs[i + 1 :])):
                        if option := options.get(before.place):
                            options[before.place] = option.no_sooner(before, each)
            self._ranked[rungs] = tuple(options.values())
        return self._ranked[rungs]

    def options(self, rungs: Rungs) -> tuple[Option, ...]:
        """Every place for the weights, at the values of these rungs."""
        if rungs not in self._met:
            self._met[rungs] = tuple(self._options(rungs))
        return self._met[rungs]

    def _options(self, rungs: Rungs) -> Iterator[Option]:
        values = {each.kind.type: ladder[rung] for (each, ladder), rung in zip(self.ladders, rungs, strict=True)}
        plan = _with(self.plan, values)
        traces = resident(plan, self.checkpoint)
        for index, place in enumerate(places(plan, traces)):
            there = _with(plan, {"offload": place})
            offload = there.setting(Offload)
            found = moved(traces, offload) if can_move(traces, offload) else traced(there, self.checkpoint)
            there = with_phases(there, self.checkpoint, found)
            yield Option(there, found, rungs, (there.estimate.seconds or 0.0, index, sum(rungs)))


def _lighten(each: Candidates, values: Sequence[str]) -> bool:
    """Whether there are fewer bytes of weights with some of these values."""
    return any(map(each.lightens, values))


def _with(plan: Plan, values: Mapping[str, str]) -> Plan:
    """`plan` with other values; a setting whose value stays keeps its reason."""
    return replace(
        plan,
        settings=tuple(
            type(s)(value=values[s.type]) if values.get(s.type, s.value) != s.value else s for s in plan.settings
        ),
    )


def _bound(option: Option, each: Candidates, slower: float) -> float:
    """Least seconds with the next value of a type, where the phases that it touches take so many times as long."""
    touches = option.plan.setting(each.kind).touches
    known = [(phase.seconds, phase.name) for phase in option.plan.estimate.phases if phase.seconds is not None]
    return sum(seconds * (slower if touches(name) else 1) for seconds, name in known) if option.cost[0] else 0.0


def _excess(plan: Plan) -> int:
    """Bytes that it needs beyond what there is, phase by phase."""
    return sum(max(0, plan.excess_bytes(phase)) for phase in plan.estimate.phases)
