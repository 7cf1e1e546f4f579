"""Images in requests and responses: how they are described and checked."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from fastapi import Depends, Path, Request

from ceca.datasets.images import Size

CONTENT: dict[str, Any] = {
    kind: {"schema": {"type": "string", "format": "binary"}}
    for kind in ("image/jpeg", "image/png", "image/webp", "image/bmp")
}
IMAGE_BODY = {"requestBody": {"required": True, "content": CONTENT}}
IMAGE_RESPONSES: dict[int | str, dict[str, Any]] = {200: {"content": CONTENT}, 304: {"description": "Not modified"}}

ImageIdInPath = Annotated[str, Path(pattern="^[0-9a-f]{16}$")]


@dataclasses.dataclass(frozen=True)
class Checked:
    """An encoded image that decodes, and its size."""

    content: bytes
    size: Size


async def _image(request: Request) -> Checked:
    content = await request.body()
    return Checked(content, await request.app.state.decoding.check(content))


ImageInBody = Annotated[Checked, Depends(_image)]  # an image that decodes; else ImageError
