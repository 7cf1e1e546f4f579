"""Body under the clothes: proportions, views and joints of a walking pose."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, radians, sin

import numpy as np

from ceca.datasets.drawn.canvas import Canvas, Point, Points, between, limb
from ceca.datasets.drawn.paint import RGB, SKIN_TONES, Paint

VIEWS = ("front", "back", "left", "right")  # side of the person that faces the camera

# Half width of the torso, seen from the front: (row, half width) in figure units.
_FRONT = {
    "man": ((15.4, 2.8), (16.6, 6.0), (18.8, 9.8), (24, 9.8), (31, 9.3), (39, 8.5), (47, 8.6), (51, 8.8)),
    "woman": ((15.6, 2.5), (17, 5.2), (19.2, 8.2), (24.5, 8.3), (31, 7.4), (38, 6.5), (46, 8.5), (51, 8.9)),
}
# Outline of the torso, seen from the side and facing right: (row, back, front) in figure units.
_SIDE = {
    "man": (
        (15.4, -2.6, 2.2), (19.4, -4.8, 3.4), (25, -5.4, 5.0), (32, -4.8, 5.2),
        (39, -4.2, 4.9), (47, -5.4, 4.9), (51, -5.4, 4.8),
    ),
    "woman": (
        (15.6, -2.4, 2.0), (19.8, -4.2, 3.0), (25, -4.8, 5.0), (28, -4.5, 5.6),
        (32, -4.0, 4.4), (38, -3.5, 3.9), (46, -5.8, 4.5), (51, -5.9, 4.6),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Body:
    """Body of one person, the same in every image: skin tone and build (1 = average width)."""

    skin: RGB
    build: float


@dataclass(frozen=True, slots=True)
class Pose:
    """Pose of the person in one image: view, and stride in [-1, 1] (0 = standing)."""

    view: str
    stride: float

    @property
    def profile(self) -> bool:
        """True if the person is seen from the side."""
        return self.view in ("left", "right")


@dataclass(frozen=True, slots=True)
class Joints:
    """Arms (shoulder, elbow, wrist) and legs (hip, knee, ankle) in figure units. The near hand carries things."""

    near_arm: tuple[Point, Point, Point]
    far_arm: tuple[Point, Point, Point]
    near_leg: tuple[Point, Point, Point]
    far_leg: tuple[Point, Point, Point]


def sample_body(rng: np.random.Generator) -> Body:
    """Sample the body of one person."""
    return Body(SKIN_TONES[int(rng.integers(len(SKIN_TONES)))], float(rng.uniform(0.92, 1.13)))


def sample_pose(rng: np.random.Generator, view: str) -> Pose:
    """Sample a pose in one of `VIEWS`: mostly walking, sometimes standing."""
    stride = rng.uniform(0.35, 1.0) if rng.random() < 0.8 else rng.uniform(0, 0.2)
    return Pose(view, float(stride * rng.choice((-1, 1))))


def torso(gender: str, build: float, profile: bool, hem: float, ease: float, flare: float) -> list[Point]:
    """Return the outline of a garment on the torso, from the neck down to the hem.

    Args:
        gender: "man" or "woman".
        build: width relative to the average.
        profile: seen from the side, facing right.
        hem: last row of the garment.
        ease: distance of the cloth from the body in figure units.
        flare: widening of each side per unit below the hips.
    """
    table = np.array(_SIDE[gender] if profile else [(y, -w, w) for y, w in _FRONT[gender]])
    rows = np.linspace(table[0, 0], hem, 24)
    below = np.maximum(0, rows - 46) * flare
    stand = ease * np.clip((rows - 17) / 4, 0, 1) + below
    back = np.interp(rows, table[:, 0], table[:, 1]) * build - stand
    front = np.interp(rows, table[:, 0], table[:, 2]) * build + stand
    sag = 0.8 if hem > 60 else 0.4
    sides = [*zip(front, rows, strict=True)], [*zip(back, rows, strict=True)]
    return [*sides[0], (0.0, hem + sag), *sides[1][::-1]]


def joints(pose: Pose, gender: str, build: float) -> Joints:
    """Return the joints of a pose, for a gender ("man" or "woman") and a build (1 = average width)."""
    if pose.profile:
        return Joints(
            near_arm=_swinging_arm(-0.4, 20.5, -pose.stride * 24 + 2),
            far_arm=_swinging_arm(0.4, 20.5, pose.stride * 24 + 2),
            near_leg=_striding_leg(-0.3, pose.stride),
            far_leg=_striding_leg(0.3, -pose.stride),
        )
    shoulder = (9.1 if gender == "man" else 7.7) * build
    hip = (4.5 if gender == "man" else 4.3) * build
    swing = pose.stride * 1.3

    def arm(side: int) -> tuple[Point, Point, Point]:
        lift = swing * side
        elbow = side * (shoulder + 2.9)
        return (side * shoulder, 19.6), (elbow, 34.5 - lift * 0.4), (side * (shoulder + 2.4), 48 - lift)

    def leg(side: int) -> tuple[Point, Point, Point]:
        step = pose.stride * side
        lift = max(0.0, step) * 3.4
        knee = side * (hip - 0.1) - 0.5 * step
        return (side * hip, 48.0), (knee, 73 - lift * 0.3), (side * (hip - 0.6) - 0.7 * step, 95 - lift)

    return Joints(arm(1), arm(-1), leg(1), leg(-1))


def _swinging_arm(x: float, y: float, degrees: float) -> tuple[Point, Point, Point]:
    upper, lower = radians(degrees), radians(degrees + 10 + abs(degrees) * 0.5)
    elbow = (x + 14.5 * sin(upper), y + 14.5 * cos(upper))
    return (x, y), elbow, (elbow[0] + 13.5 * sin(lower), elbow[1] + 13.5 * cos(lower))


def _striding_leg(x: float, stride: float) -> tuple[Point, Point, Point]:
    """Return the joints of a leg seen from the side: a front leg is straight, a back leg is bent at the knee."""
    thigh = radians(stride * 19)
    shin = thigh if stride > 0 else radians(stride * 19 + stride * 15)
    knee = (x + 24 * sin(thigh), 48 + 25 * cos(thigh))
    ankle = (knee[0] + 21.5 * sin(shin), knee[1] + 22 * cos(shin))
    drop = 95 - ankle[1] if stride >= 0 else 0.0  # the front foot is on the ground
    return (x, 48.0), (knee[0], knee[1] + drop / 2), (ankle[0], ankle[1] + drop)


def draw_leg(canvas: Canvas, leg: Points, paint: Paint, widths: tuple[float, float, float]) -> None:
    """Draw a bare leg. `widths` are its full widths at hip, knee and ankle."""
    hip, knee, ankle = leg
    calf = (knee[0] * 0.66 + ankle[0] * 0.34, knee[1] * 0.66 + ankle[1] * 0.34)
    canvas.shape(limb((hip, knee, calf, ankle), (widths[0], widths[1], widths[1] * 1.03, widths[2])), paint)


def draw_arm(canvas: Canvas, arm: Points, skin: RGB, build: float) -> None:
    """Draw a bare arm with its hand."""
    paint = Paint(skin, volume=0.35)
    shoulder, elbow, wrist = arm
    track = (shoulder, between(shoulder, elbow, 0.2), elbow, between(elbow, wrist, 0.5), wrist)
    canvas.shape(limb(track, (2.8 * build, 4.3 * build, 3.7 * build, 3.3, 2.6)), paint, dent=0.7)
    draw_hand(canvas, arm, skin)


def draw_hand(canvas: Canvas, arm: Points, skin: RGB) -> None:
    """Draw the hand of an arm, in line with the forearm."""
    (ex, ey), (wx, wy) = arm[1], arm[2]
    length = max(1e-6, float(np.hypot(wx - ex, wy - ey)))
    dx, dy = (wx - ex) / length, (wy - ey) / length
    track = ((wx - dx * 0.5, wy - dy * 0.5), (wx + dx * 2, wy + dy * 2), (wx + dx * 4.2, wy + dy * 4.2))
    canvas.shape(limb(track, (2.4, 3.3, 2.0)), Paint(skin, volume=0.35), dent=0.6)
