"""The local S3 server keeps objects; what it refuses is in tests/ceca/test_store.py."""

from __future__ import annotations

import pytest

from ceca.data.store import Store, StoreError


def test_a_store_on_s3_reads_what_it_wrote(s3_environment):
    store = Store("s3://bucket/prefix")
    store.write_json({"a": 1}, "table", "manifest.json")
    assert store.read_json("table", "manifest.json") == {"a": 1}
    assert store.read_json("table", "other.json") is None
    store.remove("table")
    assert store.read_json("table", "manifest.json") is None


def test_a_process_may_change_its_endpoint_and_one_that_is_down_is_an_error_that_names_the_variable(
    s3_environment, monkeypatch
):
    Store("s3://bucket/prefix").write_json({"a": 1}, "manifest.json")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(StoreError, match="AWS_ENDPOINT_URL"):
            Store("s3://bucket/prefix").read_json("manifest.json")
    assert Store("s3://bucket/prefix").read_json("manifest.json") == {"a": 1}
