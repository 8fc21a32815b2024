"""From a request to a plan: what was left open is chosen, with a reason, and what it will need is said beforehand."""

from framefit.planning.choose import choose
from framefit.planning.estimate import check_fits, estimated
from framefit.planning.prepare import prepare

__all__ = ["check_fits", "choose", "estimated", "prepare"]
