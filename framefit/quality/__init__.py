"""Numbers from frames: how far one video is from another, and what is wrong with a video by itself.

Frames are uint8 RGB, (F, H, W, 3). Knows nothing of models, plans or devices.
"""

from framefit.quality.compare import METRICS, Comparison, compare
from framefit.quality.sanity import findings

__all__ = ["METRICS", "Comparison", "compare", "findings"]
