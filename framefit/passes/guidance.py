"""Guidance branches together or apart.

Together is how diffusers' EasyAnimate and I2VGen-XL pipelines run them, apart is how its Wan pipelines do: each is
the default where the reference does it, so that results are equal to the last bit. The other way differs by rounding
(1e-6 in fp32).
"""

from __future__ import annotations

from framefit.families.parts import Parts
from framefit.plan import Guidance

__all__ = ["apply"]


def apply(parts: Parts, setting: Guidance) -> None:
    parts.branches = "together" if setting.value == "together" else "apart"
