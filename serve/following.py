"""Keeping an ingress replica at the newest edition of the dataset, without what has been removed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging

from ray.serve.exceptions import DeploymentUnavailableError

from ceca.config import ServeConfig
from ceca.data.names import REMOVED
from ceca.data.store import Store
from ceca.search.edition import find_edition
from ceca.search.recall import require_recall
from serve.metrics import Metrics
from serve.replicas import Replicas
from serve.snapshot import Snapshot, read_snapshot

log = logging.getLogger(__name__)

STARTING_S = 0.3  # pause between two attempts to prepare the other deployments while the service starts
OPENINGS = 3  # attempts to open the newest edition while its objects change


class Following:
    """The snapshot that is served, and the change to the next one.

    Args:
        store: the dataset.
        config: settings of the service.
        replicas: the other deployments, which load an edition before it is served.
        metrics: counters of this replica.
    """

    def __init__(self, store: Store, config: ServeConfig, replicas: Replicas, metrics: Metrics):
        self.store, self.config, self.replicas, self.metrics = store, config, replicas, metrics
        self.snapshot = read_snapshot(store, config.model)
        self.ready, self.problem = False, ""  # whether every replica has loaded it; why a newer one is not served
        self.lock = asyncio.Lock()
        self._count_images()

    async def keep(self) -> None:
        """Wait for the other deployments to be ready, then look for newer editions, until cancelled."""
        while True:
            try:
                if not self.ready:
                    await self.replicas.prepare(self.snapshot.edition)
                    self.ready = True
                await self.follow()
                self._count_images()  # again and again, or Ray's exporter forgets the gauge
                self.problem = ""
            except DeploymentUnavailableError:
                self.problem = "the replicas start"
            except Exception as error:  # e.g. no connection to the store, or a gallery without its model: keep serving
                with contextlib.suppress(Exception):  # removals take effect nevertheless
                    await self.leave_out()
                self.problem = " ".join(str(error).split())
                log.warning("stays with gallery %s: %s", self.snapshot.edition.gallery_name, self.problem)
                self.metrics.problems.inc(1, {"where": "following"})
            await asyncio.sleep(self.config.follow_s if self.ready else STARTING_S)

    async def follow(self) -> None:
        """Change to the newest edition, if there is one and all replicas can load it.

        Raises:
            StoreError: it cannot be read; the current one stays.
            UserError: so it does if approximate search finds too little in the newest gallery.
        """
        async with self.lock:
            edition = await asyncio.to_thread(find_edition, self.store, self.config.model)
            if edition == self.snapshot.edition:
                return
            if edition.gallery != self.snapshot.edition.gallery:
                shares = self.config.approximate, self.config.least_recall
                await asyncio.to_thread(require_recall, self.store, edition, *shares)
            if edition.digest != self.snapshot.edition.digest:
                await self.replicas.change_model(edition)
            for left in reversed(range(OPENINGS)):
                try:
                    snapshot = await asyncio.to_thread(read_snapshot, self.store, self.config.model, self.snapshot)
                    await self.replicas.prepare(snapshot.edition)
                    if set(self.snapshot.edition.removed) <= set(snapshot.edition.removed):
                        break  # else an image was removed meanwhile, and must not come back
                except FileNotFoundError:  # an object was rewritten while a replica opened it
                    if not left:
                        raise
            else:
                return  # the next call tries again
            self._serve(snapshot)

    async def reopen(self) -> None:
        """Look at the tables again, because something of them is gone: erasing writes parts again.

        Raises:
            StoreError, FileNotFoundError: they cannot be read; the current snapshot stays.
        """
        before = self.snapshot
        await self.follow()
        async with self.lock:
            if self.snapshot is before:
                self._serve(await asyncio.to_thread(Snapshot, before.edition, before))

    async def leave_out(self) -> None:
        """Leave out what has been removed since the current edition, whether or not a newer gallery can be served."""
        while True:
            before = self.snapshot
            removed = tuple(await asyncio.to_thread(self.store.names, REMOVED))
            if set(removed) <= set(before.edition.removed):
                return
            try:
                edition = dataclasses.replace(before.edition, removed=removed)
                snapshot = await asyncio.to_thread(Snapshot, edition, before)
                await self.replicas.prepare(snapshot.edition)
            except FileNotFoundError:  # an object of `added` was rewritten: that is another edition
                await self.follow()
                continue
            if self.snapshot is before:  # else another edition is served by now, perhaps with the same image
                self._serve(snapshot)

    def _serve(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._count_images()

    def _count_images(self) -> None:
        self.metrics.images.set(len(self.snapshot.catalogue))
