"""From a profile to ranked advice: the rules asked one by one, and what they found, the largest gain first.

What the rules ask and advise is in `rules`; the tree in docs/diagnose.md is drawn from them here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from framefit.device import Device
from framefit.errors import BadInput, FramefitError
from framefit.plan import Tier
from framefit.profiling.breakdown import Breakdown
from framefit.profiling.layers import Loss
from framefit.profiling.profile import DENOISE, PhaseProfile, Profile
from framefit.profiling.surroundings import Surroundings
from framefit.rates import Rates

__all__ = [
    "PARTS",
    "Advice",
    "Case",
    "Evidence",
    "Finding",
    "Part",
    "Remedy",
    "Rule",
    "diagnose",
    "parts",
    "text",
    "tree",
]

SMALL_PHASE = 0.05
"""Share of a run under which a phase is not asked about."""
WORTH = 0.05
"""Share of a run that advice must save to be told of a phase's part that is not its largest."""

Part = Literal["transfer", "gaps", "host", "attention", "matmul", "convolution", "elementwise"]
PARTS: tuple[Part, ...] = ("transfer", "gaps", "host", "attention", "matmul", "convolution", "elementwise")
"""What the time of a phase goes to. One of them is the largest: there is no mix without an answer."""

Evidence = Mapping[str, Any]
"""Figures: seconds are of one passage of a phase, or of the whole run where a rule is about that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What the rules are asked about: phases on a device, in their surroundings."""

    device: Device
    precision: str
    """Of the plan."""
    settings: Mapping[str, str]
    """Of the plan, by type."""
    phases: tuple[PhaseProfile, ...]
    ceilings: Rates
    surroundings: Surroundings
    losses: tuple[Loss, ...] = ()
    """By layer, where the prediction was compared with the untouched model's."""

    @property
    def run_s(self) -> float:
        return sum(phase.times * phase.breakdown.plain_s for phase in self.phases)

    def guidance(self, phase: PhaseProfile) -> str:
        """How the branches of guidance run in `phase`; empty where there are none."""
        return self.settings.get("guidance", "") if phase.name.startswith(DENOISE) else ""

    @classmethod
    def of(cls, profile: Profile, losses: Sequence[Loss] = ()) -> Self:
        return cls.from_json(profile.to_json(), losses)

    @classmethod
    def from_json(cls, profile: Mapping[str, Any], losses: Sequence[Loss] = ()) -> Self:
        """From what `Profile.to_json` gave."""
        plan = profile["plan"]
        return cls(
            device=Device.from_json(plan["device"]), precision=plan["precision"],
            settings={setting["type"]: setting["value"] for setting in plan["settings"]},
            phases=tuple(PhaseProfile.from_json(phase) for phase in profile["phases"]),
            ceilings=Rates.from_json(profile["ceilings"]),
            surroundings=Surroundings.from_json(profile["surroundings"]), losses=tuple(losses),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """Something to do about a finding."""

    do: str
    tier: Tier | None
    """What it does to the video; None: it makes another one, of less work."""
    gain: Callable[[Case, Evidence], float | None]
    """Seconds that it may save where the evidence's seconds are spent, at the most; None: it does not apply."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One question, and what to do where the answer is yes. Exactly one of `of_run`, `of_phase` and `part` is there."""

    name: str
    asks: str
    says: str
    """The evidence as a sentence, a format string over it."""
    remedies: tuple[Remedy, ...]
    of_run: Callable[[Case], Evidence | None] | None = None
    of_phase: Callable[[Case, PhaseProfile], Evidence | None] | None = None
    part: Part | None = None
    """Asked where this is a phase's largest part, or where a remedy is worth it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    do: str
    tier: Tier | None
    gain_s: float
    """In a run of the request, at the most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A rule that said yes."""

    rule: str
    phases: tuple[str, ...]
    """Empty: the whole run. The experts that one thing was found of are together."""
    binds: bool
    """Whether it is about the largest part of a phase."""
    because: str
    """The evidence in a sentence; of several phases it is that of the one with most to gain."""
    evidence: Evidence
    advice: tuple[Advice, ...]
    """What saves most first."""

    @property
    def gain_s(self) -> float:
        """Seconds that the best advice may save in a run of the request, at the most."""
        return max((advice.gain_s for advice in self.advice), default=0.0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"gain_s": self.gain_s}


def diagnose(case: Case, rules: Sequence[Rule]) -> list[Finding]:
    """Every finding, the largest gain first. Gains of one phase overlap: they do not add up."""
    found = list(_of_run(case, rules))
    for phase in case.phases:
        if phase.times * phase.breakdown.plain_s > SMALL_PHASE * case.run_s:
            found += _of_phase(case, phase, rules)
    return sorted(_together(found), key=lambda finding: -finding.gain_s)


def read(path: Path) -> Case:
    """What `framefit profile` wrote: its folder, or the profile.json in it.

    Raises:
        BadInput: it cannot be read, or is something else.
    """
    file = path / "profile.json" if path.is_dir() else path
    try:
        return Case.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, FramefitError) as error:
        raise BadInput(
            f"{file} is no profile of this framefit ({type(error).__name__}: {error}): give the folder that framefit "
            f"profile wrote."
        ) from None


def parts(call: Breakdown) -> dict[Part, float]:
    """Seconds of one call by what they went to; copies only where nothing else ran beside them."""
    gaps_s = call.waiting_s * call.gaps_s / call.idle_s if call.idle_s else 0.0
    return {
        "transfer": call.transfer_alone_s, "gaps": gaps_s, "host": call.waiting_s - gaps_s,
        "attention": call.kinds["attention"].seconds, "matmul": call.kinds["matmul"].seconds,
        "convolution": call.kinds["convolution"].seconds, "elementwise": call.kinds["elementwise"].seconds,
    }  # fmt: skip


def _of_run(case: Case, rules: Sequence[Rule]) -> Iterator[Finding]:
    for rule in rules:
        if rule.of_run and (evidence := rule.of_run(case)):
            yield _finding(case, rule, evidence)


def _of_phase(case: Case, phase: PhaseProfile, rules: Sequence[Rule]) -> Iterator[Finding]:
    shares = parts(phase.breakdown)
    largest = max(PARTS, key=lambda part: shares[part])
    for rule in rules:
        if rule.of_phase and (evidence := rule.of_phase(case, phase)):
            yield _finding(case, rule, evidence, phase)
        if rule.part:
            facts = _part(phase, rule.part, shares) | {"guidance": case.guidance(phase)}
            finding = _finding(case, rule, facts, phase, binds=rule.part == largest)
            worth = max((a.gain_s for a in finding.advice if a.tier), default=0.0) >= WORTH * case.run_s
            if finding.binds or worth:
                yield finding


def _together(found: Sequence[Finding]) -> Iterator[Finding]:
    """What was found of several experts as one finding, with the gains of all."""
    groups: dict[tuple[str, Any], list[Finding]] = {}
    for each in found:
        experts = any(phase.startswith(DENOISE) for phase in each.phases)
        groups.setdefault((each.rule, DENOISE if experts else each.phases), []).append(each)
    for same in groups.values():
        gains: dict[tuple[str, Tier | None], float] = {}
        for advice in (advice for each in same for advice in each.advice):
            gains[advice.do, advice.tier] = gains.get((advice.do, advice.tier), 0.0) + advice.gain_s
        yield replace(
            max(same, key=lambda finding: finding.gain_s),
            phases=tuple(phase for each in same for phase in each.phases), binds=any(each.binds for each in same),
            advice=_ranked(Advice(do=do, tier=tier, gain_s=gain_s) for (do, tier), gain_s in gains.items()),
        )  # fmt: skip


def _ranked(advice: Iterable[Advice]) -> tuple[Advice, ...]:
    return tuple(sorted(advice, key=lambda each: -each.gain_s))


def _part(phase: PhaseProfile, part: Part, shares: Mapping[Part, float]) -> dict[str, Any]:
    """What every rule about a part of a phase is given."""
    call, spent_s = phase.breakdown, sum(shares.values())
    work = next((cost for kind, cost in call.kinds.items() if kind == part), None)
    facts: dict[str, Any] = {
        "seconds": shares[part],
        "share": shares[part] / spent_s if spent_s else 0.0,
        "launches": call.launches,
    }
    if work is None:
        return facts
    reached = work.of_ceiling
    beside = "" if reached is None else f" at {reached:.0%} of the measured ceiling"
    return facts | {
        "ceiling_s": work.ceiling_s, "precision": work.precision, "beside": beside, "all_s": work.seconds,
        "others_s": call.busy_s - shares[part],
    }  # fmt: skip


def _finding(
    case: Case, rule: Rule, evidence: Evidence, phase: PhaseProfile | None = None, *, binds: bool = False
) -> Finding:
    times, name = (phase.times, phase.name) if phase else (1, "")
    evidence = {**evidence, "each": " a step" if name.startswith(DENOISE) else ""}
    gains = ((remedy, remedy.gain(case, evidence)) for remedy in rule.remedies)
    return Finding(
        rule=rule.name, phases=(name,) if name else (), binds=binds, because=rule.says.format(**evidence),
        evidence=evidence, advice=_ranked(
            Advice(do=remedy.do, tier=remedy.tier, gain_s=times * max(0.0, gain))
            for remedy, gain in gains
            if gain is not None
        ),
    )  # fmt: skip


def text(case: Case, found: Sequence[Finding]) -> str:
    """For people."""
    lines = [f"{case.run_s:.3g} s a run after loading, on {case.device.name}, {case.precision}"]
    for number, finding in enumerate(found, 1):
        lines.append(f"\n{number}. {finding.rule}, {', '.join(finding.phases) or 'the whole run'}: {finding.because}")
        lines += [f"   - {_gain(advice, case)}: {advice.do}" for advice in finding.advice]
    if case.losses:
        told = ", ".join(f"{loss.layer} {loss.added:.2g}" for loss in case.losses)
        lines.append(f"\nOf the untouched model's layers most differ (relative L2): {told}")
    lines.append("\nGains are the most that each may save in a run; those of one phase overlap.")
    return "\n".join(lines)


def _gain(advice: Advice, case: Case) -> str:
    share = f" ({advice.gain_s / case.run_s:.0%})" if case.run_s else ""
    return f"{advice.gain_s:.3g} s{share}, {advice.tier or 'another video'}"


def tree(rules: Sequence[Rule]) -> str:
    """The rules as a Mermaid flow chart: whatever an answer is, the next question is asked, too."""
    lines = ["flowchart TD", '    before(["a profile"])']
    before = "before"
    for rule in rules:
        if rule.part is None:
            node = rule.name.replace("-", "_")
            lines.append(f'    {before} --> {node}{{"{"each phase: " if rule.of_phase else ""}{rule.asks}"}}')
            lines.append(f'    {node} -- yes --> {node}_do["{_box(rule)}"]')
            before = node
    lines.append(f'    {before} --> part{{"each phase: what takes most of it?"}}')
    ends = (rule for rule in rules if rule.part)
    lines += [f'    part -- "{rule.asks}" --> {rule.name.replace("-", "_")}["{_box(rule)}"]' for rule in ends]
    return "\n".join(lines) + "\n"


def _box(rule: Rule) -> str:
    told = [f"{remedy.do} ({remedy.tier or 'another video'})" for remedy in rule.remedies]
    return "<br/>".join([f"<b>{rule.name}</b>", *told]).replace('"', "'")
