"""Canvas in figure units: filled, softly shaded shapes with an outline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from ceca.datasets.drawn.paint import RGB, Paint, darker

Point = tuple[float, float]
Points = Sequence[Point]


@dataclass
class Canvas:
    """Image with a coordinate system in figure units: 100 from crown to sole, x = 0 on the body's axis, y down.

    Attributes:
        image: RGB image, painted in place.
        scale: pixels per figure unit.
        left: pixel column of x = 0.
        top: pixel row of y = 0.
        mirrored: x grows to the left, so a figure drawn facing right faces left.
        light: direction of the light, -1 (from the left) to 1 (from the right).
        covered: greyscale mask, 255 where the figure was painted.
    """

    image: Image.Image
    scale: float
    left: float
    top: float
    mirrored: bool = False
    light: float = -1.0
    covered: Image.Image = field(init=False)

    def __post_init__(self) -> None:
        self.covered = Image.new("L", self.image.size)

    def pixels(self, points: Points | NDArray[np.float64]) -> NDArray[np.float64]:
        """Convert points in figure units to pixel coordinates [n, 2]."""
        sign = -1 if self.mirrored else 1
        return np.asarray(points, float) * (sign * self.scale, self.scale) + (self.left, self.top)

    def shape(
        self, points: Points, paint: Paint, *, smooth: bool = True, outline: float = 0.4,
        folds: Sequence[Points] = (), dent: float = 1.0,
    ) -> None:  # fmt: skip
        """Fill a closed outline.

        Args:
            points: corners of the outline in figure units.
            paint: colour and pattern.
            smooth: round the corners off with a Catmull-Rom spline through them.
            outline: darkness of the border line, 0 to 1; 0 draws no line.
            folds: polylines of the creases in the cloth, in figure units.
            dent: width of the shaded border in figure units.
        """
        edge = self.pixels(spline(points) if smooth else points)
        margin = int(dent * self.scale * 2) + 3
        x0, y0 = np.maximum(np.floor(edge.min(0)).astype(int) - margin, 0)
        x1, y1 = np.minimum(np.ceil(edge.max(0)).astype(int) + margin, self.image.size)
        if x1 <= x0 or y1 <= y0:
            return
        corners = [tuple(point) for point in edge - (x0, y0)]
        mask = Image.new("L", (int(x1 - x0), int(y1 - y0)))
        ImageDraw.Draw(mask).polygon(corners, fill=255)
        patch = Image.fromarray(paint.texture(*self._units(x0, y0, x1, y1)))
        if paint.volume:
            shade = self._shade(mask, paint.volume, dent, [self.pixels(fold) - (x0, y0) for fold in folds])
            patch = ImageChops.multiply(patch, Image.merge("RGB", (shade, shade, shade)))
        if outline:
            line = darker(paint.colour, outline) if sum(paint.colour) > 180 else (22, 22, 26)
            ImageDraw.Draw(patch).line([*corners, corners[0]], fill=line, width=max(2, round(self.scale * 0.55)))
        self.image.paste(patch, (int(x0), int(y0)), mask)
        self.covered.paste(255, (int(x0), int(y0)), mask)

    def _units(self, x0: int, y0: int, x1: int, y1: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        x = (np.arange(x0, x1, dtype=np.float32) - self.left) / self.scale
        return x, (np.arange(y0, y1, dtype=np.float32) - self.top) / self.scale

    def _shade(
        self, mask: Image.Image, volume: float, dent: float, folds: Sequence[NDArray[np.float64]]
    ) -> Image.Image:
        """Return the light on a bulging surface: full inside, weaker towards the border away from the light."""
        radius = max(1.0, dent * self.scale)
        soft = mask.filter(ImageFilter.BoxBlur(radius)).filter(ImageFilter.BoxBlur(radius))
        soft = ImageChops.offset(soft, round(self.light * radius * 0.9), round(-radius * 0.5))
        if folds:
            creases = Image.new("L", mask.size, 255)
            pen = ImageDraw.Draw(creases)
            for fold in folds:
                pen.line([tuple(point) for point in fold], fill=95, width=max(2, round(self.scale * 0.7)))
            soft = ImageChops.multiply(soft, creases.filter(ImageFilter.BoxBlur(self.scale * 0.3)))
        floor = 1 - volume
        return soft.point([min(255, round(255 * (floor + volume * min(1.0, v / 225)))) for v in range(256)])

    def line(self, points: Points, colour: RGB, width: float = 0.5) -> None:
        """Draw a polyline of this width in figure units, such as a seam, a strap or a mouth."""
        track = [tuple(point) for point in self.pixels(points)]
        pixels = max(1, round(width * self.scale))
        ImageDraw.Draw(self.image).line(track, fill=colour, width=pixels, joint="curve")
        ImageDraw.Draw(self.covered).line(track, fill=255, width=pixels, joint="curve")

    def oval(self, centre: Point, rx: float, ry: float, colour: RGB) -> None:
        """Fill a small flat ellipse, such as an eye or a button."""
        x, y = self.pixels([centre])[0]
        a, b = max(0.6, rx * self.scale), max(0.6, ry * self.scale)
        ImageDraw.Draw(self.image).ellipse((x - a, y - b, x + a, y + b), fill=colour)


def spline(points: Points, steps: int = 5) -> NDArray[np.float64]:
    """Return a closed Catmull-Rom spline through n points: [n * steps, 2]."""
    p = np.asarray(points, float)
    before, after, beyond = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    t = (np.arange(steps) / steps)[None, :, None]
    curve = (
        p[:, None]
        + 0.5 * t * (after - before)[:, None]
        + 0.5 * t**2 * (2 * before - 5 * p + 4 * after - beyond)[:, None]
        + 0.5 * t**3 * (3 * p - before - 3 * after + beyond)[:, None]
    )
    return curve.reshape(-1, 2)


def limb(joints: Points, widths: Sequence[float]) -> list[Point]:
    """Return the outline of a limb: a band along the joints, with its full width at each joint."""
    p = np.asarray(joints, float)
    along = np.gradient(p, axis=0)
    along /= np.maximum(np.hypot(along[:, 0], along[:, 1]), 1e-6)[:, None]
    across = np.stack([-along[:, 1], along[:, 0]], 1) * (np.asarray(widths, float) / 2)[:, None]
    return [*map(tuple, p + across), *map(tuple, (p - across)[::-1])]


def between(a: Point, b: Point, share: float) -> Point:
    """Return the point between a (share 0) and b (share 1)."""
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share


def moved(points: Points, dx: float, dy: float = 0.0) -> list[Point]:
    """Move points by a distance in figure units."""
    return [(x + dx, y + dy) for x, y in points]
