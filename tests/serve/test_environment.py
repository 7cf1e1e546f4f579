"""What nodes need in their environment for the service: the files that cannot import it hold the same values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster import local
from serve.environment import ENVIRONMENT
from serve.proxy import middlewares
from tests.serve.conftest import ROOT

# NAME=value, or {name: NAME, value: "value"}
SETTING = re.compile(r"\b(RAY_SERVE_\w+|OMP_WAIT_POLICY)(?:=|, value: \"?)([^\s\"}]+)")
FILES = {"serve/service.yaml", "cluster/kubernetes/template/cluster.yaml", "ray_cluster.yaml"}


def files_with_settings() -> set[str]:
    files = [*ROOT.glob("*.yaml"), *(file for room in ("serve", "cluster") for file in (ROOT / room).rglob("*.yaml"))]
    return {str(file.relative_to(ROOT)) for file in files if "RAY_SERVE_" in file.read_text()}


def test_no_other_file_holds_the_settings() -> None:
    assert files_with_settings() == FILES


@pytest.mark.parametrize("file", sorted(FILES))
def test_a_file_agrees_with_the_settings(file: str) -> None:
    assert dict(SETTING.findall(Path(ROOT / file).read_text())) == ENVIRONMENT


def test_the_local_cluster_agrees_with_the_settings() -> None:
    assert local.SERVING == ENVIRONMENT


def test_the_proxies_are_given_a_function_that_exists() -> None:
    place = f"{middlewares.__module__}:{middlewares.__name__}"
    assert ENVIRONMENT["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == place
