"""Recall of approximate search over the published gallery, measured by one worker and published as the table recall."""

from __future__ import annotations

import pyarrow as pa

from ceca.data import schema
from ceca.data.names import RECALL
from ceca.data.store import Manifest, Store, StoreError, version_of
from ceca.search.edition import find_edition
from ceca.search.gallery import open_gallery
from ceca.search.recall import OMEGAS, TOP_K, find_recall, least_recall, sample_rows
from jobs.runtime.console import console
from jobs.runtime.units import Output, Plan, Workers, run_plan


def measure_recall(store: Store, gallery: Manifest, model: str, share: float, *, redo: bool = False) -> Manifest:
    """Measure and publish the recall of a gallery: 128 captions are asked, or summaries where there are no captions.

    Args:
        store: the dataset.
        gallery: the published gallery.
        model: name or URI of its model.
        share: share of the images that approximate search compares exactly.
        redo: measure again.

    Raises:
        StoreError: the dataset has no texts that could be asked.
    """
    edition = find_edition(store, model)
    asked, column = store.belonging("captions", edition.manifest("images")), "text"
    if asked is None or not asked.rows:
        asked, column = edition.told(), "summary"
    if asked is None:
        raise StoreError(f"{store.uri} has neither captions nor summaries: there is nothing to measure recall with")
    rows = sample_rows(asked.rows)
    plan = Plan(
        stage=RECALL,
        version=version_of(RECALL, schema.SCHEMA_VERSION, gallery.version, share, asked.version),
        tables=(RECALL,),
        units=[rows],
        sizes=[len(rows)],
        worker=RecallWorker,
        arguments={
            "uri": store.uri,
            "model": model,
            "gallery": gallery.version,
            "share": share,
            "asked": asked,
            "column": column,
        },
        made_from={"model": edition.digest},  # not the gallery: an old one need not stay because it was measured
        config={"gallery": gallery.version, "approximate": share},
    )
    published = run_plan(store, plan, Workers(1, cpus=1), redo=redo)[RECALL]
    recall = least_recall(store, published)
    console.print(f"recall: comparing {share:.2%} of the images exactly finds {recall:.1%} of the ten best")
    return published


class RecallWorker:
    """Asks a gallery a sample of texts, exactly and approximately."""

    def __init__(self, uri: str, model: str, gallery: str, share: float, asked: Manifest, column: str):
        self.store, self.model, self.gallery, self.share = Store(uri), model, gallery, share
        self.asked, self.column = asked, column

    def __call__(self, work: list[int]) -> Output:
        import numpy as np

        from ceca.model.embed import embed_texts
        from ceca.model.weights import load_weights

        edition = find_edition(self.store, self.model)
        if edition.gallery != self.gallery:
            raise StoreError(f"gallery {self.gallery} was replaced by {edition.gallery} meanwhile; start again")
        texts = self.store.take(self.asked, self.asked.places(np.array(work)), [self.column])[self.column].to_pylist()
        queries = embed_texts(load_weights(self.store, edition.model, edition.digest), texts)
        opened = open_gallery(edition, approximate=self.share)
        rows = [
            {"omega": omega, "top_k": TOP_K, "queries": len(texts), "recall": find_recall(opened, *queries, omega)}
            for omega in OMEGAS
        ]
        return Output({RECALL: pa.Table.from_pylist(rows, schema.RECALL)})
