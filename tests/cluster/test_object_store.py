"""The local S3 server keeps objects and checks keys."""

from __future__ import annotations

import pytest
import s3fs

from ceca.store import Store, StoreError


def test_a_store_on_s3_reads_what_it_wrote(s3_environment):
    store = Store("s3://bucket/prefix")
    store.write_json({"a": 1}, "table", "manifest.json")
    assert store.read_json("table", "manifest.json") == {"a": 1}
    assert store.read_json("table", "other.json") is None
    store.remove("table")
    assert store.read_json("table", "manifest.json") is None


def test_a_wrong_key_is_an_error_that_names_the_variables(s3, s3_environment, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(StoreError, match="AWS_SECRET_ACCESS_KEY"):
            Store("s3://bucket/prefix").read_json("table", "manifest.json")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_missing_bucket_is_an_error_that_says_so(s3_environment):
    with pytest.raises(StoreError, match="bucket"):
        Store("s3://nobody/prefix").write_json({}, "manifest.json")


def test_an_endpoint_that_is_down_is_an_error_that_names_the_variable(s3_environment, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(StoreError, match="AWS_ENDPOINT_URL"):
            Store("s3://bucket/prefix").read_json("manifest.json")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
