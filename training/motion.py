"""The motions that the training videos have, as numbers: what a prompt asks for is exactly known.

A motion is a constant rate of change per frame. Rates are of the *camera*: a camera that pans left shows a picture
whose content drifts right; one that rolls right (clockwise) shows content that turns counterclockwise. The pan of
normal speed is 2 px a frame, so that the four frames which share one latent frame advance by one latent cell (8 px).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

__all__ = ["CATALOGUE", "FIELDS", "SPEEDS", "Motion", "find", "to_scene"]

PAN_PX = 2.0
ZOOM = math.log(1.0125)
"""Logarithm of the magnification per frame: 1.22 times over 16 frames."""
ROLL_DEGREES = 0.5
LIGHT = math.log(0.95)
"""Logarithm of the gain per frame: 0.44 of the light over 16 frames."""
OBJECT_PX = 2.0

SPEEDS = {"slow": 0.5, "normal": 1.0, "fast": 1.5}


@dataclass(frozen=True, kw_only=True, slots=True)
class Motion:
    """Change per frame."""

    pan_x: float = 0.0
    """px that the camera moves; right is positive"""
    pan_y: float = 0.0
    """px that the camera moves; down is positive"""
    zoom: float = 0.0
    """log of the magnification; in is positive"""
    roll: float = 0.0
    """degrees that the camera turns; clockwise is positive"""
    light: float = 0.0
    """log of the gain; brighter is positive"""
    object_x: float = 0.0
    """px that a foreground object moves in the scene; right is positive"""
    object_y: float = 0.0
    """px that a foreground object moves in the scene; down is positive"""

    def values(self) -> tuple[float, ...]:
        """In the order of `FIELDS`."""
        return tuple(getattr(self, name) for name in FIELDS)


FIELDS = tuple(f.name for f in fields(Motion))

DIRECTIONS: Mapping[str, Motion] = {
    "pan-left": Motion(pan_x=-PAN_PX),
    "pan-right": Motion(pan_x=PAN_PX),
    "pan-up": Motion(pan_y=-PAN_PX),
    "pan-down": Motion(pan_y=PAN_PX),
    "zoom-in": Motion(zoom=ZOOM),
    "zoom-out": Motion(zoom=-ZOOM),
    "roll-left": Motion(roll=-ROLL_DEGREES),
    "roll-right": Motion(roll=ROLL_DEGREES),
}
"""The camera's motions, at normal speed."""

OBJECTS: Mapping[str, Motion] = {
    "object-left": Motion(object_x=-OBJECT_PX),
    "object-right": Motion(object_x=OBJECT_PX),
    "object-up": Motion(object_y=-OBJECT_PX),
    "object-down": Motion(object_y=OBJECT_PX),
}

PAIRS = (
    *((pan, zoom) for pan in ("pan-left", "pan-right", "pan-up", "pan-down") for zoom in ("zoom-in", "zoom-out")),
    *((side, tilt) for side in ("pan-left", "pan-right") for tilt in ("pan-up", "pan-down")),
    *((zoom, roll) for zoom in ("zoom-in", "zoom-out") for roll in ("roll-left", "roll-right")),
    *((pan, "darken") for pan in ("pan-left", "pan-right")),
)
"""Two at once."""


def find(name: str) -> Motion:
    """The motion called "still", "darken", "brighten", "pan-left", "pan-left-slow", "pan-left+zoom-in" and so on."""
    return CATALOGUE[name]


def to_scene(motion: Motion, frame: float, x: float, y: float) -> tuple[float, float]:
    """Where a point of frame `frame` lay in frame 0; both as px from the picture's centre, right and down."""
    angle, shrink = math.radians(motion.roll * frame), math.exp(-motion.zoom * frame)
    cos, sin = math.cos(angle) * shrink, math.sin(angle) * shrink
    return cos * x - sin * y + motion.pan_x * frame, sin * x + cos * y + motion.pan_y * frame


def _catalogue() -> dict[str, Motion]:
    found = {"still": Motion(), "darken": Motion(light=LIGHT), "brighten": Motion(light=-LIGHT / 2)}
    for name, motion in {**DIRECTIONS, **OBJECTS}.items():
        found[name] = motion
        found[f"{name}-slow"] = _scaled(motion, SPEEDS["slow"])
        found[f"{name}-fast"] = _scaled(motion, SPEEDS["fast"])
    for first, second in PAIRS:
        found[f"{first}+{second}"] = _sum(found[first], found[second])
    return found


def _scaled(motion: Motion, factor: float) -> Motion:
    return replace(motion, **{name: getattr(motion, name) * factor for name in FIELDS})


def _sum(one: Motion, other: Motion) -> Motion:
    return Motion(**{name: getattr(one, name) + getattr(other, name) for name in FIELDS})


CATALOGUE: Mapping[str, Motion] = _catalogue()
"""Every motion of the training videos by name."""
