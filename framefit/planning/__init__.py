"""From a request to a plan."""

from framefit.planning.choose import choose

__all__ = ["choose"]
