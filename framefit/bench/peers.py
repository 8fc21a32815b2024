"""cache-dit's layer-by-layer offload over diffusers' model (https://github.com/vipshop/cache-dit, version 1.5).

Its step caching needs a run of many steps and says nothing about one forward, so that it has no row here.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from framefit.bench.scenarios import Scenario

__all__ = ["apply", "refuse"]


def refuse(scenario: Scenario, device: str) -> str | None:
    """Why there is no row of cache-dit; None where there is one."""
    if scenario.kind != "denoise":
        return "its offload is for denoisers"
    if device == "cpu":
        return "it moves weights between the host and a CUDA card"
    if importlib.util.find_spec("cache_dit") is None:
        return "not installed: pip install cache-dit"
    return None


def apply(model: Any, device: str) -> None:
    """The weights of every leaf module wait on the host; the next ones travel while one computes."""
    from cache_dit import layerwise_offload

    layerwise_offload(model, onload_device=device, async_transfer=True)
