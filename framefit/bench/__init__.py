"""What each technique costs and gives: named scenarios, a fresh process a row, medians with spread, JSON and a picture.

`scenarios` says what is measured, `variants` in which rows, `worker` measures one row, `measure` runs them in order,
`report` shows the result, `regression` compares two of them.
"""

from framefit.bench.measure import measure
from framefit.bench.result import Result, Row
from framefit.bench.scenarios import GROUPS, SCENARIOS, Scenario

__all__ = ["GROUPS", "SCENARIOS", "Result", "Row", "Scenario", "measure"]
