"""From a request to a plan: what was left open is chosen, with a reason, and what it will need is said beforehand."""

from framefit.planning.changes import Change, changes
from framefit.planning.choose import choose
from framefit.planning.diff import differences
from framefit.planning.estimate import check_fits, estimated
from framefit.planning.fit import fitted
from framefit.planning.prepare import prepare

__all__ = ["Change", "changes", "check_fits", "choose", "differences", "estimated", "fitted", "prepare"]
