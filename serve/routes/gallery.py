"""The routes that change the gallery: add an image, remove it, and ask how far that is."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi import Query as Parameter

from serve.audit import note
from serve.refusals import NotFound, documented
from serve.routes.images import IMAGE_BODY, ImageIdInPath, ImageInBody
from serve.schema import Job, Moment, Text
from serve.service import NewImage, Service


def gallery_routes(service: Service) -> APIRouter:
    v1 = APIRouter(prefix="/v1", tags=["gallery"])

    @v1.post("/images", status_code=202, openapi_extra=IMAGE_BODY)
    async def add(
        http: Request,
        sent: ImageInBody,
        identity: Annotated[int | None, Parameter(ge=0, lt=2**53)] = None,
        camera: Annotated[Text | None, Parameter(min_length=1, max_length=100)] = None,
        time: Moment | None = None,
        name: Annotated[Text, Parameter(max_length=300)] = "",
        summary: Annotated[Text, Parameter(max_length=2000)] = "",
    ) -> Job:
        """Add the image in the body (JPEG, PNG, WebP or BMP) to the gallery. The returned job says when searches find
        it. With `summary`, a description of the person, no multimodal model is asked about the image. `time` is in UTC
        unless it says otherwise."""
        image = NewImage(sent.content, sent.size, identity, camera, time, name, " ".join(summary.split()))
        job = await service.add(image)
        note(http, images=[job.image_id])
        return job

    @v1.delete("/images/{image_id}", status_code=202, responses=documented(404))
    async def remove(image_id: ImageIdInPath, http: Request) -> Job:
        """Remove an image from search at once, and erase it with its texts and embeddings."""
        note(http, images=[image_id])
        job = await service.remove(image_id)
        if job is None:
            raise NotFound(f"no image {image_id} in this gallery")
        return job

    @v1.get("/jobs/{job}", responses=documented(404))
    async def job(job: Annotated[str, Path(pattern="^(add-[0-9a-f]{16}|delete-[0-9a-f]{12})$")]) -> Job:
        """The state of an image that is being added or erased."""
        state = await service.job(job)
        if state is None:
            raise NotFound(f"no job {job}")
        return state

    return v1
