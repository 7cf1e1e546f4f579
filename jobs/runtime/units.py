"""How a stage runs on Ray: numbered units of work, each done exactly once, then one atomic publication.

A stage lists its units and gives a worker class. Ray Data runs the workers. Each worker reads its unit's input from
the store and writes its output there, so no row passes through the driver. A finished unit leaves a receipt, and a
stage that is started again skips the units that have one. A stage whose tables are published needs no Ray.

A stage may be stopped for so long that others take it for dead. What it publishes then is what it may still publish:
not without its lease, not without its parts, and not images that were erased meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa

from ceca.data.changes import erased_images, reopen
from ceca.data.erase import leave_out, without
from ceca.data.lease import Lease
from ceca.data.names import REMOVED, WORK, rejects_table
from ceca.data.store import Manifest, Receipt, Reject, Store
from ceca.errors import UserError
from ceca.machines import Pool, machines_for
from jobs.runtime.alone import alone
from jobs.runtime.console import Track, console, plain
from jobs.runtime.noise import tell_warnings
from jobs.runtime.ray_session import connect
from jobs.runtime.spread import bundles_of, reserved
from jobs.runtime.team import Lost, Team, WorkerLost

ROUNDS = 3  # of doing units whose receipts have disappeared


@dataclasses.dataclass
class Output:
    """The result of one unit of work: rows per table, rejected rows, and sums for the summary."""

    tables: dict[str, pa.Table]
    rejects: list[Reject] = dataclasses.field(default_factory=list)
    counts: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Worker(Protocol):
    """Does a unit of work. A UserError it raises ends the stage, except WorkerLost; a bad row is a Reject."""

    def __call__(self, work: Any) -> Output: ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides a stage's result, and how the work is cut into units."""

    stage: str
    version: str
    tables: tuple[str, ...]  # published in this order: the one that readers look at last
    units: Sequence[Any]  # JSON values
    sizes: Sequence[int]  # rows per unit, for the progress display
    worker: Callable[..., Worker]
    arguments: Mapping[str, Any]  # of the worker's constructor
    made_from: Mapping[str, str]
    config: Mapping[str, Any]
    rejects: Sequence[Reject] = ()
    kept: Sequence[Receipt] = ()  # parts of an earlier version, published again before the new ones
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    progress: Callable[[Mapping[str, float], float], str] | None = None  # (sums so far, seconds) → words
    again: str = "--redo reads all rows again"  # how rejected rows get another chance
    prepare: Callable[[], None] | None = None  # called before units are done; writes what they read


@dataclasses.dataclass(frozen=True)
class Workers:
    """The workers of a stage and what each one takes.

    Attributes:
        replicas: workers at most.
        cpus: CPUs of one worker.
        gpus: GPUs of one worker.
        accelerator_type: Ray's name of the kind of GPU; None takes any.
        units_at_once: units that one worker does at the same time, each called from a thread of its own.
        may_be_lost: a worker may raise WorkerLost.
        spread: the GPUs of one worker may be on several machines.
    """

    replicas: int
    cpus: float
    gpus: float = 0
    accelerator_type: str | None = None
    units_at_once: int = 1
    may_be_lost: bool = False
    spread: bool = False


def run_plan(store: Store, plan: Plan, workers: Workers, *, redo: bool) -> dict[str, Manifest]:
    """Do the units that are left of a plan and publish its tables; nothing if they are published already.

    Args:
        store: the dataset.
        plan: the stage's units and their meaning.
        workers: number and size of the workers.
        redo: make a new version even if this one is published.

    Returns:
        The manifest of each table, and of the table of rejected rows.
    """
    if not redo and (published := _published(store, plan)):
        return published
    with alone(store, f"{plan.stage}-{plan.version}") as lease:
        if not redo and (published := _published(store, plan)):  # by another process, a moment ago
            return published
        version = _new_version(store, plan) if redo else plan.version
        if earlier := _versions(store, plan, version):
            console.print(f"{plan.stage}: version {version} was published before and is made current again")
            return store.make_current(earlier, lease.check)
        return _make(store, plan, version, workers, lease)


def _published(store: Store, plan: Plan) -> dict[str, Manifest] | None:
    """The plan's tables, if they are the current ones."""
    manifest = store.manifest(plan.tables[-1])
    if manifest is None or manifest.version.partition("-")[0] != plan.version:
        return None
    console.print(f"{plan.stage}: {store.place(plan.tables[-1])} is published already (--redo makes it again)")
    rejects = store.manifest(rejects_table(plan.stage), manifest.version)
    if rejects is not None and rejects.rows:
        rejected = _rejected(store, plan, rejects)
        console.print(f"{plan.stage}: {rejected}. If you repaired what they need: {plan.again}")
    # Another run may have published one of them since: each is returned in the version of the last one.
    return {table: store.manifest(table, manifest.version) or store.current(table) for table in plan.tables}


def _new_version(store: Store, plan: Plan) -> str:
    """A name beside the published versions.

    Readers keep the old version until the new one is whole, and a --redo that was killed finds its units again. A name
    is not used again when `ceca gc` has removed its version: caches may still have that.
    """
    current = store.manifest(plan.tables[-1])
    of, _, number = current.version.partition("-") if current is not None else ("", "", "")
    repeats = int(number or 0) + 1 if of == plan.version else 0
    while store.manifest(plan.tables[-1], version := f"{plan.version}-{repeats}".removesuffix("-0")) is not None:
        repeats += 1
    return version


def _make(store: Store, plan: Plan, version: str, workers: Workers, lease: Lease) -> dict[str, Manifest]:
    started = time.monotonic()
    receipts = _finish_units(store, plan, version, workers)
    _refuse_empty(store, plan, version, receipts, lease)
    in_plan = Receipt({}, tuple(plan.rejects))
    receipts_in_order = [in_plan, *plan.kept, *(receipts[unit] for unit in range(len(plan.units)))]
    erased = erased_images(store)
    manifests = store.publish(
        plan.stage,
        version,
        plan.tables,
        leave_out(store, receipts_in_order, erased),
        made_from=plan.made_from,
        config=plan.config,
        notes={**plan.notes, "counts": _sum_counts(receipts.values())},
        check=lease.check,
    )
    reopen(store, erased_images(store) - erased)
    _print_summary(store, plan, manifests, time.monotonic() - started)
    return manifests


def _finish_units(store: Store, plan: Plan, version: str, workers: Workers) -> dict[int, Receipt]:
    """Do the units that have no receipt yet.

    Raises:
        UserError: receipts disappear again and again.
    """
    for _ in range(ROUNDS):
        done = _receipts(store, plan, version)
        todo = [unit for unit in range(len(plan.units)) if unit not in done]
        if not todo:
            return done
        if done:
            console.print(f"{plan.stage}: continuing, {len(done)} of {len(plan.units)} parts are there")
        if plan.prepare is not None:
            plan.prepare()
        connect(store)
        _run_units(store, plan, version, todo, workers)
    done = _receipts(store, plan, version)
    if len(done) < len(plan.units):
        raise UserError(
            f"{plan.stage}: receipts of finished work disappear from {store.place(WORK, plan.stage, version)}; "
            "end the process that removes them and start again"
        )
    return done


def _receipts(store: Store, plan: Plan, version: str) -> dict[int, Receipt]:
    """Receipts of the finished units whose parts are still there: an erasure starts unfinished work over."""
    receipts = store.receipts(plan.stage, version)
    gone = {
        (table, part)
        for table in {table for receipt in receipts.values() for table in receipt.parts}
        for part in store.missing(table, [r.parts[table] for r in receipts.values() if table in r.parts])
    }
    return {unit: receipt for unit, receipt in receipts.items() if gone.isdisjoint(receipt.parts.items())}


def _refuse_empty(store: Store, plan: Plan, version: str, receipts: Mapping[int, Receipt], lease: Lease) -> None:
    """Refuse to publish a stage that rejected every row: the cause is a mistake, not bad rows. It starts anew."""
    if not plan.units or plan.kept or any(plan.tables[-1] in receipt.parts for receipt in receipts.values()):
        return
    rejects = Counter(f"{reject.reason}: {reject.detail}" for r in receipts.values() for reject in r.rejects)
    lease.check()
    store.remove(WORK, plan.stage, version)
    common = "; ".join(f"{count} x {reason}" for reason, count in rejects.most_common(3))
    raise UserError(f"{plan.stage}: all {sum(plan.sizes)} rows were rejected and nothing is published; {common}")


def _versions(store: Store, plan: Plan, version: str) -> list[Manifest]:
    """The tables of a version that was published whole; empty if it was not. Nothing needs to be computed then."""
    tables = (rejects_table(plan.stage), *plan.tables)
    found = [manifest for table in tables if (manifest := store.manifest(table, version)) is not None]
    whole = all(not store.missing(manifest.table, manifest.parts) for manifest in found)
    return found if whole and found and found[-1].table == plan.tables[-1] else []


def _run_units(store: Store, plan: Plan, version: str, todo: Sequence[int], workers: Workers) -> None:
    """Do these units on the cluster and show the progress.

    A lost worker gives its units back. They are done in a further round by one worker less.

    Raises:
        UserError: a worker raised it, or no worker is left.
    """
    team = Team.start() if workers.may_be_lost and workers.replicas > 1 else Team()
    total = sum(plan.sizes)
    sums: Counter[str] = Counter()
    lost = Lost(plan.stage, workers.replicas)
    started = 0.0
    with Track(plan.stage, total, total - sum(plan.sizes[unit] for unit in todo)) as track:
        while todo:
            for result in _round(store, plan, version, todo, workers, workers.replicas - len(lost.reasons), team):
                if lost.gives_back(result):
                    continue
                counts = json.loads(result["counts"])
                sums.update(counts)
                started = started or time.monotonic() - counts.get("engine_busy_s", 0.0)
                words = [plan.progress(sums, time.monotonic() - started)] if plan.progress else []
                words += [f"{result['rejects']} rejected"] if result["rejects"] else []
                track.advance(plan.sizes[result["unit"]], ", ".join(filter(None, words)))
            todo = lost.take_units()


def _round(
    store: Store, plan: Plan, version: str, todo: Sequence[int], workers: Workers, replicas: int, team: Team
) -> Iterator[dict[str, Any]]:
    """Give each of these units to one of the workers. Yields what `_UnitWorker` returns."""
    import ray

    rows = [{"unit": unit, "work": json.dumps(plan.units[unit])} for unit in todo]
    pool: Pool = "dialogue" if workers.gpus else "cpu"
    most = min(replicas, len(todo))
    with _gpus(workers, machines_for(pool), most) as gpus:
        units = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _UnitWorker,
            fn_constructor_args=(store.uri, plan.stage, version, plan.worker, dict(plan.arguments), team),
            compute=ray.data.ActorPoolStrategy(
                min_size=most if workers.spread else 1,
                max_size=most,
                max_concurrent_calls_per_actor=workers.units_at_once,
                enable_true_multi_threading=workers.units_at_once > 1,
            ),
            num_cpus=workers.cpus,
            **gpus,
        )
        # As an option of the execution and not of the workers alone: Ray Data also asks for machines before it needs
        # them.
        units.context.execution_options.label_selector = machines_for(pool)
        yield from units.iter_rows()


@contextlib.contextmanager
def _gpus(workers: Workers, machines: dict[str, str], most: int) -> Iterator[dict[str, Any]]:
    """Ray Data's options for the GPUs of that many workers on these machines."""
    if workers.spread:
        bundles = bundles_of(int(workers.gpus), workers.cpus, workers.accelerator_type)
        with reserved(bundles, machines, most) as options:
            yield {"ray_remote_args_fn": options}
    else:
        kind = {"accelerator_type": workers.accelerator_type} if workers.accelerator_type else {}
        yield {"num_gpus": workers.gpus or None, **kind}


class _UnitWorker:
    """A Ray Data actor: does units with the stage's worker and commits each before the next.

    A lost worker would take one unit after the other and give each back at once. So it keeps those that it has until
    all other workers are idle.
    """

    def __init__(
        self,
        uri: str,
        stage: str,
        version: str,
        make: Callable[..., Worker],
        arguments: dict[str, Any],
        team: Team,
    ):
        self.store, self.stage, self.version = Store(uri), stage, version
        self.make, self.arguments, self.team = make, arguments, team
        self.name = uuid.uuid4().hex
        self.worker: Worker | None = None
        self.broken: UserError | None = None
        self.making = threading.Lock()
        self.removals: tuple[list[str], set[str]] = [], set()  # objects below removed/ → ids of erased images

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        tell_warnings()
        unit = row["unit"]
        result = {"unit": unit, "worker": self.name, "rejects": 0, "counts": "{}", "fatal": "", "lost": ""}
        self.team.begin(unit)
        try:
            output = self._ready()(json.loads(row["work"]))
            erased = self._erased()
            tables = {table: without(rows, erased) for table, rows in output.tables.items()}
            parts = {
                table: self.store.write_part(table, self.version, unit, rows)
                for table, rows in tables.items()
                if rows.num_rows
            }
            receipt = Receipt(parts, tuple(output.rejects), output.counts)
            self.store.write_receipt(self.stage, self.version, unit, receipt)
        except WorkerLost as error:
            self.broken = error
            result |= {"lost": plain(error)}
        except UserError as error:
            result |= {"fatal": plain(error)}
        else:
            result |= {"rejects": len(output.rejects), "counts": json.dumps(output.counts)}
        finally:
            self.team.end(unit)
        if result["lost"]:
            self.team.wait_until_idle()
        return result

    def _erased(self) -> set[str]:
        """Ids of images that were erased by now; they may have been read before."""
        listed = self.store.names(REMOVED)
        if listed != self.removals[0]:
            self.removals = listed, erased_images(self.store)
        return self.removals[1]

    def _ready(self) -> Worker:
        """The worker, made at the first unit: in __init__ Ray would retry an error that does not go away."""
        with self.making:
            if self.broken is not None:
                raise self.broken
            if self.worker is None:
                try:
                    self.worker = self.make(**self.arguments)
                except UserError as error:
                    self.broken = error
                    raise
            return self.worker


def _sum_counts(receipts: Iterable[Receipt]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for receipt in receipts:
        for name, count in receipt.counts.items():
            sums[name] = sums.get(name, 0) + count
    return sums


def _print_summary(store: Store, plan: Plan, manifests: Mapping[str, Manifest], seconds: float) -> None:
    rejects = manifests[rejects_table(plan.stage)]
    rows = ", ".join(f"{manifests[table].rows:,} {table}" for table in plan.tables)
    rejected = _rejected(store, plan, rejects) if rejects.rows else "none rejected"
    console.print(f"{plan.stage}: {rows}; {rejected}; {seconds:.1f} s → {store.place(plan.tables[-1])}")


def _rejected(store: Store, plan: Plan, rejects: Manifest) -> str:
    """Number of rejected rows, their reasons, and where they are listed."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(rejects.notes["rejects"].items()))
    return f"{rejects.rows} rejected ({reasons}; see {store.place(rejects_table(plan.stage))})"
