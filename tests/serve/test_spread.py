"""Replicas on different nodes, and on the machines that are meant for them."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve._private.build_app import build_app

from ceca.config import ServeConfig
from ceca.data.store import Store
from ceca.errors import UserError
from ceca.machines import machines_for
from serve.__main__ import _check_replicas
from serve.app import build
from serve.wire import INGRESS


def deployments(people: Store, **settings: Any) -> dict[str, Any]:
    """The deployments of a service by name, as Ray Serve reads them."""
    made = build_app(build({"data": people.uri, "open": True, **settings}), name="any")
    return {deployment.name: deployment._replica_config for deployment in made.deployments}


@pytest.mark.parametrize(("gpus", "pool"), [(0, "cpu"), (0.5, "serve")])
def test_replicas_name_their_machines_and_none_may_be_on_the_head(people: Store, gpus: float, pool: str) -> None:
    found = deployments(people, gpus=gpus, shards=2)
    assert len(found) == 5
    for name, replica in found.items():
        waits = name in (INGRESS, "Intake")
        expected = machines_for("cpu", "serve") if waits else machines_for(pool)  # type: ignore[arg-type]
        assert replica.ray_actor_options["label_selector"] == expected
        assert replica.ray_actor_options["num_cpus"] > 0, "with none, Ray may place it on the head and lose it there"


@pytest.mark.parametrize("most", [None, 1, 2])
def test_a_node_has_as_many_replicas_of_a_kind_as_the_settings_say(people: Store, most: int | None) -> None:
    found = deployments(people, replicas_per_node=most, search_replicas=2, encoder_replicas_max=3)
    assert {found[name].max_replicas_per_node for name in (INGRESS, "QueryEncoder", "GallerySearch0")} == {most}


def test_on_one_machine_replicas_that_must_be_apart_are_refused() -> None:
    _check_replicas(ServeConfig(encoder_replicas=2))
    _check_replicas(ServeConfig(encoder_replicas=2, replicas_per_node=2))
    with pytest.raises(UserError, match="3 search replicas with --replicas-per-node 1 need a cluster of 3 nodes"):
        _check_replicas(ServeConfig(search_replicas=1, search_replicas_max=3, replicas_per_node=1))
