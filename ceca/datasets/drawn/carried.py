"""Carried things: bags on the back or over the shoulder, and things in the near hand."""

from __future__ import annotations

from ceca.datasets.drawn.attributes import Attributes
from ceca.datasets.drawn.body import Body, Joints, Pose
from ceca.datasets.drawn.canvas import Canvas, Point, Points, limb, moved
from ceca.datasets.drawn.paint import Paint, cloth, darker, lighter


def draw_behind(canvas: Canvas, person: Attributes, body: Body, pose: Pose) -> None:
    """Draw the parts of a carried thing that are behind the body."""
    if person.carried == "backpack" and pose.view == "front":  # its sides are visible beside the torso
        half = 8.6 * body.build
        sides: Points = ((-half, 22), (0, 17), (half, 22), (half + 1.6, 38), (0, 42), (-half - 1.6, 38))
        canvas.shape(sides, Paint(darker(cloth(person.carried_colour).colour, 0.25)))
    elif person.carried == "backpack" and pose.profile:
        pack: Points = ((-3.5, 18.5), (-8.5, 18), (-12.6, 22), (-13.4, 33), (-12.4, 41), (-7, 42.5), (-3.5, 42))
        canvas.shape(pack, cloth(person.carried_colour), folds=[((-12.6, 29), (-7, 29.5))], dent=1.5)
        pocket: Points = ((-8.6, 31), (-14.2, 31.5), (-14.4, 39.5), (-8.6, 40.5))
        canvas.shape(pocket, Paint(darker(cloth(person.carried_colour).colour, 0.15)))


def draw_on_torso(canvas: Canvas, person: Attributes, body: Body, pose: Pose) -> None:
    """Draw the parts on the torso: the straps of a backpack, the belt of a shoulder bag."""
    colour = cloth(person.carried_colour).colour if person.carried != "none" else (0, 0, 0)
    strap = Paint(darker(colour, 0.1), volume=0.2)
    if person.carried == "backpack" and pose.view == "front":
        for side in (-1, 1):
            track = [(side * x * body.build, y) for x, y in ((5.0, 16.8), (6.2, 24), (7.6, 36))]
            canvas.shape(limb(track, (2.2, 2.4, 1.8)), strap, dent=0.5)
    elif person.carried == "backpack" and pose.profile:
        canvas.shape(limb(((-2.6, 17.6), (1.8, 21), (2.2, 28), (-3.4, 36)), (2, 2.2, 2.2, 1.6)), strap, dent=0.5)
    elif person.carried == "shoulder bag":
        across = ((-1.5, 17), (1.2, 31), (2.8, 47)) if pose.profile else ((-6, 17.2), (1.4, 31.5), (9, 46))
        canvas.shape(limb([(x * body.build, y) for x, y in across], (1.5, 1.5, 1.5)), strap, dent=0.4)


def draw_on_back(canvas: Canvas, person: Attributes, body: Body, pose: Pose) -> None:
    """Draw a backpack seen from behind, over the hair."""
    if person.carried != "backpack" or pose.view != "back":
        return
    paint = cloth(person.carried_colour)
    half = 8.2 * body.build
    for side in (-1, 1):
        canvas.line(((side * 4.6, 16.8), (side * 5.6, 21)), darker(paint.colour, 0.2), 2.0)
    pack: Points = (
        (-half, 24), (-half * 0.7, 19.4), (half * 0.7, 19.4), (half, 24),
        (half + 0.4, 41), (0, 43.4), (-half - 0.4, 41),
    )  # fmt: skip
    canvas.shape(pack, paint, dent=1.6)
    pocket: Points = ((-half * 0.72, 32), (half * 0.72, 32), (half * 0.74, 40), (0, 41.6), (-half * 0.74, 40))
    canvas.shape(pocket, Paint(darker(paint.colour, 0.12)))
    zip_line = lighter(paint.colour, 0.35)
    canvas.line(((-half * 0.75, 27), (-half * 0.5, 23), (half * 0.5, 23), (half * 0.75, 27)), zip_line, 0.45)
    canvas.line(((-1.6, 19.2), (-1.2, 17.6), (1.2, 17.6), (1.6, 19.2)), darker(paint.colour, 0.35), 0.7)


def draw_in_hand(canvas: Canvas, person: Attributes, pose: Pose, joints: Joints) -> None:
    """Draw the thing in the near hand. A shoulder bag hangs at the near hip."""
    if person.carried not in _IN_HAND:
        return
    elbow, wrist = joints.near_arm[1:]
    hand = (wrist[0] + (wrist[0] - elbow[0]) * 0.2, wrist[1] + 3.0)
    if person.carried == "shoulder bag":
        hand = (3.0, 46) if pose.profile else (9.4, 45.5)
    _IN_HAND[person.carried](canvas, cloth(person.carried_colour), pose, hand)


def _handbag(canvas: Canvas, paint: Paint, pose: Pose, hand: Point) -> None:
    x, y = hand
    handle = ((x - 3, y + 5), (x - 1.8, y + 0.4), (x + 1.8, y + 0.4), (x + 3, y + 5))
    canvas.line(handle, darker(paint.colour, 0.35), 0.8)
    bag: Points = ((-4.2, 4.6), (4.2, 4.6), (5.4, 12.2), (0, 13), (-5.4, 12.2))
    canvas.shape(moved(bag, x, y), paint)
    canvas.line(((x - 4.4, y + 7), (x, y + 8.4), (x + 4.4, y + 7)), darker(paint.colour, 0.3), 0.5)
    canvas.oval((x, y + 8.4), 0.7, 0.7, (222, 196, 110))


def _shoulder_bag(canvas: Canvas, paint: Paint, pose: Pose, hand: Point) -> None:
    x, y = hand
    bag: Points = ((-5, 0), (5, 0), (5.4, 9.4), (0, 10), (-5.4, 9.4))
    canvas.shape(moved(bag, x, y), paint)
    flap: Points = ((-5.2, -0.2), (5.2, -0.2), (5, 5), (0, 6), (-5, 5))
    canvas.shape(moved(flap, x, y), Paint(darker(paint.colour, 0.12)), dent=0.7)


def _shopping_bag(canvas: Canvas, paint: Paint, pose: Pose, hand: Point) -> None:
    x, y = hand
    canvas.line(((x - 2.4, y + 5), (x - 1.2, y + 0.6), (x + 1.2, y + 0.6), (x + 2.4, y + 5)), (120, 110, 100), 0.5)
    corners: Points = ((x - 4.8, y + 4.8), (x + 4.8, y + 4.8), (x + 5.2, y + 18), (x - 5.2, y + 18))
    canvas.shape(corners, paint, smooth=False, folds=[((x - 2.4, y + 5), (x - 3, y + 18))])
    canvas.oval((x, y + 11.5), 2.1, 2.1, lighter(paint.colour, 0.55) if sum(paint.colour) < 600 else (150, 60, 60))


def _suitcase(canvas: Canvas, paint: Paint, pose: Pose, hand: Point) -> None:
    x, y = (hand[0] - 7.5, hand[1]) if pose.profile else (hand[0] + 3.4, hand[1])
    for side in (-1.6, 1.6):  # the telescopic handle ends in the hand
        canvas.line(((hand[0] + side * 0.6, y), (x + side, 70)), (96, 98, 104), 0.6)
    corners: Points = ((-5.8, 69), (0, 68.4), (5.8, 69), (6.2, 82), (5.8, 96), (0, 96.4), (-5.8, 96), (-6.2, 82))
    ribs = [[(x + a, 71), (x + a, 94)] for a in (-3, 0, 3)]
    canvas.shape(moved(corners, x), paint, folds=ribs)
    for side in (-4.2, 4.2):
        canvas.oval((x + side, 97.4), 1.1, 1.3, (34, 34, 38))


def _umbrella(canvas: Canvas, paint: Paint, pose: Pose, hand: Point) -> None:
    x, y = hand
    lean = 0.16 if pose.profile else 0.1

    def at(row: float) -> Point:
        return x + lean * row, y + row

    canvas.line(((x - 2.2, y - 1.4), (x - 1.6, y - 3), (x, y - 2.6), at(5)), (92, 62, 40), 0.9)
    canvas.shape(limb((at(3.5), at(8), at(18), at(29), at(31)), (2.2, 4.4, 4.0, 2.0, 1.0)), paint, dent=0.8)
    canvas.line((at(9), at(28)), darker(paint.colour, 0.3), 0.4)
    canvas.line((at(31), at(35)), (96, 98, 104), 0.6)


def _book(canvas: Canvas, paint: Paint, pose: Pose, hand: Point) -> None:
    x, y = hand[0] + (1.0 if not pose.profile else 1.6), hand[1] - 1.5
    pages: Points = ((x - 3.2, y - 4.2), (x + 3.9, y - 4.8), (x + 4.5, y + 4.8), (x - 2.6, y + 5.4))
    canvas.shape(pages, Paint((240, 236, 222), volume=0.1), smooth=False)
    cover: Points = ((x - 3.8, y - 4.6), (x + 3.2, y - 5.2), (x + 3.8, y + 4.6), (x - 3.2, y + 5.2))
    canvas.shape(cover, paint, smooth=False, dent=0.6)
    canvas.line(((x - 1.8, y - 1.6), (x + 1.8, y - 1.9)), lighter(paint.colour, 0.6), 0.8)


_IN_HAND = {
    "handbag": _handbag, "shoulder bag": _shoulder_bag, "shopping bag": _shopping_bag, "suitcase": _suitcase,
    "umbrella": _umbrella, "book": _book,
}  # fmt: skip
