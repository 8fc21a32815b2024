"""A video that is not sound is made once more, without the settings that may be the cause.

The first video is in its place by then, and is replaced once the second one is whole: whatever goes wrong with that,
there is a video. Settings that the user asked for are not withdrawn, but named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from framefit.checkpoint import State
from framefit.errors import Cancelled, FramefitError
from framefit.families import Checkpoint
from framefit.families.pieces import borders
from framefit.pipeline import Pipeline, load
from framefit.plan import Decode, Plan, Setting
from framefit.planning.suspects import decoding, suspects, withdrawn
from framefit.quality.sanity import SEAM, Watch
from framefit.report import Retry
from framefit.video import Frame, Video

__all__ = ["Again", "watch_for", "watched"]


def watch_for(plan: Plan, checkpoint: Checkpoint) -> Watch:
    """For seams only where the plan may make some: an edge of the scene looks like one."""
    vae = [setting for setting in suspects(plan, checkpoint, seam_alone=True) if decoding(setting)]
    known = [setting for setting in vae if isinstance(setting, Decode)]
    met = borders(checkpoint, plan.request, known[0].tile_px) if known and known == vae else {}
    return Watch(thin=True, seams=bool(vae), borders=met)


@dataclass(slots=True)
class Again:
    """The second try of one run."""

    pipeline: Pipeline
    """What made the video that is kept."""
    checkpoint: Checkpoint
    run: Callable[[Pipeline], Video]
    """From the beginning to the end."""
    write: Callable[[Pipeline, Video], Sequence[str]]
    """Over the first video. Returns what is wrong with the second."""
    translated: Callable[[Exception], FramefitError]

    def where(self, findings: Sequence[str], state: State) -> tuple[Sequence[str], Retry | None]:
        """What is wrong with the video that is kept, and what was tried where the first was not sound.

        Args:
            findings: about the first video.
            state: after its last step.
        """
        if not findings:
            return (), None
        seam_alone = all(finding.startswith(SEAM) for finding in findings)
        found = suspects(self.pipeline.plan, self.checkpoint, seam_alone=seam_alone)
        free = [setting for setting in found if not setting.asked]
        self.pipeline.ledger.note(_sentence(findings, found, free))
        if not free:
            return findings, None
        retry = Retry(findings=tuple(findings), withdrawn=_named(free))
        try:
            return self._made(state, free, "; ".join(findings)), retry
        except KeyboardInterrupt:
            error: FramefitError = Cancelled("stopped at once.")
        except Exception as other:
            error = other if isinstance(other, FramefitError) else self.translated(other)
        self.pipeline.ledger.note(f"the second try failed and the first video is kept: {error}")
        return findings, Retry(findings=tuple(findings), withdrawn=_named(free), failed=str(error))

    def close(self) -> None:
        """It is not tried again."""
        self.pipeline.close()

    def _made(self, state: State, free: Sequence[Setting], told: str) -> Sequence[str]:
        first = self.pipeline
        plan = withdrawn(first.plan, self.checkpoint, free, f"withdrawn, as the video was not sound ({told})")
        gone = frozenset(setting.type for setting in free)
        fixed = gone - {Decode.type}  # which comes down by exact values alone
        of_vae = all(decoding(setting) for setting in free)
        if of_vae and not any(isinstance(setting, Decode) and setting.blend for setting in free):
            first.rearrange(plan, fixed)
            findings = self.write(first, first.video(state))
        else:  # weights that were rounded are read anew
            first.unload()
            rungs = tuple(rung for rung in first.rungs if rung.setting not in gone)
            second = load(plan, self.checkpoint, first.ledger, rungs=rungs, fixed=fixed)
            self.pipeline = second  # whatever comes, it is the one to close
            findings = self.write(second, second.video(state) if of_vae else self.run(second))
        if findings:
            first.ledger.note(f"without {_named(free)} the video may not be sound either ({'; '.join(findings)}).")
        return findings


def _sentence(findings: Sequence[str], found: Sequence[Setting], free: Sequence[Setting]) -> str:
    told = f"the video may not be sound ({'; '.join(findings)})"
    if free:
        return f"{told}: it is made once more without {_named(free)}."
    return f"{told}: {_named(found)} may be the cause, leave it out to see." if found else f"{told}."


def _named(settings: Iterable[Setting]) -> str:
    return " ".join(f"{setting.type}={setting.value}" for setting in settings)


def watched(frames: Iterable[Frame], watch: Watch) -> Iterator[Frame]:
    """The frames as they go by."""
    for frame in frames:
        watch.see(frame)
        yield frame
