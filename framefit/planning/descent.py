"""One run's way down the ladder: which errors say that memory ran out, and what is told when a rung is taken."""

from __future__ import annotations

from dataclasses import dataclass

from framefit.ledger import Ledger
from framefit.ledger.shortage import Shortage
from framefit.plan import Plan
from framefit.planning.ladder import lower, lowered
from framefit.report import Rung, named

__all__ = ["Descent"]


@dataclass(slots=True)
class Descent:
    plan: Plan
    """As it is now."""
    rungs: tuple[Rung, ...] = ()
    """Taken so far, before a crash too that the run was resumed from."""
    fixed: frozenset[str] = frozenset()
    """Types of settings that no rung moves: those that were withdrawn, or for whose rung there was no memory."""
    held: bool = False
    """Whether the plan stays as it is, for whoever measures it; memory that runs out is an error then."""

    def __post_init__(self) -> None:
        self.plan = lowered(self.plan, self.rungs)

    def shortage(self, error: Exception) -> Shortage:
        """What `error` says of memory; raises it where it is about something else, or the plan is held.

        Lower the plan outside of the `except` block: until it ends, the error's frames hold what they computed with.
        """
        found = None if self.held else Shortage.told(error, self.plan.device.id)
        if found is None:
            raise error
        return found

    def lower(self, shortage: Shortage, step: int | None, ledger: Ledger) -> None:
        """One rung down in the phase that runs, told to the user.

        Raises:
            DoesNotFit: there is none left.
        """
        rung = lower(self.plan, self.rungs, ledger.last, step, shortage, self.fixed)
        self.plan, self.rungs = lowered(self.plan, [rung]), (*self.rungs, rung)
        ledger.note(_sentence(rung))

    def refuse(self, shortage: Shortage, before: Plan, ledger: Ledger) -> None:
        """Memory ran out for the last rung itself: the plan is as `before`, and no other rung moves that setting."""
        *kept, rung = self.rungs
        self.plan, self.rungs, self.fixed = before, tuple(kept), self.fixed | {rung.setting}
        ledger.note(
            f"{rung.setting}={rung.after} cannot be, as {named(shortage.of)} ran out for it: {rung.setting} stays "
            f"{rung.before}."
        )


def _sentence(rung: Rung) -> str:
    where = rung.phase if rung.step is None else f"{rung.phase} after step {rung.step}"
    more = "" if rung.asked_bytes is None else f", {rung.asked_bytes / 2**30:.2f} GiB more asked for"
    return (
        f"{named(rung.of)} ran out in {where} ({rung.held_bytes / 2**30:.2f} GiB held{more}): "
        f"{rung.setting}={rung.before} becomes {rung.after}, and the run goes on from there."
    )
