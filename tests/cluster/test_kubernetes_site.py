"""Values that a user fills in before applying cluster/kubernetes, and the guide to it: site, images, secrets."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.manifests import APPLIED, GUIDE, everything, maps, pods, ray_nodes, render
from tests.conftest import REPOSITORY


def test_a_site_is_filled_in_at_one_place(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "cluster", tmp_path / "cluster")
    site = tmp_path / "cluster" / "kubernetes" / "site"
    for file in site.iterdir():
        text = file.read_text().replace("s3://bucket", "s3://mine").replace("OWNER", "me").replace("ACCOUNT", "0123")
        file.write_text(text.replace("namespace: ceca", "namespace: people"))
    manifests = [manifest for folder in APPLIED for manifest in render(tmp_path / "cluster" / "kubernetes" / folder)]
    text = yaml.safe_dump_all(manifests)
    assert not re.findall(r"s3://bucket|OWNER|ACCOUNT|DATA|SOURCE|HOST\b(?<!_HOST)|BALANCER|product: GPU", text)
    spaceless = {"Namespace", "ResourceFlavor", "ClusterQueue", "WorkloadPriorityClass"}
    assert {each["metadata"]["namespace"] for each in manifests if each["kind"] not in spaceless} == {"people"}
    data = [
        words[3] for each in manifests if each["kind"] == "RayJob" for words in [each["spec"]["entrypoint"].split()]
    ]
    (service,) = [each["spec"]["serveConfigV2"] for each in manifests if each["kind"] == "RayService"]
    data.append(yaml.safe_load(service)["applications"][0]["args"]["data"])
    assert data == ["s3://mine/cuhk"] * 5


def test_the_images_are_those_of_the_dockerfile() -> None:
    built = set(re.findall(r"-t (\S+)", (REPOSITORY / "cluster" / "Dockerfile").read_text()))
    used = {container["image"] for pod in pods() for container in pod["spec"]["containers"]}
    assert used - {"redis:7.2-bookworm"} == built
    for template in ray_nodes():
        (container,) = template["spec"]["containers"]
        kind = "gpu" if "nvidia.com/gpu" in container["resources"]["limits"] else "cpu"
        assert f":{kind}-" in container["image"]
        assert container["workingDir"] == "/opt/ceca"


def test_nothing_secret_is_in_it() -> None:
    manifests = everything()
    assert not [each for each in manifests if each["kind"] == "Secret"]
    for each in maps(manifests):
        if re.search("PASSWORD|TOKEN|SECRET|AUTH|AWS_", str(each.get("name", "")).upper()):
            assert "value" not in each


def secrets_named(value: Any) -> set[str]:
    names = {each["secretName"] for each in maps(value) if "secretName" in each}
    references = [each[key] for each in maps(value) for key in ("secretRef", "secretKeyRef") if key in each]
    return names | {reference["name"] for reference in references}


def test_the_guide_says_how_to_make_every_secret() -> None:
    named = secrets_named(everything())
    named |= {secret["name"] for each in maps(everything()) for secret in each.get("imagePullSecrets", [])}
    needed = {"ceca-ray-token", "ceca-keys", "ceca-redis", "search-tls"}
    assert named == needed | {"ceca-object-store", "ceca-hub", "ceca-registry"}
    assert named == set(re.findall(r"create secret (?:generic|tls|docker-registry) (\S+)", GUIDE.read_text()))


def test_the_guide_applies_what_there_is() -> None:
    named = set(re.findall(r"-k cluster/kubernetes/([\w/-]+)", GUIDE.read_text()))
    assert named == set(APPLIED)
