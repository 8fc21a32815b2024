"""Where the time goes: by phase and by kind of work, beside what this device can do at best; and what would help.

trace      one call under torch.profiler -> pieces of device work, each with its phase, its module and its kind
counts     the same call under a dispatch mode -> FLOPs and bytes by kind
breakdown  both together -> seconds, TFLOP/s, GB/s and share of the ceiling by kind
profile    a pipeline's phases, and the files: Chrome trace, flame graph, memory timeline
findings   a profile, and what went on around it, asked the rules -> ranked advice
layers     a step beside the untouched model's -> which layer a loss of quality comes from
"""

from __future__ import annotations

from framefit.profiling.breakdown import Breakdown, Cost, breakdown
from framefit.profiling.ceilings import measure
from framefit.profiling.profile import Profile, profile

__all__ = ["Breakdown", "Cost", "Profile", "breakdown", "measure", "profile"]
