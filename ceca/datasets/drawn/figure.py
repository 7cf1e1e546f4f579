"""Draw one person in one pose, from the farthest part to the nearest."""

from __future__ import annotations

from dataclasses import replace

from ceca.datasets.drawn.attributes import Attributes
from ceca.datasets.drawn.body import Body, Joints, Pose, joints
from ceca.datasets.drawn.canvas import Canvas
from ceca.datasets.drawn.carried import draw_behind, draw_in_hand, draw_on_back, draw_on_torso
from ceca.datasets.drawn.garments import draw_legs, draw_sleeved_arm, draw_upper
from ceca.datasets.drawn.head import draw_hair_behind, draw_head, draw_neck


def draw_figure(canvas: Canvas, person: Attributes, body: Body, pose: Pose) -> None:
    """Paint the person onto the canvas, in place.

    Profiles are drawn facing right. For a left view, the canvas must be mirrored.
    """
    if pose.profile and person.carried == "suitcase":
        pose = replace(pose, stride=abs(pose.stride))  # the near arm swings back and pulls the suitcase
    place = joints(pose, person.gender, body.build)
    if pose.profile:
        _draw_profile(canvas, person, body, pose, place)
        return
    draw_behind(canvas, person, body, pose)
    draw_hair_behind(canvas, person, pose)
    draw_legs(canvas, person, body, pose, place)
    draw_neck(canvas, body, pose)
    for arm in (place.far_arm, place.near_arm):
        if person.upper_kind == "tank top":  # the bare shoulders are under the straps
            draw_sleeved_arm(canvas, arm, person, body)
    draw_upper(canvas, person, body, pose)
    draw_on_torso(canvas, person, body, pose)
    if person.upper_kind != "tank top":
        for arm in (place.far_arm, place.near_arm):
            draw_sleeved_arm(canvas, arm, person, body)
    draw_in_hand(canvas, person, pose, place)
    draw_head(canvas, person, body, pose)
    draw_on_back(canvas, person, body, pose)


def _draw_profile(canvas: Canvas, person: Attributes, body: Body, pose: Pose, place: Joints) -> None:
    draw_sleeved_arm(canvas, place.far_arm, person, body)
    draw_behind(canvas, person, body, pose)
    draw_legs(canvas, person, body, pose, place)
    draw_neck(canvas, body, pose)
    draw_upper(canvas, person, body, pose)
    draw_head(canvas, person, body, pose)
    draw_on_torso(canvas, person, body, pose)
    if person.carried == "suitcase":  # pulled behind the leg
        draw_in_hand(canvas, person, pose, place)
    draw_sleeved_arm(canvas, place.near_arm, person, body)
    if person.carried != "suitcase":
        draw_in_hand(canvas, person, pose, place)
