"""Images that are added and removed: acknowledged here, carried out by the intake, and asked about as jobs."""

from __future__ import annotations

import asyncio

from ceca.config import ServeConfig
from ceca.data.changes import (
    arrival_id,
    hide,
    pending_erasures,
    removal,
    removed_images,
    unadded_images,
    waiting_images,
    write_arrival,
)
from ceca.data.names import FAILED
from ceca.data.store import Store, version_of
from ceca.errors import UserError
from serve.describer import engine_settings, refuse_without_engine
from serve.following import Following
from serve.replicas import Replicas
from serve.schema import Job, Status
from serve.service import NewImage


class Changes:
    """Changes of the gallery that clients request.

    Args:
        store: the dataset.
        config: settings of the service.
        following: the snapshot that is served.
        replicas: the other deployments, among them the intake.
    """

    def __init__(self, store: Store, config: ServeConfig, following: Following, replicas: Replicas):
        self.store, self.config, self.following, self.replicas = store, config, following, replicas

    async def add(self, image: NewImage) -> Job:
        """Acknowledge an image: from now on it is in the store.

        Raises:
            UserError: it cannot be added.
        """
        settings = await asyncio.to_thread(engine_settings, self.following.snapshot.edition, self.config)
        refuse_without_engine(settings, image.summary)
        if arrival_id(image.content) in await asyncio.to_thread(removed_images, self.store):
            raise UserError("this image was deleted from the gallery, and does not come back")
        details = {
            "identity": image.identity,
            "camera": image.camera,
            "time": image.time,
            "source_path": image.name,
            "summary": image.summary,
        }

        def write() -> str:
            return write_arrival(self.store, image.content, image.size, details)

        image_id = await asyncio.to_thread(write)
        await self.replicas.wake_intake()
        return Job(job=f"add-{image_id}", status="waiting", image_id=image_id)

    async def remove(self, image_id: str) -> Job | None:
        """Take an image out of every search, and have it erased; None if there is no such image.

        An image that waits to be added is removed too, and then it is not added.
        """
        name = version_of([image_id])  # the name that `hide` gives the record
        if await self._is_known(image_id):
            await asyncio.to_thread(hide, self.store, [image_id], True)
            await self.following.leave_out()
        elif await asyncio.to_thread(removal, self.store, name) is None:
            return None  # else it is removed already, and the client lost the first response
        await self.replicas.wake_intake()
        return Job(job=f"delete-{name}", status="waiting", image_id=image_id)

    async def _is_known(self, image_id: str) -> bool:
        """Whether an image is in the gallery, waits to be added, or could not be added."""
        if image_id in self.following.snapshot.catalogue:
            return True
        # Looked at in this order, because an image that was added no longer waits.
        if image_id in await asyncio.to_thread(unadded_images, self.store):
            return True
        await self.following.follow()  # another replica may serve a newer edition
        return image_id in self.following.snapshot.catalogue

    async def job(self, job: str) -> Job | None:
        """The state of a job; None if there is no such job."""
        kind, _, name = job.partition("-")
        return await (self._erasure(job, name) if kind == "delete" else self._arrival(job, name))

    async def _erasure(self, job: str, name: str) -> Job | None:
        if await asyncio.to_thread(removal, self.store, name) is None:
            return None
        if name in await asyncio.to_thread(pending_erasures, self.store):
            return Job(job=job, status="waiting", detail=await self.replicas.intake_status())
        return Job(job=job, status="done")

    async def _arrival(self, job: str, image_id: str) -> Job | None:
        for last in (False, True):
            if image_id in self.following.snapshot.catalogue:
                return Job(job=job, status="done", image_id=image_id)
            failure = await asyncio.to_thread(self.store.read_json, FAILED, f"{image_id}.json")
            if failure is not None:
                return Job(job=job, status="failed", image_id=image_id, detail=failure["detail"])
            if image_id in await asyncio.to_thread(waiting_images, self.store):
                return Job(job=job, status="waiting", image_id=image_id, detail=await self.replicas.intake_status())
            if not last:  # it may be in a newer edition
                await self.following.follow()
        if image_id in await asyncio.to_thread(removed_images, self.store):
            return Job(job=job, status="failed", image_id=image_id, detail="the image was deleted")
        return None

    async def status(self) -> Status:
        """What is served, and what is not yet."""
        snapshot = self.following.snapshot
        arrivals = await asyncio.to_thread(waiting_images, self.store)
        erasures = await asyncio.to_thread(pending_erasures, self.store)
        return Status(
            model=snapshot.edition.model_name,
            gallery=snapshot.edition.gallery_name,
            images=len(snapshot.catalogue),
            following=self.following.problem,
            intake=await self.replicas.intake_status(),
            arrivals=len(arrivals),
            erasures=len(erasures),
        )
