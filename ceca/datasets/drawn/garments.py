"""Clothes: garments of the upper and lower body, and shoes."""

from __future__ import annotations

from dataclasses import dataclass

from ceca.datasets.drawn.attributes import Attributes
from ceca.datasets.drawn.body import Body, Joints, Pose, draw_arm, draw_hand, draw_leg, torso
from ceca.datasets.drawn.canvas import Canvas, Point, Points, between, limb, moved
from ceca.datasets.drawn.paint import CLOTH_COLOURS, RGB, Paint, cloth, darker, lighter


@dataclass(frozen=True, slots=True)
class Cut:
    """Cut of an upper garment.

    Attributes:
        hem: row of the lower border.
        ease: distance from the body in figure units.
        sleeve: length of the sleeve: 0 none, 1 to the elbow, 2 to the wrist.
        flare: widening of each side per unit below the hips.
    """

    hem: float
    ease: float
    sleeve: float
    flare: float = 0.0


CUTS = {
    "t-shirt": Cut(50.5, 0.5, 0.7),
    "tank top": Cut(49.5, 0.1, 0),
    "shirt": Cut(52, 0.5, 1.95),
    "sweater": Cut(51, 0.8, 2),
    "hoodie": Cut(52, 1.3, 2),
    "jacket": Cut(50.5, 1.2, 2),
    "long coat": Cut(77, 1.3, 2, 0.1),
    "dress": Cut(70, 0.1, 0.45, 0.24),
}


def draw_upper(canvas: Canvas, person: Attributes, body: Body, pose: Pose) -> None:
    """Draw the upper garment on the torso, with collar, fastening and print."""
    cut = CUTS[person.upper_kind]
    paint = cloth(person.upper_colour, person.upper_pattern)
    outline = torso(person.gender, body.build, pose.profile, cut.hem, cut.ease, cut.flare)
    canvas.shape(outline, paint, smooth=False, folds=_folds(cut, pose), dent=1.5)
    line = _seam(paint.colour)
    if pose.view == "front":
        _FRONTS[person.upper_kind](canvas, paint, body, cut.hem)
        if person.upper_pattern == "logo":
            _logo(canvas, paint)
    elif person.upper_kind == "hoodie":
        _hood(canvas, paint, pose)
    elif pose.view == "back":
        canvas.line(((-3, 17.6), (0, 18.4), (3, 17.6)), line, 0.5)
        if person.upper_kind == "tank top":
            _straps(canvas, body)
    if person.upper_kind in ("sweater", "hoodie") and not pose.profile:
        canvas.line(((-8 * body.build, cut.hem - 2.4), (0, cut.hem - 2), (8 * body.build, cut.hem - 2.4)), line, 0.4)
    if person.upper_kind in ("dress", "long coat"):
        half = (4.4 if pose.profile else 7.2) * body.build
        canvas.line(((-half, 39.5), (0, 40), (half, 39.5)), line, 1.1)


def draw_sleeved_arm(canvas: Canvas, arm: Points, person: Attributes, body: Body) -> None:
    """Draw an arm with the sleeve of the upper garment over it."""
    cut = CUTS[person.upper_kind]
    paint = cloth(person.upper_colour, person.upper_pattern if person.upper_pattern != "logo" else "plain")
    shoulder, elbow, wrist = arm
    if cut.sleeve < 1.9:
        hidden = 0.4 * cut.sleeve  # the sleeve covers the top of the arm
        draw_arm(canvas, (between(shoulder, elbow, hidden), elbow, wrist), body.skin, body.build)
    else:
        draw_hand(canvas, arm, body.skin)
    if not cut.sleeve:
        return
    wide = 5.0 * body.build + cut.ease * 0.7
    top = (shoulder, between(shoulder, elbow, 0.2))  # rounded at the shoulder
    if cut.sleeve <= 1:
        end = between(shoulder, elbow, cut.sleeve)
        canvas.shape(limb((*top, end), (wide * 0.6, wide * 0.95, wide)), paint, dent=0.8)
        return
    end = between(elbow, wrist, cut.sleeve - 1)
    cuff_width = 3.3 + cut.ease * 0.5
    widths = (wide * 0.6, wide * 0.95, wide * 0.88, (wide * 0.88 + cuff_width) / 2, cuff_width)
    crease = ((elbow[0] - 1.4, elbow[1] - 0.6), (elbow[0] + 1.2, elbow[1] + 0.6))
    canvas.shape(limb((*top, elbow, between(elbow, end, 0.5), end), widths), paint, folds=[crease], dent=0.9)
    cuff = between(elbow, end, 0.88)
    canvas.line(((cuff[0] - 1.5, cuff[1]), (cuff[0] + 1.5, cuff[1])), _seam(paint.colour), 0.35)


def draw_legs(canvas: Canvas, person: Attributes, body: Body, pose: Pose, joints: Joints) -> None:
    """Draw the legs with the lower garment and the shoes."""
    kind = person.lower_kind
    for leg, near in ((joints.far_leg, False), (joints.near_leg, True)):
        shade = 0.0 if near or not pose.profile else 0.22  # the far leg is in the shadow of the near leg
        if kind in ("trousers", "jeans", "leggings"):
            if person.shoes_kind != "boots":
                _shoe(canvas, person, body, pose, leg)
            _trouser_leg(canvas, person, body, leg, shade)
            if person.shoes_kind == "boots":
                _shoe(canvas, person, body, pose, leg)
            continue
        draw_leg(canvas, leg, Paint(darker(body.skin, shade), volume=0.4), (7.6 * body.build, 5.2, 3.2))
        _shoe(canvas, person, body, pose, leg)
        if kind == "shorts":
            _shorts_leg(canvas, person, body, leg, shade)
    if kind == "skirt":
        _skirt(canvas, person, body, pose)
    elif kind != "none" and not pose.profile:
        paint = _leg_paint(person, 0.0)
        half = 8.2 * body.build
        seat: Points = ((-half, 46), (half, 46), (half, 50.5), (3, 54.5), (0, 55.5), (-3, 54.5), (-half, 50.5))
        canvas.shape(seat, paint, outline=0, smooth=False)
        canvas.line(((0, 48), (0, 55)), _seam(paint.colour), 0.4)


def _leg_paint(person: Attributes, shade: float) -> Paint:
    """Return the paint of a trouser leg. Its stripes run lengthwise."""
    pattern = "pinstriped" if person.lower_pattern == "striped" else person.lower_pattern
    paint = cloth(person.lower_colour, pattern)
    return Paint(darker(paint.colour, shade), pattern, darker(paint.accent, shade))


def _trouser_leg(canvas: Canvas, person: Attributes, body: Body, leg: Points, shade: float) -> None:
    widths = {"trousers": (9.0, 7.4, 6.4), "jeans": (8.8, 6.5, 5.2), "leggings": (8.2, 5.5, 3.7)}
    wide, knee_width, ankle_width = widths[person.lower_kind]
    if person.shoes_kind == "boots":  # trousers are tucked into boots
        ankle_width = min(ankle_width, 4.2)
    paint = _leg_paint(person, shade)
    hip, knee, ankle = leg
    end = (ankle[0], ankle[1] + 1.2) if person.lower_kind != "leggings" else between(knee, ankle, 0.9)
    track = (hip, between(hip, knee, 0.5), knee, between(knee, end, 0.5), end)
    spans = (wide, (wide + knee_width) / 2, knee_width, (knee_width + ankle_width) / 2, ankle_width)
    folds = [
        ((knee[0] - 2.6, knee[1] - 0.8), (knee[0] + 2, knee[1] + 0.8)),
        ((end[0] - 2.2, end[1] - 2.2), (end[0] + 1.8, end[1] - 3.2)),
    ]
    canvas.shape(
        limb(track, [width * body.build for width in spans]), paint,
        folds=folds if person.lower_kind != "leggings" else (), dent=1.2,
    )  # fmt: skip
    if person.lower_kind == "jeans":  # turn-up and worn thigh
        canvas.line(((end[0] - 2.3, end[1] - 1.5), (end[0] + 2.3, end[1] - 1.5)), lighter(paint.colour, 0.4), 0.45)
        worn = between(hip, knee, 0.55)
        canvas.shape(
            limb((between(hip, knee, 0.35), worn, between(hip, knee, 0.8)), (1.2, 2.8, 1.2)),
            Paint(lighter(paint.colour, 0.16), volume=0), outline=0,
        )  # fmt: skip


def _shorts_leg(canvas: Canvas, person: Attributes, body: Body, leg: Points, shade: float) -> None:
    paint = _leg_paint(person, shade)
    end = between(leg[0], leg[1], 0.84)
    track = (leg[0], between(leg[0], end, 0.5), end)
    canvas.shape(limb(track, (9.4 * body.build, 9.2 * body.build, 9.0 * body.build)), paint, dent=1.2)


def _skirt(canvas: Canvas, person: Attributes, body: Body, pose: Pose) -> None:
    paint = cloth(person.lower_colour, person.lower_pattern)
    waist, hip, hem = (4.2, 6.0, 9.0) if pose.profile else (7.2, 9.2, 11.8)
    right: Points = ((waist, 42), (hip, 50), (hem, 69), (hem * 0.85, 69.8))
    side = [(x * body.build, y) for x, y in right]
    folds = [((x * 0.55, 53), (x, 69)) for x in (-hem * 0.6, -hem * 0.15, hem * 0.35, hem * 0.75)]
    canvas.shape([*side, (0, 70.6), *((-x, y) for x, y in reversed(side))], paint, folds=folds, dent=1.5)


def _shoe(canvas: Canvas, person: Attributes, body: Body, pose: Pose, leg: Points) -> None:
    kind, colour = person.shoes_kind, CLOTH_COLOURS[person.shoes_colour]
    x, y = leg[2]
    sole: RGB = (236, 236, 232) if kind == "trainers" else darker(colour, 0.55)
    if kind == "trainers" and person.shoes_colour in ("white", "yellow"):
        sole = (150, 152, 156)
    if kind == "boots":
        top = between(leg[1], leg[2], 0.42)
        canvas.shape(limb((top, between(top, leg[2], 0.5), (x, y + 1.5)), (6.2, 5.4, 4.8)), Paint(colour), dent=0.8)
    lift = 1.4 if kind == "high heels" else 0.0
    if pose.profile:
        toe: Points = ((3.2, 1.4), (6.4, 2.4), (6.6, 4.0), (2, 4.2))
        foot: Points = ((-2.6, -0.6), (0.6, -1.6 - lift), *toe, (-2.6, 4.2 - lift))
        ground = ((-2.4, 4.3), (6.5, 4.3))
    elif pose.view == "front":
        foot = ((-2.1, -1.2), (2.1, -1.2), (2.9, 2.6), (2.3, 5.0), (-2.3, 5.0), (-2.9, 2.6))
        ground = ((-2.5, 4.9), (2.5, 4.9))
    else:
        foot = ((-2.1, -1.2), (2.1, -1.2), (2.5, 2.4), (2.3, 4.4), (-2.3, 4.4), (-2.5, 2.4))
        ground = ((-2.3, 4.3), (2.3, 4.3))
    skin = kind == "sandals"
    canvas.shape(moved(foot, x, y), Paint(body.skin if skin else colour), dent=0.6)
    _shoe_detail(canvas, kind, colour, sole, pose, (x, y), ground)


def _shoe_detail(canvas: Canvas, kind: str, colour: RGB, sole: RGB, pose: Pose, ankle: Point, ground: Points) -> None:
    x, y = ankle
    (ax, ay), (bx, by) = ground
    if kind == "high heels":  # thin heel under the raised back of the foot
        heel = x - 2.2 if pose.profile else x
        canvas.line(((heel, y + 1), (heel, y + 5)), darker(colour, 0.2), 0.9)
        return
    canvas.line(((x + ax, y + ay), (x + bx, y + by)), sole, 1.1 if kind in ("trainers", "boots") else 0.7)
    if kind == "trainers" and pose.view != "back":
        shift = 2.4 if pose.profile else 0.0
        for row in (0.2, 1.7):
            canvas.line(((x + shift - 1.1, y + row), (x + shift + 1.1, y + row + 0.4)), sole, 0.45)
    elif kind == "sandals":
        for row, reach in ((-0.2, 2.3), (2.4, 2.9)):
            shift = 1.8 * row if pose.profile else 0.0
            canvas.line(((x + shift - reach, y + row), (x + shift + reach, y + row + 0.3)), colour, 1.2)


def _folds(cut: Cut, pose: Pose) -> list[Points]:
    half = 3.4 if pose.profile else 6.4
    folds: list[Points] = [((-half, 37), (-half * 0.35, 39.5)), ((half, 35.5), (half * 0.4, 38.5))]
    if cut.hem > 60:
        folds += [((x, 47), (x * 1.35, cut.hem)) for x in (-half * 0.8, -half * 0.15, half * 0.6)]
    return folds


def _seam(colour: RGB) -> RGB:
    """Return a line colour that is visible on cloth of this colour: darker, or lighter if the cloth is nearly black."""
    return darker(colour, 0.4) if sum(colour) > 180 else lighter(colour, 0.28)


def _neckline(canvas: Canvas, body: Body, depth: float, width: float, line: RGB) -> None:
    """Draw bare skin down to `depth` units below the collar."""
    opening: Points = ((-width, 16.4), (width, 16.4), (width * 0.75, 17 + depth * 0.6), (0, 17 + depth))
    skin = [*opening, (-width * 0.75, 17 + depth * 0.6)]
    canvas.shape(skin, Paint(darker(body.skin, 0.06), volume=0), outline=0)
    canvas.line((skin[1], skin[2], skin[3], skin[4], skin[0]), line, 0.6)


def _tee_front(canvas: Canvas, paint: Paint, body: Body, hem: float) -> None:
    _neckline(canvas, body, 2.6, 3.4, _seam(paint.colour))


def _tank_front(canvas: Canvas, paint: Paint, body: Body, hem: float) -> None:
    _straps(canvas, body)
    _neckline(canvas, body, 5.6, 4.2, _seam(paint.colour))


def _straps(canvas: Canvas, body: Body) -> None:
    """Draw the bare shoulders outside the straps of a tank top."""
    for side in (-1, 1):
        bare: Points = ((6.6, 17.4), (10.2, 19), (10.4, 24.5), (8.6, 25), (6.9, 21.6))
        canvas.shape([(side * x * body.build, y) for x, y in bare], Paint(body.skin, volume=0.15), outline=0.15)


def _shirt_front(canvas: Canvas, paint: Paint, body: Body, hem: float) -> None:
    line = _seam(paint.colour)
    _neckline(canvas, body, 2.4, 2.6, line)
    canvas.line(((0, 19.5), (0, hem)), line, 0.45)
    for row in range(22, int(hem) - 1, 5):
        canvas.oval((0.9, row), 0.45, 0.45, lighter(paint.colour, 0.6) if sum(paint.colour) < 560 else line)
    for side in (-1, 1):
        collar: Points = ((side * 2.2, 15.6), (side * 4.4, 17.2), (side * 2.7, 20.4), (side * 0.3, 19.0))
        canvas.shape(collar, Paint(lighter(paint.colour, 0.12), volume=0.1), smooth=False)


def _sweater_front(canvas: Canvas, paint: Paint, body: Body, hem: float) -> None:
    canvas.shape(limb(((-3.6, 16.8), (0, 18.6), (3.6, 16.8)), (1.7, 1.7, 1.7)), Paint(darker(paint.colour, 0.12)))


def _hoodie_front(canvas: Canvas, paint: Paint, body: Body, hem: float) -> None:
    line = _seam(paint.colour)
    hood: Points = ((-5.8, 17.4), (-4.4, 14.2), (-3, 15), (0, 18.8), (3, 15), (4.4, 14.2), (5.8, 17.4), (0, 21.4))
    canvas.shape(hood, Paint(darker(paint.colour, 0.12)), dent=0.7)
    for side in (-1, 1):
        canvas.line(((side * 1.3, 20.2), (side * 1.5, 26.5)), lighter(paint.colour, 0.75), 0.45)
    canvas.line(((-6, 46.5), (-4.4, 40), (4.4, 40), (6, 46.5), (-6, 46.5)), line, 0.5)


def _open_front(canvas: Canvas, paint: Paint, body: Body, hem: float) -> None:
    """Draw the front of a jacket: lapels over a pale inner shirt, a zip and pockets."""
    line = _seam(paint.colour)
    inner: Points = ((-3, 16.2), (3, 16.2), (1.6, 24), (0, 28), (-1.6, 24))
    canvas.shape(inner, Paint((214, 214, 212), volume=0.25), outline=0)
    for side in (-1, 1):
        lapel: Points = ((side * 2.8, 15.4), (side * 5.2, 17.4), (side * 4.4, 22.6), (side * 0.3, 28.6))
        canvas.shape(lapel, Paint(darker(paint.colour, 0.14), volume=0.2), smooth=False)
        canvas.line(((side * 4.2, 43.5), (side * 7, 41.5)), line, 0.5)
    canvas.line(((0, 28), (0, hem)), (176, 178, 182) if sum(paint.colour) < 480 else (92, 92, 96), 0.6)


def _coat_front(canvas: Canvas, paint: Paint, body: Body, hem: float) -> None:
    line = _seam(paint.colour)
    _open_front(canvas, paint, body, 30)
    canvas.line(((0.9, 28), (0.9, hem)), line, 0.6)
    for row in (32, 37.5, 44, 50):
        for side in (-1, 1):
            canvas.oval((side * 2.2, row), 0.6, 0.6, line)


def _dress_front(canvas: Canvas, paint: Paint, body: Body, hem: float) -> None:
    _neckline(canvas, body, 4.2, 4.0, _seam(paint.colour))


_FRONTS = {
    "t-shirt": _tee_front, "tank top": _tank_front, "shirt": _shirt_front, "sweater": _sweater_front,
    "hoodie": _hoodie_front, "jacket": _open_front, "long coat": _coat_front, "dress": _dress_front,
}  # fmt: skip


def _hood(canvas: Canvas, paint: Paint, pose: Pose) -> None:
    """Draw the lowered hood, seen from behind or from the side."""
    if pose.profile:
        hood: Points = ((1.6, 16), (-2, 14.4), (-5.6, 14.6), (-7.4, 18), (-6, 22.4), (-2.4, 20))
    else:
        hood = ((-6, 16.6), (-3.6, 14.2), (3.6, 14.2), (6, 16.6), (4.4, 23), (0, 26), (-4.4, 23))
    canvas.shape(hood, Paint(darker(paint.colour, 0.1)))


def _logo(canvas: Canvas, paint: Paint) -> None:
    """Draw a print on the chest: a disc with a bar through it."""
    disc: Points = ((0, 23.4), (3.2, 24.8), (4.4, 28), (3.2, 31.2), (0, 32.6), (-3.2, 31.2), (-4.4, 28), (-3.2, 24.8))
    canvas.shape(disc, Paint(paint.accent, volume=0), outline=0)
    canvas.shape(((-5.6, 27), (5.6, 26), (5.6, 29), (-5.6, 30)), Paint(paint.accent, volume=0), smooth=False, outline=0)
    canvas.line(((-4, 28.4), (4, 27.6)), paint.colour, 1.0)
