"""Which settings may be the cause of a video that is not sound: those that compute something else than the model does.

An exact setting never is, so that a video of exact settings is what the model makes of the request, still or dark as it
may be.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from framefit.families import Checkpoint
from framefit.plan import Plan, Setting
from framefit.planning.choose import untouched

__all__ = ["decoding", "suspects", "withdrawn"]

DECODING = {"encode_image", "decode"}


def suspects(plan: Plan, checkpoint: Checkpoint, *, seam_alone: bool) -> tuple[Setting, ...]:
    """Those of the denoiser; those of the VAE where there are none, or where nothing is wrong but a seam."""
    usual = {setting.type: setting.value for setting in untouched(checkpoint)}
    inexact = [s for s in plan.settings if s.tier != "exact" and s.value != usual[s.type]]
    of_vae = tuple(s for s in inexact if decoding(s))
    others = tuple(s for s in inexact if not decoding(s))
    return of_vae if seam_alone or not others else others


def decoding(setting: Setting) -> bool:
    """Whether it changes nothing but what the VAE does."""
    return set(setting.phases) <= DECODING


def withdrawn(plan: Plan, checkpoint: Checkpoint, settings: Iterable[Setting], because: str) -> Plan:
    """`plan` with the model's own way in place of `settings`."""
    gone = {setting.type for setting in settings}
    usual = {s.type: type(s)(value=s.value, because=because) for s in untouched(checkpoint)}
    return replace(plan, settings=tuple(usual[s.type] if s.type in gone else s for s in plan.settings))
