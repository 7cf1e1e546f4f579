"""From a drawn person to the crop of a camera image: light, occlusion, blur and noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from ceca.datasets.drawn.attributes import Attributes, sample_person
from ceca.datasets.drawn.body import Body, sample_body, sample_pose
from ceca.datasets.drawn.canvas import Canvas, Point
from ceca.datasets.drawn.figure import draw_figure
from ceca.datasets.drawn.paint import Paint, darker, lighter
from ceca.datasets.drawn.scene import PLACES, draw_background, draw_ground_shadow

LIGHTINGS = ("day", "overcast", "dusk", "indoor", "backlit")
OCCLUDERS = ("pole", "car", "person", "bush")
OCCLUDED_SHARE = 0.22  # share of the images with an occluder
_SUPERSAMPLING = 2


class _Light(NamedTuple):
    """Effect of a lighting on the pixels: gain of red, green and blue, contrast around mid grey, saturation."""

    gain: tuple[float, float, float]
    contrast: float
    saturation: float


# Strong enough to be visible, weak enough for a colour to keep its name.
_LIGHT = {
    "day": _Light((1.04, 1.03, 1.0), contrast=1.06, saturation=1.05),
    "overcast": _Light((0.92, 0.94, 0.97), contrast=0.92, saturation=0.92),
    "dusk": _Light((0.80, 0.73, 0.80), contrast=0.98, saturation=0.95),
    "indoor": _Light((1.04, 0.97, 0.85), contrast=0.97, saturation=1.0),
    "backlit": _Light((0.95, 0.94, 0.93), contrast=0.96, saturation=0.95),
}


@dataclass(frozen=True, slots=True)
class Shot:
    """Camera settings of one image.

    Attributes:
        view: visible side of the person, one of `VIEWS`.
        place: background, one of `PLACES`.
        lighting: one of `LIGHTINGS`.
        occluder: object in front of the person, one of `OCCLUDERS`, or None.
        size: width and height in pixels, about 128 by 256.
        quality: JPEG quality, 80 to 95.
        gain: of the camera's red, green and blue.
    """

    view: str
    place: str
    lighting: str
    occluder: str | None
    size: tuple[int, int]
    quality: int
    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)


def sample_shot(view: str, rng: np.random.Generator, place: str | None = None) -> Shot:
    """Sample the camera settings of an image of this view, at a given place or at any."""
    width = int(rng.integers(116, 141))
    place = PLACES[int(rng.integers(len(PLACES)))] if place is None else place
    return Shot(
        view=view,
        place=place,
        lighting=_lighting(place, rng),
        occluder=OCCLUDERS[int(rng.integers(len(OCCLUDERS)))] if rng.random() < OCCLUDED_SHARE else None,
        size=(width, round(width * rng.uniform(1.88, 2.12))),
        quality=int(rng.integers(80, 96)),
    )


def draw_shot(
    person: Attributes, body: Body, shot: Shot, rng: np.random.Generator, scene: np.random.Generator | None = None
) -> Image.Image:
    """Draw one image.

    Args:
        person: attributes of the person.
        body: body of the person.
        shot: camera settings.
        rng: source of the other random choices: pose, details of the place, crop and noise.
        scene: source of the details of the place, the same for all frames of a tracklet; None takes `rng`.

    Returns:
        RGB image of the shot's size.
    """
    width, height = shot.size
    large = (width * _SUPERSAMPLING, height * _SUPERSAMPLING)
    image = draw_background(shot.size, shot.place, rng if scene is None else scene).resize(
        large, Image.Resampling.BILINEAR
    )
    canvas = _frame(image, person, shot.view, rng)
    x, y = canvas.pixels([(0, 98)])[0]
    sharp = shot.lighting in ("day", "backlit")
    draw_ground_shadow(image, (float(x), float(y)), canvas.scale * 17, 0.55 if sharp else 0.35)
    draw_figure(canvas, person, body, sample_pose(rng, shot.view))
    if shot.lighting == "backlit":
        _glare(canvas)
    if shot.occluder:
        hide(image, shot.occluder, rng)
    return _develop(image.resize(shot.size, Image.Resampling.BOX), shot, rng)


def _lighting(place: str, rng: np.random.Generator) -> str:
    if place == "corridor":
        return "indoor" if rng.random() < 0.75 else "backlit"
    outside = ("day", "day", "overcast", "overcast", "dusk", "backlit")
    return outside[int(rng.integers(len(outside)))]


def _frame(image: Image.Image, person: Attributes, view: str, rng: np.random.Generator) -> Canvas:
    """Place the figure as in a detector's crop: nearly the full height, slightly off centre."""
    width, height = image.size
    tall = height * rng.uniform(0.85, 0.91) * (0.985 if person.gender == "woman" else 1.0)
    top = height - tall * 1.012 - height * rng.uniform(0.01, 0.045)
    left = width * (0.5 + rng.uniform(-0.05, 0.05))
    # Left profiles are drawn facing right and mirrored. In front and back views, either hand may carry.
    mirrored = view == "left" or (view in ("front", "back") and bool(rng.random() < 0.5))
    return Canvas(image, tall / 100, left, top, mirrored, light=float(rng.choice((-1.0, 1.0))))


def _glare(canvas: Canvas) -> None:
    """Add light from behind: the background becomes pale and the person dark."""
    hazy = Image.blend(canvas.image, Image.new("RGB", canvas.image.size, (255, 250, 238)), 0.42)
    shaded = canvas.image.point([round(v * 0.84) for v in range(256)] * 3)
    canvas.image.paste(Image.composite(shaded, hazy, canvas.covered.filter(ImageFilter.BoxBlur(2))))


def _develop(image: Image.Image, shot: Shot, rng: np.random.Generator) -> Image.Image:
    """Apply the colour of the light and of the camera, a brightness gradient, blur and sensor noise."""
    light = _LIGHT[shot.lighting]
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.15, 0.65))))
    pixels = np.asarray(image, np.float32)
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = (grey + (pixels - grey) * light.saturation - 118) * light.contrast + 118
    height, width = pixels.shape[:2]
    slope = np.linspace(-1, 1, width, dtype=np.float32)[None, :, None] * np.float32(rng.uniform(-0.07, 0.07))
    slope = slope + np.linspace(0.04, -0.06, height, dtype=np.float32)[:, None, None]
    gain = np.array(light.gain) * shot.gain
    pixels *= gain.astype(np.float32) * np.float32(rng.uniform(0.94, 1.05)) * (1 + slope)
    pixels += rng.standard_normal(pixels.shape, np.float32) * np.float32(rng.uniform(1.5, 5.0))
    developed: NDArray[np.uint8] = np.clip(pixels + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(developed)


def hide(image: Image.Image, occluder: str, rng: np.random.Generator) -> None:
    """Paint one of `OCCLUDERS` over at most a quarter of an RGB image, in place."""
    _HIDE[occluder](image, rng)


def _behind_pole(image: Image.Image, rng: np.random.Generator) -> None:
    width, height = image.size
    wide = width * rng.uniform(0.07, 0.13)
    x = width * rng.uniform(0.28, 0.72)
    grey = int(rng.integers(80, 170))
    canvas = Canvas(image, 1.0, 0.0, 0.0)
    corners = ((x, -9.0), (x + wide, -9.0), (x + wide, height + 9.0), (x, height + 9.0))
    canvas.shape(corners, Paint((grey, grey, grey + 6), volume=0.6), smooth=False, dent=wide * 0.3)


def _behind_car(image: Image.Image, rng: np.random.Generator) -> None:
    """Hide the feet behind the bonnet or boot of a car."""
    width, height = image.size
    top, slant = height * rng.uniform(0.79, 0.86), width * rng.uniform(0.1, 0.3)
    side = float(rng.choice((-1, 1)))
    grey = int(rng.integers(60, 210))
    canvas = Canvas(image, width / 100, width / 2, top, mirrored=side < 0)
    low = (height - top) / canvas.scale + 4
    rise = slant / canvas.scale
    body = ((-60.0, 0.0), (10, 0.4), (30, 3), (40, 3 + rise * 0.4), (44, 10 + rise), (46, low), (-60, low))
    canvas.shape(body, Paint((grey, grey, min(255, grey + 14)), volume=0.45), dent=2.5)
    canvas.line(((-60, 5.5), (36, 8)), lighter((grey, grey, grey), 0.5), 0.8)
    canvas.oval((37, 10 + rise * 0.5), 3.2, 2.4, (244, 238, 206))


def _behind_person(image: Image.Image, rng: np.random.Generator) -> None:
    """Draw another person nearer to the camera, cut by the border of the crop."""
    width, height = image.size
    side = float(rng.choice((-1, 1)))
    stranger = sample_person(rng)
    scale = height * rng.uniform(0.95, 1.1) / 100
    left = width / 2 + side * width * rng.uniform(0.53, 0.6)
    canvas = Canvas(image, scale, left, height * rng.uniform(0.12, 0.24))
    draw_figure(canvas, stranger, sample_body(rng), sample_pose(rng, "back"))


def _behind_bush(image: Image.Image, rng: np.random.Generator) -> None:
    width, height = image.size
    middle = width * float(rng.choice((rng.uniform(0.05, 0.3), rng.uniform(0.7, 0.95))))
    pen = ImageDraw.Draw(image)
    for _ in range(170):
        x = middle + float(rng.normal(0, 0.17)) * width
        crown = height * (0.76 + 0.5 * abs(x - middle) / width)
        y, r = rng.uniform(min(crown, height - 1), height * 1.02), rng.uniform(0.012, 0.035) * width
        light = float(rng.uniform(-0.25, 0.3))
        leaf = darker((74, 112, 62), -light) if light < 0 else lighter((74, 112, 62), light)
        points: list[Point] = [(x - r, y), (x, y - r * 1.2), (x + r, y), (x, y + r * 1.2)]
        pen.polygon(points, fill=leaf)


_HIDE = {"pole": _behind_pole, "car": _behind_car, "person": _behind_person, "bush": _behind_bush}
