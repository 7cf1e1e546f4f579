"""Head, face, hair and hat, seen from the front, from behind and from the side (facing right)."""

from __future__ import annotations

from copy import copy

from ceca.datasets.drawn.attributes import Attributes
from ceca.datasets.drawn.body import Body, Pose
from ceca.datasets.drawn.canvas import Canvas, Points, limb, moved
from ceca.datasets.drawn.paint import HAIR_COLOURS, RGB, Paint, cloth, darker, lighter

_FACE: Points = (
    (0, 0.6), (3.1, 1.5), (4.7, 4.4), (4.6, 8), (3.3, 11.3), (0, 13), (-3.3, 11.3), (-4.6, 8), (-4.7, 4.4), (-3.1, 1.5),
)  # fmt: skip
_PROFILE: Points = (
    (-1, 0.3), (2.2, 0.7), (4.1, 2.6), (4.5, 5.0), (4.6, 6.2), (5.9, 8.2), (4.9, 8.9), (5.1, 9.8), (4.7, 10.8),
    (4.6, 12.2), (3.0, 13.0), (0.4, 12.0), (-3.2, 11.6), (-5.2, 8), (-5.1, 3.8), (-3.6, 1.2),
)  # fmt: skip
# Row of the lower end of the hair, by hair length.
_FALL = {"short": 10.5, "shoulder-length": 16.0, "long": 27.0}


def _closer(canvas: Canvas) -> Canvas:
    """Return a canvas for the head. It is drawn slightly too large, so that faces and hats differ visibly."""
    closer = copy(canvas)
    closer.scale *= 1.1
    return closer


def draw_hair_behind(canvas: Canvas, person: Attributes, pose: Pose) -> None:
    """Draw the part of longer hair behind the shoulders, in a front view."""
    if pose.view != "front" or person.hair_length not in ("shoulder-length", "long"):
        return
    canvas = _closer(canvas)
    end = _FALL[person.hair_length]
    side: Points = ((3.5, 0.5), (5.9, 4), (6.4, 10), (6.9, end - 3), (5.0, end), (0, end - 1))
    canvas.shape(_both_sides(side), _hair_paint(person))


def draw_neck(canvas: Canvas, body: Body, pose: Pose) -> None:
    """Draw the neck, from under the chin to the collar."""
    top = (-0.6, 10.5) if pose.profile else (0, 10.5)
    bottom = (-1.0, 18.6) if pose.profile else (0, 18.6)
    canvas.shape(limb((top, bottom), (4.6, 5.2 * body.build)), Paint(darker(body.skin, 0.12), volume=0.3), smooth=False)


def draw_head(canvas: Canvas, person: Attributes, body: Body, pose: Pose) -> None:
    """Draw the head with face, hair and hat. It must be drawn after the torso."""
    canvas = _closer(canvas)
    skin = Paint(body.skin, volume=0.3)
    if pose.view == "back":
        canvas.shape(_FACE, skin)
        _ears(canvas, body.skin)
    elif pose.profile:
        canvas.shape(_PROFILE, skin)
        _side_face(canvas, person, body.skin)
    else:
        _ears(canvas, body.skin)
        canvas.shape(_FACE, skin)
        _front_face(canvas, person, body.skin)
    if person.hair_length != "bald":
        _hair(canvas, person, pose)
    if person.hat != "none":
        _HATS[person.hat](canvas, cloth(person.hat_colour), pose)


def _ears(canvas: Canvas, skin: RGB) -> None:
    for side in (-1, 1):
        canvas.oval((side * 4.8, 7.4), 0.8, 1.4, darker(skin, 0.1))


def _brow(person: Attributes) -> RGB:
    return darker(HAIR_COLOURS.get(person.hair_colour, (70, 55, 50)), 0.25)


def _lips(person: Attributes, skin: RGB) -> RGB:
    return (186, 66, 72) if person.gender == "woman" else darker(skin, 0.42)


def _front_face(canvas: Canvas, person: Attributes, skin: RGB) -> None:
    brow = _brow(person)
    for side in (-1, 1):
        canvas.oval((side * 1.95, 6.7), 0.95, 0.62, (244, 242, 238))
        canvas.oval((side * 1.9, 6.7), 0.5, 0.6, (48, 36, 32))
        canvas.line(((side * 1.0, 5.5), (side * 3.0, 5.3)), brow, 0.42)
    canvas.line(((0.1, 7.0), (0.6, 8.8), (-0.3, 9.0)), darker(skin, 0.28), 0.35)
    canvas.line(((-1.5, 10.6), (0, 10.9), (1.5, 10.6)), _lips(person, skin), 0.6 if person.gender == "woman" else 0.4)


def _side_face(canvas: Canvas, person: Attributes, skin: RGB) -> None:
    canvas.oval((3.3, 6.7), 0.75, 0.62, (244, 242, 238))
    canvas.oval((3.6, 6.7), 0.42, 0.6, (48, 36, 32))
    canvas.line(((2.4, 5.4), (4.2, 5.3)), _brow(person), 0.42)
    canvas.line(((3.5, 10.5), (4.8, 10.4)), _lips(person, skin), 0.5)
    canvas.oval((-0.6, 7.3), 0.9, 1.4, darker(skin, 0.14))
    canvas.oval((-0.6, 7.3), 0.4, 0.8, darker(skin, 0.3))


def _hair_paint(person: Attributes) -> Paint:
    return Paint(HAIR_COLOURS[person.hair_colour], volume=0.45)


def _hair(canvas: Canvas, person: Attributes, pose: Pose) -> None:
    paint, end = _hair_paint(person), _FALL[person.hair_length]
    short = person.hair_length == "short"
    if pose.view == "back":
        side: Points = ((2.8, -0.9), (5.2, 2.4), (5.5, 6)) + (
            ((4.9, 10), (2.6, 12)) if short else ((6.1, 11), (6.0, end - 3), (4.2, end), (1.2, end + 0.6))
        )
        canvas.shape(_both_sides(side), paint)
        tones: list[Points] = [((x, 2), (x * 1.25, end * 0.55), (x * 1.2, end - 2.5)) for x in (-3.2, -1.0, 1.4, 3.4)]
    elif pose.profile:
        canvas.shape(_side_hair(end, short), paint)
        tones = [((-1, 0.4), (-3.4, 3), (-4.4, 7)), ((1.6, 0.6), (-1.8, 2.2), (-3.4, 6))]
        if not short:
            tones += [((x, 8), (x - 0.8, end * 0.7), (x - 0.9, end - 2)) for x in (-5.2, -3.4)]
    else:
        fringe: Points = (
            (-5.1, 7.2), (-5.4, 3.2), (-3.4, -0.5), (0, -1.3), (3.4, -0.5), (5.4, 3.2), (5.1, 7.2), (4.5, 5.0),
            (3.2, 3.1), (0.4, 3.5), (-1.6, 2.5), (-3.6, 3.6), (-4.5, 5.2),
        )  # fmt: skip
        canvas.shape(fringe, paint, dent=0.8)
        tones = [((-1.4, 2.2), (-0.6, -0.2)), ((1.8, 2.6), (1.6, 0)), ((-3.8, 3), (-3, 0.8)), ((4, 3), (3.2, 0.8))]
        for x in () if short else (-1, 1):  # hair in front of the shoulders
            lock: Points = ((4.2, 3.0), (5.5, 3.4), (6.2, 10), (6.9, end - 3), (6.0, end), (4.6, end - 2), (4.7, 10))
            canvas.shape([(x * px, py) for px, py in lock], paint, dent=0.7)
    strand = lighter(paint.colour, 0.14)
    for tone in tones:
        canvas.line(tone, strand, 0.3)


def _side_hair(end: float, short: bool) -> Points:
    crown: Points = ((4.5, 3.3), (2.9, -0.3), (-1, -1.3), (-4.6, 0.4), (-6.0, 4.2))
    if short:
        return *crown, (-5.9, 8), (-4.4, 11.6), (-2.6, 11), (-2.0, 8.4), (-1.4, 5.8), (0.6, 5.6), (1.6, 3.8)
    tip: Points = ((-7.4, end - 4), (-5.8, end), (-3.0, end - 1.6))
    return *crown, (-6.4, 10), *tip, (-1.6, 12), (-0.2, 8), (0.9, 5), (2, 3.6)


def _cap(canvas: Canvas, paint: Paint, pose: Pose) -> None:
    dome: Points = ((5.6, 3.6), (5.2, 0), (2.8, -2.5), (-2.8, -2.5), (-5.2, 0), (-5.6, 3.6))
    if pose.profile:
        canvas.shape(moved(dome, -0.6), paint)
        canvas.shape(((4.2, 2.6), (8.6, 3.6), (10.2, 4.8), (7.4, 4.7), (3.6, 4.2)), Paint(darker(paint.colour, 0.2)))
    else:
        canvas.shape(dome, paint)
        if pose.view == "front":
            peak: Points = ((-5.2, 3), (0, 2.2), (5.2, 3), (5.6, 4.6), (0, 5.7), (-5.6, 4.6))
            canvas.shape(peak, Paint(darker(paint.colour, 0.2)), dent=0.6)
        else:
            canvas.line(((-2, 3.4), (-1.4, 1.8), (1.4, 1.8), (2, 3.4)), darker(paint.colour, 0.4), 0.5)
    canvas.oval((-0.6 if pose.profile else 0, -2.4), 0.6, 0.4, darker(paint.colour, 0.3))


def _beanie(canvas: Canvas, paint: Paint, pose: Pose) -> None:
    shift = -0.7 if pose.profile else 0.0
    dome: Points = ((5.7, 3), (5.2, -1), (2.4, -3.6), (-2.4, -3.6), (-5.2, -1), (-5.7, 3), (0, 3.6))
    canvas.shape(moved(dome, shift), paint)
    band: Points = ((-5.9, 1.4), (0, 0.9), (5.9, 1.4), (5.7, 4.6), (0, 4.2), (-5.7, 4.6))
    canvas.shape(moved(band, shift), Paint(darker(paint.colour, 0.14)), dent=0.6)
    for x in (-4.2, -2.1, 0, 2.1, 4.2):
        canvas.line(((x + shift, 1.5), (x + shift, 4.1)), darker(paint.colour, 0.35), 0.3)


def _sun_hat(canvas: Canvas, paint: Paint, pose: Pose) -> None:
    shift = -0.5 if pose.profile else 0.0
    brim: Points = ((-9.8, 3.8), (-5, 2), (0, 1.6), (5, 2), (9.8, 3.8), (5, 4.9), (0, 5.1), (-5, 4.9))
    crown: Points = ((-5.4, 3), (-4.9, -1.4), (-2.4, -3.2), (2.4, -3.2), (4.9, -1.4), (5.4, 3), (0, 3.6))
    canvas.shape(moved(brim, shift), paint, dent=0.6)
    canvas.shape(moved(crown, shift), paint)
    canvas.line(moved(((-5.2, 2), (0, 2.6), (5.2, 2)), shift), darker(paint.colour, 0.45), 0.9)


_HATS = {"cap": _cap, "beanie": _beanie, "sun hat": _sun_hat}


def _both_sides(side: Points) -> Points:
    """Return a symmetric outline, given its right half from the top down."""
    return [*side, *((-x, y) for x, y in reversed(side))]
