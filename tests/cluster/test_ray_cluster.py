"""ray_cluster.yaml: what Ray asks AWS for, against simulated EC2 and IAM."""

from __future__ import annotations

import copy
import functools
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws import node_provider
from ray.autoscaler._private.aws import utils as aws_utils
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.commands import _set_up_config_for_head_node
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import NODE_KIND_HEAD, NODE_KIND_WORKER, TAG_RAY_LAUNCH_CONFIG, TAG_RAY_NODE_KIND
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

from serve.environment import ENVIRONMENT
from tests.conftest import REPOSITORY

FILE = REPOSITORY / "ray_cluster.yaml"
GUIDE = REPOSITORY / "docs" / "aws.md"
TYPES = ("head", "cpu", "dialogue", "train", "serve")
WORKERS = TYPES[1:]
SPOT = {"cpu", "dialogue"}
OBJECT_STORE = 0.3  # Ray's share of a machine's memory for its object store, which is in /dev/shm


def content() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


@pytest.fixture(scope="module")
def prepared() -> dict[str, Any]:
    """The file as `ray up` reads it, with Ray's defaults, after Ray's own check."""
    config = prepare_config(content())
    validate_config(config)
    return config


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A home folder with a token, in which Ray keeps its new ssh key, and access keys of no account."""
    folder = tmp_path_factory.mktemp("home")
    (folder / ".config" / "ceca").mkdir(parents=True)
    (folder / ".config" / "ceca" / "auth_token").write_text("token")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "simulated")
        for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        # Ray lists all of EC2's machine types, which takes seconds in the simulation, so it is done once.
        patch.setattr(node_provider, "list_ec2_instances", functools.cache(node_provider.list_ec2_instances))
        yield


@pytest.fixture(scope="module")
def account(home: None) -> Iterator[None]:
    """A simulated account with the two instance profiles that the file names; no request leaves this process."""

    def forget() -> None:  # Ray keeps its clients, and so one account's answers, for as long as the process lives
        for kept in (aws_utils.resource_cache, aws_utils.client_cache, aws_config._get_subnets_or_die):
            kept.cache_clear()

    with mock_aws():
        forget()
        iam = boto3.client("iam", "us-east-1")
        for name in ("ceca-head", "ceca-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        yield
    forget()


@pytest.fixture(scope="module")
def cluster(account: None, prepared: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of the file before it starts the head: AWS's own numbers filled in."""
    return AWSNodeProvider.bootstrap_config(AWSNodeProvider.fillout_available_node_types_resources(prepared))


def launch(config: dict[str, Any], node_type: str) -> dict[str, Any]:
    """EC2's description of one machine that Ray's provider has started."""
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    kind = NODE_KIND_HEAD if node_type == config["head_node_type"] else NODE_KIND_WORKER
    tags = {TAG_RAY_NODE_KIND: kind, TAG_RAY_LAUNCH_CONFIG: "any", "ray-user-node-type": node_type}
    created = provider.create_node(config["available_node_types"][node_type]["node_config"], tags, 1)
    described = boto3.client("ec2", config["provider"]["region"]).describe_instances(InstanceIds=list(created))
    return described["Reservations"][0]["Instances"][0]


# --- the file itself --------------------------------------------------------------------------------------


def test_ray_accepts_the_file(prepared: dict[str, Any]) -> None:
    assert set(prepared["available_node_types"]) == set(TYPES)
    assert prepared["head_node_type"] == "head"


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (("docker",), "shm_size", "1g"),
        (("available_node_types", "train"), "min_worker", 0),
        (("available_node_types", "train", "resources"), "GPU", "four"),
        ((), "idle_timeout", 5),
    ],
)
def test_a_field_that_ray_does_not_know_is_refused(where: tuple[str, ...], name: str, value: Any) -> None:
    wrong = content()
    place = wrong
    for key in where:
        place = place[key]
    place[name] = value
    with pytest.raises(jsonschema.ValidationError, match=str(value if name == "GPU" else name)):
        validate_config(prepare_config(wrong))


def test_nothing_secret_is_in_the_file() -> None:
    text = FILE.read_text()
    matches = re.findall(r"A[KS]IA[0-9A-Z]{16}|PRIVATE KEY|(?i:secret_access_key|aws_credentials|password)", text)
    assert not matches
    assert not re.findall(r"[0-9a-f]{32,}|[A-Za-z0-9+/]{40}", text.replace("/", " "))
    assert "RAY_AUTH_TOKEN=" not in text, "the token comes from a file"


def test_nothing_is_kept_running_but_the_head(prepared: dict[str, Any]) -> None:
    types = prepared["available_node_types"]
    assert all(types[name]["min_workers"] == 0 and types[name]["max_workers"] > 0 for name in WORKERS)
    assert types["head"]["max_workers"] == 0
    assert prepared["provider"]["cache_stopped_nodes"] is False
    assert 0 < prepared["idle_timeout_minutes"] <= 15
    assert prepared["max_workers"] <= sum(types[name]["max_workers"] for name in WORKERS)


def watched(folder: Path, raylets: str, prepared: dict[str, Any]) -> list[str]:
    """What the watch on a worker calls, with stand-ins for the programs of the machine.

    Args:
        folder: for the stand-ins.
        raylets: whether there is a raylet each time that the watch looks, 1 or 0; then there is none.
    """
    (folder / "looks").write_text("\n".join(raylets))
    programs = {
        "pgrep": "sed -n 1p looks | grep -q 1; found=$?; sed -i 1d looks; exit $found",
        "sleep": 'echo "sleep $1" >> calls',
        "shutdown": 'echo "shutdown $*" >> calls',
    }
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    command = prepared["available_node_types"]["cpu"]["initialization_commands"][2]
    script = command.partition("sh -c ")[2]
    path = {"PATH": f"{folder}:/usr/bin:/bin"}
    subprocess.run(["sh", "-c", f"sh -c {script}"], cwd=folder, env=path, check=True, timeout=30)
    return (folder / "calls").read_text().splitlines()


def test_the_watch_waits_for_the_raylet_and_for_its_return(tmp_path: Path, prepared: dict[str, Any]) -> None:
    calls = watched(tmp_path, "00111" + "01" + "1", prepared)
    starts, runs, gone = ["sleep 10"] * 2, ["sleep 30"] * 2, ["sleep 300"]
    assert calls == [*starts, *runs, *gone, "sleep 30", "sleep 30", *gone, "shutdown -h now"]


def test_a_worker_that_outlives_its_head_ends_its_machine(cluster: dict[str, Any], prepared: dict[str, Any]) -> None:
    for name in WORKERS:
        commands = prepared["available_node_types"][name]["initialization_commands"]
        assert commands[:2] == prepared["initialization_commands"]
        assert "pgrep -x raylet" in commands[2]
        assert commands[2].endswith("shutdown -h now'")
        assert commands[2] == prepared["available_node_types"]["cpu"]["initialization_commands"][2]
        subprocess.run(["bash", "-n", "-c", commands[2]], check=True)
        node = cluster["available_node_types"][name]["node_config"]
        assert node["InstanceInitiatedShutdownBehavior"] == "terminate"
    head = cluster["available_node_types"]["head"]
    assert "initialization_commands" not in head, "the head stays until `ray down`"


# --- containers -------------------------------------------------------------------------------------------


def container(config: dict[str, Any], node_type: str) -> tuple[str, list[str]]:
    """Image and options of `docker run` on a machine of this type, as Ray's autoscaler puts them together."""
    docker = AutoscalingConfig(config, skip_content_hash=True).get_docker_config(node_type)
    role = "head" if node_type == config["head_node_type"] else "worker"
    return docker["image"], [*docker["run_options"], *docker.get(f"{role}_run_options", [])]


def environment(options: list[str]) -> dict[str, str]:
    pairs = [option.removeprefix("--env=").split("=", 1) for option in options if option.startswith("--env=")]
    return dict(pairs)


@pytest.mark.parametrize("node_type", TYPES)
def test_every_container_has_what_ray_needs_before_it_starts(prepared: dict[str, Any], node_type: str) -> None:
    image, options = container(prepared, node_type)
    (mount,) = content()["file_mounts"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{mount}/auth_token"}
    token |= {"HF_TOKEN_PATH": f"{mount}/hf_token"}
    local = {"CECA_CACHE": "/local/cache", "RAY_object_spilling_directory": "/local"}
    disk = local if "GPU" in content()["available_node_types"][node_type]["resources"] else {}
    assert environment(options) == {**ENVIRONMENT, **token, **disk, "RAY_LOGGER_LEVEL": "warning"}
    command = docker_start_cmds("ubuntu", image, {mount: ""}, "ceca", options, "ceca", "/home/ray", "docker")
    assert f" {mount} " in command.replace(f":{mount}", f": {mount}")
    assert "--net=host" in command, "one hop to the metadata service is enough only with the machine's own network"


def test_models_and_spilled_objects_are_on_the_machine_s_own_disk(prepared: dict[str, Any]) -> None:
    for name, node_type in prepared["available_node_types"].items():
        _, options = container(prepared, name)
        volumes = [option.removeprefix("--volume=") for option in options if option.startswith("--volume=")]
        if "GPU" not in node_type["resources"]:
            assert volumes == []
            continue
        (volume,) = volumes
        outside, inside = volume.split(":")
        assert environment(options)["CECA_CACHE"].startswith(f"{inside}/")
        assert environment(options)["RAY_object_spilling_directory"] == inside
        command = node_type["initialization_commands"][-1]
        assert command.endswith(f"sudo install -d -o 1000 -g 1000 {outside}"), "else Docker makes it, for root alone"
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_machines_with_a_gpu_have_the_image_and_the_option_for_it(prepared: dict[str, Any]) -> None:
    for name, node_type in prepared["available_node_types"].items():
        image, options = container(prepared, name)
        has_gpu = node_type["resources"].get("GPU", 0) > 0
        assert image.rpartition(":")[2].startswith("gpu-" if has_gpu else "cpu-")
        assert ("--gpus=all" in options) == has_gpu
    tags = {container(prepared, name)[0].partition("-")[2] for name in TYPES}
    assert len(tags) == 1, "images of different versions"


def test_the_dashboard_is_reached_through_ssh_alone(prepared: dict[str, Any]) -> None:
    starts = [*prepared["head_start_ray_commands"], *prepared["worker_start_ray_commands"]]
    assert sum("--dashboard-host=127.0.0.1" in command for command in starts) == 1
    assert not any("0.0.0.0" in command for command in starts)


def test_threads_are_ray_s_to_count(prepared: dict[str, Any]) -> None:
    """`ray up` exports OMP_NUM_THREADS=1, which workers would inherit."""
    for role in ("head", "worker"):
        (start,) = [command for command in prepared[f"{role}_start_ray_commands"] if "ray start" in command]
        assert start.startswith("env -u OMP_NUM_THREADS ray start")


# --- AWS --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node_type", TYPES)
def test_the_machine_that_is_asked_for(cluster: dict[str, Any], node_type: str) -> None:
    machine = launch(cluster, node_type)
    wanted = content()["available_node_types"][node_type]["node_config"]
    assert machine["InstanceType"] == wanted["InstanceType"]
    assert machine["ImageId"] == wanted["ImageId"]
    assert (machine.get("InstanceLifecycle") == "spot") == (node_type in SPOT)
    profile = "ceca-head" if node_type == "head" else "ceca-worker"
    assert machine["IamInstanceProfile"]["Arn"].endswith(f":instance-profile/{profile}")
    assert machine["MetadataOptions"]["HttpTokens"] == "required"
    assert machine["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
    tags = {tag["Key"]: tag["Value"] for tag in machine["Tags"]}
    assert tags["ray-cluster-name"] == "ceca"
    assert tags["ray-user-node-type"] == node_type
    ec2 = boto3.client("ec2", cluster["provider"]["region"])
    (device,) = machine["BlockDeviceMappings"]
    (volume,) = ec2.describe_volumes(VolumeIds=[device["Ebs"]["VolumeId"]])["Volumes"]
    assert device["DeviceName"] == "/dev/sda1"  # the root of Ubuntu's images
    assert volume["Encrypted"]
    assert volume["VolumeType"] == "gp3"
    has_gpu = "GPU" in cluster["available_node_types"][node_type]["resources"]
    assert volume["Size"] >= (300 if has_gpu else 200)


def ingress(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Rules of the one security group that all machines are in."""
    groups = {tuple(kind["node_config"]["SecurityGroupIds"]) for kind in config["available_node_types"].values()}
    ((group,),) = groups
    ec2 = boto3.client("ec2", config["provider"]["region"])
    return ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"][0]["IpPermissions"]


def test_from_outside_nothing_but_ssh_is_reached(cluster: dict[str, Any]) -> None:
    rules = ingress(cluster)
    open_to_others = [rule for rule in rules if rule.get("IpRanges") or rule.get("Ipv6Ranges")]
    assert [(rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in open_to_others] == [("tcp", 22, 22)]
    inside = [rule for rule in rules if rule not in open_to_others]
    assert all(rule["UserIdGroupPairs"] for rule in inside)


def test_a_group_made_before_with_ssh_from_one_address_stays_as_it_is(account: None) -> None:
    """As docs/aws.md makes it; in another region than the other tests' group."""
    config = content()
    config["provider"]["region"] = "eu-west-1"
    ec2 = boto3.client("ec2", "eu-west-1")
    (network,) = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    name = config["provider"]["security_group"]["GroupName"]
    group = ec2.create_security_group(GroupName=name, Description="-", VpcId=network["VpcId"])["GroupId"]
    within = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "192.0.2.7/32"}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[within, ssh])
    rules = ingress(AWSNodeProvider.bootstrap_config(prepare_config(config)))
    assert [reach["CidrIp"] for rule in rules for reach in rule["IpRanges"]] == ["192.0.2.7/32"]


def test_declared_resources_are_those_of_the_machines(cluster: dict[str, Any]) -> None:
    """Ray uses the file's numbers and not AWS's, so a wrong number would not be noticed."""
    undeclared = content()
    for node_type in undeclared["available_node_types"].values():
        node_type["resources"] = {}
    published = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(undeclared))
    for name in WORKERS:
        declared = content()["available_node_types"][name]["resources"]
        resources = published["available_node_types"][name]["resources"]
        assert declared == {key: resources[key] for key in ("CPU", "GPU") if key in resources}
    assert cluster["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_shared_memory_holds_ray_s_object_store(cluster: dict[str, Any], prepared: dict[str, Any]) -> None:
    ec2 = boto3.client("ec2", cluster["provider"]["region"])
    for name in TYPES:
        machine = prepared["available_node_types"][name]["node_config"]["InstanceType"]
        (published,) = ec2.describe_instance_types(InstanceTypes=[machine])["InstanceTypes"]
        memory = published["MemoryInfo"]["SizeInMiB"] / 1024
        (size,) = [option for option in container(prepared, name)[1] if option.startswith("--shm-size=")]
        assert OBJECT_STORE * memory < int(size.removeprefix("--shm-size=").removesuffix("g")) <= memory / 2


def test_the_head_hands_token_and_keys_on_to_workers(cluster: dict[str, Any]) -> None:
    provider = AWSNodeProvider(cluster["provider"], cluster["cluster_name"])
    _, written = _set_up_config_for_head_node(copy.deepcopy(cluster), provider, no_restart=False)
    remote = yaml.safe_load(Path(written.name).read_text())
    assert remote["file_mounts"] == {"/etc/ceca": "/etc/ceca"}
    validate_config(remote)


# --- docs/aws.md ------------------------------------------------------------------------------------------


def test_the_guide_s_policies_are_valid_and_name_the_same_things(account: None) -> None:
    blocks = re.findall(r"```json\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    trust, bucket, autoscaler = (json.loads(block) for block in blocks)
    iam = boto3.client("iam", "us-east-1")
    iam.create_role(RoleName="ceca-worker", AssumeRolePolicyDocument=json.dumps(trust))
    for name, policy in (("bucket", bucket), ("autoscaler", autoscaler)):
        iam.create_policy(PolicyName=name, PolicyDocument=json.dumps(policy))
    rules = {str(rule["Action"]): rule for rule in autoscaler["Statement"]}
    assert rules["iam:PassRole"]["Resource"].endswith(":role/ceca-worker")
    ending = rules["['ec2:TerminateInstances', 'ec2:CreateTags']"]["Condition"]["StringEquals"]
    assert ending == {"aws:ResourceTag/ray-cluster-name": content()["cluster_name"]}
    profiles = {
        kind["node_config"]["IamInstanceProfile"]["Name"] for kind in content()["available_node_types"].values()
    }
    assert profiles == set(re.findall(r"for role in (\S+) (\S+);", GUIDE.read_text())[0])


def test_the_guide_s_quotas_are_enough(cluster: dict[str, Any]) -> None:
    ec2 = boto3.client("ec2", cluster["provider"]["region"])
    needed: Counter[str] = Counter()
    for name, node_type in cluster["available_node_types"].items():
        machine = node_type["node_config"]["InstanceType"]
        (published,) = ec2.describe_instance_types(InstanceTypes=[machine])["InstanceTypes"]
        family = "G and VT" if "GpuInfo" in published else "Standard"
        quota = f"All {family} Spot Instance Requests" if name in SPOT else f"Running On-Demand {family} instances"
        needed[quota] += published["VCpuInfo"]["DefaultVCpus"] * max(1, node_type["max_workers"])
    rows = re.findall(r"^\| ((?:All|Running) [^|]*) \| .* \| (\d+) \|$", GUIDE.read_text(), re.MULTILINE)
    assert {quota: int(number) for quota, number in rows} == needed
