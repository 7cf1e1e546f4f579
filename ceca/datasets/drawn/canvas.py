"""A canvas in figure units: filled, softly shaded shapes with an outline."""

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
    """A picture that is painted in figure units: 100 from crown to sole, x = 0 on the body's axis, y down.

    Attributes:
        image: RGB picture, painted in place.
        scale: pixels per figure unit.
        left: pixel column of x = 0.
        top: pixel row of y = 0.
        mirrored: whether x grows to the left (a figure drawn facing right then faces left).
        light: where the light comes from, -1 (left) to 1 (right).
    """

    image: Image.Image
    scale: float
    left: float
    top: float
    mirrored: bool = False
    light: float = -1.0
    covered: Image.Image = field(init=False)  # L: 255 where the figure was painted

    def __post_init__(self) -> None:
        self.covered = Image.new("L", self.image.size)

    def pixels(self, points: Points | NDArray[np.float64]) -> NDArray[np.float64]:
        """Pixel coordinates [n, 2] of points in figure units."""
        sign = -1 if self.mirrored else 1
        return np.asarray(points, float) * (sign * self.scale, self.scale) + (self.left, self.top)

    def shape(
        self, points: Points, paint: Paint, *, smooth: bool = True, outline: float = 0.4,
        folds: Sequence[Points] = (), dent: float = 1.0,
    ) -> None:  # fmt: skip
        """Fill a closed outline.

        Args:
            points: corners of the outline, figure units.
            paint: colour and pattern.
            smooth: round the corners off (Catmull-Rom spline through them).
            outline: share of light taken away along the border; 0 draws none.
            folds: polylines of creases in the cloth, figure units.
            dent: width of the shaded border, in figure units.
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
        """Light on a bulging surface: full inside, falling off towards the border away from the light."""
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
        """Draw a polyline `width` figure units wide: a seam, a strap, a mouth."""
        track = [tuple(point) for point in self.pixels(points)]
        pixels = max(1, round(width * self.scale))
        ImageDraw.Draw(self.image).line(track, fill=colour, width=pixels, joint="curve")
        ImageDraw.Draw(self.covered).line(track, fill=255, width=pixels, joint="curve")

    def oval(self, centre: Point, rx: float, ry: float, colour: RGB) -> None:
        """Fill a small flat ellipse: an eye, a button."""
        x, y = self.pixels([centre])[0]
        a, b = max(0.6, rx * self.scale), max(0.6, ry * self.scale)
        ImageDraw.Draw(self.image).ellipse((x - a, y - b, x + a, y + b), fill=colour)


def spline(points: Points, steps: int = 5) -> NDArray[np.float64]:
    """A closed smooth curve through points: [n * steps, 2] (Catmull-Rom)."""
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
    """Outline of a limb: a band along the joints whose full width at each joint is given."""
    p = np.asarray(joints, float)
    along = np.gradient(p, axis=0)
    along /= np.maximum(np.hypot(along[:, 0], along[:, 1]), 1e-6)[:, None]
    across = np.stack([-along[:, 1], along[:, 0]], 1) * (np.asarray(widths, float) / 2)[:, None]
    return [*map(tuple, p + across), *map(tuple, (p - across)[::-1])]


def between(a: Point, b: Point, share: float) -> Point:
    """The point `share` of the way from a to b."""
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share
