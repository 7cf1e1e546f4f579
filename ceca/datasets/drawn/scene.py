"""Backgrounds: cluttered places, painted at the size of the finished image."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ceca.datasets.drawn.paint import CLOTH_COLOURS, RGB, SKIN_TONES, darker, lighter

Pen = ImageDraw.ImageDraw
Rng = np.random.Generator

PLACES = ("street", "wall", "shop front", "park", "corridor", "square")


def draw_background(size: tuple[int, int], place: str, rng: Rng) -> Image.Image:
    """Paint a place, slightly out of focus.

    Args:
        size: width and height in pixels.
        place: one of `PLACES`.
        rng: source of the choices of details.

    Returns:
        RGB image of this size.
    """
    width, height = size
    image = Image.new("RGB", size)
    pen = ImageDraw.Draw(image)
    horizon = round(height * rng.uniform(0.52, 0.7))
    _PAINTERS[place](pen, width, height, horizon, rng)
    for _ in range(int(rng.integers(0, 3))):
        clutter = (_passer_by, _pole, _bicycle, _sign, _bin)[int(rng.integers(5))]
        if place != "corridor" or clutter in (_passer_by, _bin):
            clutter(pen, width, height, horizon, rng)
    return image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.9, 1.6))))


def draw_ground_shadow(image: Image.Image, centre: tuple[float, float], reach: float, strength: float) -> None:
    """Darken the ground under the feet.

    Args:
        image: RGB image, changed in place.
        centre: pixel between the feet.
        reach: half width of the shadow in pixels.
        strength: opacity in the middle of the shadow, 0 to 1.
    """
    x, y = centre
    mask = Image.new("L", (round(reach * 2.6), round(reach * 0.8)))
    inner = (reach * 0.3, reach * 0.16, reach * 2.3, reach * 0.64)
    ImageDraw.Draw(mask).ellipse(inner, fill=round(255 * strength))
    image.paste(
        (20, 20, 26), (round(x - reach * 1.3), round(y - reach * 0.4)), mask.filter(ImageFilter.BoxBlur(reach * 0.12))
    )


def _muted(rng: Rng, low: int = 90, high: int = 200, tint: int = 18) -> RGB:
    """Choose a greyish colour. Surroundings are paler than clothes."""
    base = rng.integers(low, high)
    red, green, blue = (int(v) for v in np.clip(base + rng.integers(-tint, tint + 1, 3), 0, 255))
    return red, green, blue


def _ground(pen: Pen, width: int, height: int, horizon: int, colour: RGB) -> None:
    rows = max(1, height - horizon)
    for row in range(horizon, height):
        share = (row - horizon) / rows
        pen.line((0, row, width, row), fill=lighter(darker(colour, 0.18), 0.16 * share))


def _slabs(pen: Pen, width: int, height: int, horizon: int, colour: RGB, rng: Rng) -> None:
    """Draw the joints between paving slabs, towards a vanishing point."""
    vanishing = rng.uniform(0, width)
    for x in range(-3 * width, 4 * width, int(rng.integers(26, 44))):
        pen.line((vanishing + (x - vanishing) * 0.25, horizon, x, height), fill=darker(colour, 0.16))
    row, step = float(horizon), 3.0
    while row < height:
        pen.line((0, row, width, row), fill=darker(colour, 0.13))
        row, step = row + step, step * 1.45


def _pavement(pen: Pen, width: int, height: int, horizon: int, colour: RGB, rng: Rng) -> None:
    _ground(pen, width, height, horizon, colour)
    _slabs(pen, width, height, horizon, colour, rng)


def _street(pen: Pen, width: int, height: int, horizon: int, rng: Rng) -> None:
    pen.rectangle((0, 0, width, horizon), fill=(196, 208, 220))
    x = -int(rng.integers(0, 30))
    while x < width:
        wide, top = int(rng.integers(34, 70)), int(rng.integers(-20, round(height * 0.16)))
        house = _muted(rng, 110, 205, 24)
        pen.rectangle((x, top, x + wide, horizon), fill=house)
        for row in range(top + 10, horizon - 22, 24):
            for column in range(x + 6, x + wide - 9, 16):
                pen.rectangle((column, row, column + 8, row + 13), fill=_muted(rng, 60, 120))
        x += wide
    kerb = round(horizon + (height - horizon) * 0.3)
    _ground(pen, width, height, horizon, _muted(rng, 88, 122, 6))
    if rng.random() < 0.55:
        _parked_car(pen, round(rng.uniform(-0.3, 0.8) * width), kerb - 4, 70, _muted(rng, 60, 190, 50))
    pen.rectangle((0, kerb, width, kerb + 4), fill=(206, 204, 198))
    _pavement(pen, width, height, kerb + 4, _muted(rng, 150, 185, 8), rng)


def _parked_car(pen: Pen, x: int, ground: int, length: int, colour: RGB) -> None:
    tall = length * 0.36
    pen.rounded_rectangle((x, ground - tall * 0.62, x + length, ground - 4), 6, fill=colour)
    roof = ((0.16, 0.6), (0.3, 1.05), (0.72, 1.05), (0.88, 0.6))
    pen.polygon([(x + length * a, ground - tall * b) for a, b in roof], fill=darker(colour, 0.1))
    glass = ((0.22, 0.64), (0.33, 0.98), (0.69, 0.98), (0.81, 0.64))
    pen.polygon([(x + length * a, ground - tall * b) for a, b in glass], fill=(70, 84, 96))
    for share in (0.22, 0.78):
        centre = x + length * share
        pen.ellipse((centre - 6, ground - 10, centre + 6, ground + 2), fill=(34, 34, 36))


def _wall(pen: Pen, width: int, height: int, horizon: int, rng: Rng) -> None:
    floor = round(height * 0.45 + horizon * 0.45)
    brick = (_muted(rng, 130, 200, 10), (168, 108, 88), (188, 170, 146))[int(rng.integers(3))]
    pen.rectangle((0, 0, width, floor), fill=brick)
    if rng.random() < 0.7:
        joint = lighter(brick, 0.22)
        for number, row in enumerate(range(0, floor, 9)):
            pen.line((0, row, width, row), fill=joint)
            for x in range(-10 + number % 2 * 9, width, 18):
                shade = darker(brick, float(rng.uniform(0, 0.16)))
                pen.rectangle((x + 1, row + 1, x + 17, row + 8), fill=shade)
    if rng.random() < 0.6:
        x, y = int(rng.integers(0, width - 30)), int(rng.integers(10, 70))
        pen.rectangle((x, y, x + 36, y + 50), fill=_muted(rng, 170, 235, 26), outline=(60, 60, 60))
        for row in range(y + 8, y + 44, 8):
            pen.line((x + 5, row, x + int(rng.integers(14, 32)), row), fill=_muted(rng, 60, 120), width=3)
    pen.rectangle((0, floor - 5, width, floor), fill=darker(brick, 0.4))
    _pavement(pen, width, height, floor, _muted(rng, 130, 180, 6), rng)


def _shop_front(pen: Pen, width: int, height: int, horizon: int, rng: Rng) -> None:
    floor = round(height * 0.35 + horizon * 0.5)
    frame, sign = _muted(rng, 60, 140, 24), _muted(rng, 80, 170, 46)
    pen.rectangle((0, 0, width, floor), fill=frame)
    pen.rectangle((0, 14, width, 42), fill=sign)
    for x in range(int(rng.integers(4, 30)), width - 10, 11):
        if rng.random() < 0.75:
            pen.rectangle((x, 22, x + 6, 34), fill=lighter(sign, 0.7))
    for x in range(-int(rng.integers(0, 50)), width, 58):
        pen.rectangle((x, 50, x + 52, floor - 16), fill=(214, 206, 182))
        for row in range(64, floor - 30, 26):
            for column in range(x + 4, x + 46, 10):
                wares = lighter(_muted(rng, 90, 190, 52), 0.15)
                pen.rectangle((column, row + int(rng.integers(0, 8)), column + 7, row + 18), fill=wares)
            pen.line((x, row + 19, x + 52, row + 19), fill=(150, 130, 104), width=2)
    for x in range(0, width, 16):
        pen.polygon(((x, 42), (x + 8, 42), (x + 6, 58), (x - 2, 58)), fill=lighter(sign, 0.55))
        pen.polygon(((x + 8, 42), (x + 16, 42), (x + 14, 58), (x + 6, 58)), fill=darker(sign, 0.1))
    _pavement(pen, width, height, floor, _muted(rng, 140, 185, 6), rng)


def _park(pen: Pen, width: int, height: int, horizon: int, rng: Rng) -> None:
    pen.rectangle((0, 0, width, horizon), fill=(188, 206, 216))
    for _ in range(60):
        x, y, r = rng.uniform(-10, width + 10), rng.uniform(-10, horizon * 0.95), rng.uniform(10, 26)
        leaf = (int(rng.integers(86, 132)), int(rng.integers(118, 158)), int(rng.integers(84, 112)))
        pen.ellipse((x - r, y - r * 0.7, x + r, y + r * 0.7), fill=leaf)
    for _ in range(int(rng.integers(2, 5))):
        x, r = rng.uniform(0, width), rng.uniform(2, 5)
        pen.rectangle((x - r, horizon * 0.3, x + r, horizon), fill=(98, 84, 72))
    _ground(pen, width, height, horizon, (134, 156, 108))
    middle, narrow = rng.uniform(0.3, 0.7) * width, rng.uniform(6, 16)
    path = ((middle - narrow, horizon), (middle + narrow, horizon), (width * 1.25, height), (-width * 0.25, height))
    pen.polygon(path, fill=(202, 190, 166))
    if rng.random() < 0.5:
        x = float(rng.choice((-0.15, 0.7))) * width
        for row in (0, 6, 14):
            pen.line((x, horizon + row, x + 56, horizon + row), fill=(122, 92, 66), width=4)
        for leg in (5, 50):
            pen.line((x + leg, horizon, x + leg, horizon + 26), fill=(72, 70, 70), width=3)


def _corridor(pen: Pen, width: int, height: int, horizon: int, rng: Rng) -> None:
    wall, floor = _muted(rng, 178, 222, 12), _muted(rng, 140, 190, 14)
    vanish_x, vanish_y = rng.uniform(0.25, 0.75) * width, height * rng.uniform(0.28, 0.4)
    pen.rectangle((0, 0, width, height), fill=wall)

    def inward(x: float, y: float, share: float) -> tuple[float, float]:
        return x + (vanish_x - x) * share, y + (vanish_y - y) * share

    left, right = (-10.0, height * 1.02), (width + 10.0, height * 1.02)
    pen.polygon((left, right, inward(*right, 0.72), inward(*left, 0.72)), fill=floor)
    ceiling = ((-10, -14), (width + 10, -14))
    pen.polygon((*ceiling, inward(*ceiling[1], 0.72), inward(*ceiling[0], 0.72)), fill=lighter(wall, 0.45))
    pen.rectangle((*inward(-10, -14, 0.72), *inward(*right, 0.72)), fill=darker(wall, 0.12))
    for share in (0.08, 0.36, 0.56):
        pen.line((inward(-10, height, share), inward(width + 10, height, share)), fill=darker(floor, 0.12), width=2)
        a, b = inward(width * 0.35, -14, share), inward(width * 0.65, -14, share + 0.08)
        pen.rectangle((*a, b[0], b[1] + 3), fill=(255, 252, 238))
    door = _muted(rng, 110, 170, 30)
    for edge in (-10, width + 10):
        near, far = float(rng.uniform(0.05, 0.2)), float(rng.uniform(0.36, 0.48))
        top, bottom = height * 0.1, height * 1.02
        corners = ((top, near), (bottom, near), (bottom, far), (top, far))
        pen.polygon([inward(edge, y, share) for y, share in corners], fill=door, outline=darker(door, 0.3))


def _square(pen: Pen, width: int, height: int, horizon: int, rng: Rng) -> None:
    """Draw the view of a camera that looks down: paving with joints, stains and shadows."""
    paving = _muted(rng, 140, 190, 10)
    _ground(pen, width, height, 0, paving)
    _slabs(pen, width, height, -30, paving, rng)
    for _ in range(int(rng.integers(2, 6))):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(6, 24)
        pen.ellipse((x - r, y - r * 0.3, x + r, y + r * 0.3), fill=darker(paving, float(rng.uniform(0.06, 0.2))))
    if rng.random() < 0.6:  # a kerb or a painted line crosses the square
        y, slope = rng.uniform(0.05, 0.5) * height, rng.uniform(-0.3, 0.3) * height
        pen.line((0, y, width, y + slope), fill=lighter(paving, 0.5), width=int(rng.integers(3, 9)))


_PAINTERS = {
    "street": _street, "wall": _wall, "shop front": _shop_front, "park": _park, "corridor": _corridor,
    "square": _square,
}  # fmt: skip


def _passer_by(pen: Pen, width: int, height: int, horizon: int, rng: Rng) -> None:
    """Draw a small person farther away."""
    tall = rng.uniform(0.3, 0.5) * height
    x = float(rng.choice((rng.uniform(-0.02, 0.16), rng.uniform(0.84, 1.02)))) * width
    foot = horizon + (height - horizon) * rng.uniform(0.15, 0.4)
    unit = tall / 100
    colours = list(CLOTH_COLOURS.values())
    upper, lower = (lighter(darker(colours[int(i)], 0.15), 0.18) for i in rng.integers(0, len(colours), 2))
    skin = SKIN_TONES[int(rng.integers(len(SKIN_TONES)))]
    top = foot - tall
    for side in (-1, 1):
        step = x + side * unit * rng.uniform(3, 9)
        pen.line((x + side * 3 * unit, top + 50 * unit, step, foot), fill=lower, width=max(2, round(8 * unit)))
        arm = (x + side * 9 * unit, top + 22 * unit, x + side * 12 * unit, top + 48 * unit)
        pen.line(arm, fill=darker(upper, 0.15), width=max(1, round(5 * unit)))
    pen.rounded_rectangle((x - 10 * unit, top + 16 * unit, x + 10 * unit, top + 53 * unit), 4 * unit, fill=upper)
    pen.ellipse((x - 5 * unit, top, x + 5 * unit, top + 14 * unit), fill=skin)
    pen.chord((x - 5.5 * unit, top - unit, x + 5.5 * unit, top + 13 * unit), 180, 360, fill=(46, 38, 34))


def _pole(pen: Pen, width: int, height: int, horizon: int, rng: Rng) -> None:
    x, wide = rng.uniform(0, width), rng.uniform(2, 4)
    pen.rectangle((x - wide, 0, x + wide, horizon + 24), fill=(104, 108, 112))
    pen.line((x - wide + 1, 0, x - wide + 1, horizon + 24), fill=(160, 164, 168))


def _bicycle(pen: Pen, width: int, height: int, horizon: int, rng: Rng) -> None:
    x, y = rng.uniform(-0.1, 0.8) * width, horizon + 22
    frame = _muted(rng, 50, 130, 50)
    for centre in (x, x + 34):
        pen.ellipse((centre - 13, y - 13, centre + 13, y + 13), outline=(44, 44, 46), width=2)
    pen.line((x, y, x + 12, y - 16, x + 28, y - 16, x + 17, y, x, y), fill=frame, width=2)
    pen.line((x + 12, y - 16, x + 17, y), fill=frame, width=2)
    pen.line((x + 34, y, x + 27, y - 24, x + 32, y - 25), fill=frame, width=2)
    pen.line((x + 8, y - 21, x + 15, y - 21), fill=(40, 40, 42), width=3)


def _sign(pen: Pen, width: int, height: int, horizon: int, rng: Rng) -> None:
    x = float(rng.choice((rng.uniform(0.02, 0.2), rng.uniform(0.8, 0.98)))) * width
    y = rng.uniform(0.12, 0.3) * height
    pen.line((x, y, x, horizon + 18), fill=(120, 124, 128), width=3)
    board = ((186, 74, 70), (70, 110, 170), (224, 222, 214))[int(rng.integers(3))]
    pen.ellipse((x - 13, y - 13, x + 13, y + 13), fill=board, outline=(236, 236, 232), width=2)
    pen.rectangle((x - 8, y - 2, x + 8, y + 2), fill=(240, 240, 236))


def _bin(pen: Pen, width: int, height: int, horizon: int, rng: Rng) -> None:
    x, y = float(rng.choice((0.06, 0.9))) * width, horizon + 26
    colour = _muted(rng, 70, 120, 26)
    pen.polygon(((x - 11, y - 34), (x + 11, y - 34), (x + 9, y), (x - 9, y)), fill=colour)
    pen.rectangle((x - 13, y - 38, x + 13, y - 33), fill=darker(colour, 0.25))
