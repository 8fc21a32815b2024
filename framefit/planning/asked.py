"""Settings as a user writes them: each type's own values, and the names that EasyAnimate gives to memory modes."""

from __future__ import annotations

from collections.abc import Mapping

from framefit.errors import UsageError
from framefit.plan import ASKED, SETTINGS, Setting

__all__ = ["ALIASES", "asked"]

ALIASES: Mapping[str, Mapping[str, str]] = {
    "model_full_load": {"offload": "none"},
    "model_full_load_and_qfloat8": {"offload": "none", "quantize": "fp8"},
    "model_cpu_offload": {"offload": "part"},
    "model_cpu_offload_and_qfloat8": {"offload": "part", "quantize": "fp8"},
    "model_group_offload": {"offload": "block"},
    "sequential_cpu_offload": {"offload": "leaf"},
}
"""GPU_memory_mode of EasyAnimate's and VideoX-Fun's example scripts, as a value of offload -> the settings it means."""


def asked(settings: Mapping[str, str]) -> dict[str, Setting]:
    """Explicit settings by type, aliases resolved.

    Raises:
        UsageError: an unknown setting or value, or an alias beside another value of what it means.
    """
    if unknown := [name for name in settings if name not in SETTINGS]:
        raise UsageError(f"setting '{unknown[0]}' is unknown: the settings are {', '.join(SETTINGS)}.")
    alias = settings.get("offload", "")
    means = ALIASES.get(alias, {})
    for name, value in means.items():
        if name != "offload" and settings.get(name, value) != value:
            meaning = " and ".join(f"{type}={each}" for type, each in means.items())
            raise UsageError(
                f"offload={alias} means {meaning}, and {name}={settings[name]} was asked for beside it: leave "
                f"{name}={settings[name]} out, or use offload={means['offload']}."
            )
    return {
        name: SETTINGS[name](value=value, because=f"{ASKED} as {alias}" if name in means else ASKED)
        for name, value in {**settings, **means}.items()
    }
