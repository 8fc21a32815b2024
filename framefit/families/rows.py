"""All rows in one table."""

from __future__ import annotations

from framefit.families import rows_easyanimate, rows_i2vgen, rows_wan

__all__ = ["CHECKPOINTS"]

CHECKPOINTS = {row.id: row for row in (*rows_wan.ROWS, *rows_easyanimate.ROWS, *rows_i2vgen.ROWS)}
"""Every published model that framefit knows, by id."""
