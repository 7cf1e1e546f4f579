"""Images in requests and responses: how they are described and checked."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import Depends, Path, Request

from ceca.datasets.images import check_image

CONTENT: dict[str, Any] = {
    kind: {"schema": {"type": "string", "format": "binary"}}
    for kind in ("image/jpeg", "image/png", "image/webp", "image/bmp")
}
IMAGE_BODY = {"requestBody": {"required": True, "content": CONTENT}}
IMAGE_RESPONSES: dict[int | str, dict[str, Any]] = {200: {"content": CONTENT}, 304: {"description": "Not modified"}}

ImageIdInPath = Annotated[str, Path(pattern="^[0-9a-f]{16}$")]


async def _image(request: Request) -> bytes:
    content = await request.body()
    await asyncio.to_thread(check_image, content, request.app.state.pixels_limit)
    return content


ImageInBody = Annotated[bytes, Depends(_image)]  # an image that decodes; else ImageError
