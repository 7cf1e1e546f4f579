"""Environment variables: the one module that reads this project's own, each described in `VARIABLES`.

docs/environment.md lists them for users; a test compares that list with `VARIABLES`.

Variables of other programs are read or set where that program is used:

    AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL     read in ceca/data/store.py; s3fs reads the other AWS_* variables itself
    AWS_*                                     passed on to Ray workers in jobs/runtime/ray_session.py, set in
                                              cluster/object_store.py
    RAY_JOB_CONFIG_JSON_ENV_VAR               read here and in jobs/runtime/ray_session.py; set by `ray job submit`
    RAY_ADDRESS                               read here, set in cluster/local.py
    RAY_TMPDIR, TMPDIR, RAY_USE_TLS           read here
    RAY_AUTH_TOKEN                            set here where Ray cannot keep a token in the home folder
    RAY_TRAIN_*, PYTHONWARNINGS               set in jobs/runtime/ray_session.py and jobs/train.py
    RAY_SERVE_*                               set in serve/proxy.py, cluster/local.py and cluster/kubernetes
    RAY_*, AUTOSCALER_*                       of a local cluster: set in cluster/local.py
    VLLM_CPU_KVCACHE_SPACE, VLLM_LOGGING_LEVEL, VLLM_NO_USAGE_STATS, VLLM_RPC_BASE_PATH, TORCHINDUCTOR_CACHE_DIR
                                              set in ceca/dialogue/vllm.py before vLLM is imported
    TORCH_FORCE_(NO_)WEIGHTS_ONLY_LOAD        set in ceca/training/engine.py while a checkpoint is loaded
    TORCH_EXTENSIONS_DIR                      set in ceca/training/engine.py while an operation is compiled
    DS_ACCELERATOR                            set in jobs/training/worker.py before DeepSpeed is imported
    WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME     read in jobs/training/watch.py
    OPENAI_API_KEY                            read in ceca/dialogue/openai.py; a setting can name another variable
    http_proxy, https_proxy, all_proxy, no_proxy
                                              read here, httpx and botocore read them themselves
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import socket
import stat
import tempfile
import urllib.request
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

from ceca.errors import UserError

Number = TypeVar("Number", int, float)

VARIABLES = {
    "CECA_CACHE": "Folder on this machine for files that can be made again: gallery shards, fetched dialogue models, "
    "compiled operations. Default: ~/.cache/ceca.",
    "CECA_LEASE_SILENT_S": "Seconds without a beat after which the holder of a name counts as dead. Must be the same "
    "on all machines. Default: 60.",
    "CECA_DECLARED_GPUS": "Set by `ceca cluster up --gpus`: nodes only declare GPUs, and workers compute on CPUs.",
    "CECA_LOCAL_CLUSTER": "Set by `ceca cluster up` in its processes: the cluster's mark, by which `ceca cluster down` "
    "finds them.",
}

RAY_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set in processes that `ray job submit` started


SOCKET_FOLDER = 40  # most bytes of a folder for Unix sockets: a socket's path has 107, and Ray adds up to 64
ANSWER_S = 5.0  # longest wait for an answer at an address


def cache_folder(*names: str) -> Path:
    """A folder of this user below `CECA_CACHE`, made if it is missing.

    An empty variable counts as not set. If the home folder is missing or cannot be written, the default is below the
    temporary folder. Where others can write too, the folder is below one of this user alone.

    Args:
        names: folders below the cache.

    Raises:
        UserError: the folder cannot be made, or somebody else can write into it.
    """
    given = os.environ.get("CECA_CACHE")
    try:
        cache = Path(given).expanduser() if given else Path(Path.home(), ".cache", "ceca")
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = cache.stat()
        if others_write(found):
            cache = own_folder(cache / _own_name(), "CECA_CACHE")
        folder = cache.joinpath(*names)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} cannot be written")
    except (OSError, RuntimeError, UserError) as error:  # RuntimeError: there is no home folder
        if given:
            raise UserError(f"CECA_CACHE={given!r} cannot be used ({error}); name another folder") from None
        return temporary_folder(*names)
    return folder


def temporary_folder(*names: str) -> Path:
    """A folder of this user alone below the temporary folder, made if it is missing; whoever puts files there removes
    them.

    Args:
        names: folders below it.

    Raises:
        UserError: it cannot be made, or it is not this user's alone.
    """
    return _temporary_folder(_temporary_place(), *names)


def socket_folder(name: str) -> Path:
    """A temporary folder whose path is short enough for Unix sockets; arguments and errors as in `temporary_folder`."""
    places = [place for place in (_temporary_place(), Path("/tmp")) if os.access(place, os.W_OK)]
    for place in places:
        if len(os.fsencode(place / _own_name() / name)) <= SOCKET_FOLDER:
            return _temporary_folder(place, name)
    raise UserError(
        f"TMPDIR={str(places[0])!r} is too long for Unix sockets, whose paths have at most 107 bytes, and /tmp cannot "
        "be written; set TMPDIR to a shorter folder"
    )


def ray_folder() -> str:
    """Folder for the files of a Ray that this process starts, whose owner alone can enter it; `RAY_TMPDIR` is stronger.

    Raises:
        UserError: there is no such folder.
    """
    given = os.environ.get("RAY_TMPDIR")
    if not given:
        return str(socket_folder("ray"))
    folder = Path(given, "ray")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"RAY_TMPDIR={given!r} cannot be used: {error}") from None
    if len(os.fsencode(folder)) > SOCKET_FOLDER or not os.access(folder, os.W_OK):
        raise UserError(
            f"RAY_TMPDIR={given!r} cannot be used: it cannot be written, or is longer than {SOCKET_FOLDER - 4} bytes, "
            "which is too long for Unix sockets"
        )
    return str(folder)


def hand_token_to_ray() -> None:
    """Draw the token of a Ray that this process starts, if Ray cannot keep one in the home folder (~/.ray)."""
    if any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(mode=0o700, exist_ok=True)
        kept = os.access(folder / "auth_token", os.R_OK) or os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        kept = False
    if not kept:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _temporary_place() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise UserError(f"{error.strerror}; set TMPDIR to a folder that you can write") from None


def _own_name() -> str:
    return f"ceca-{os.getuid()}"


def _temporary_folder(place: Path, *names: str) -> Path:
    folder = own_folder(place / _own_name(), "TMPDIR").joinpath(*names)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def others_write(found: os.stat_result) -> bool:
    """Whether a file or folder is another user's, or others may write to it."""
    return found.st_uid != os.getuid() or bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def own_folder(folder: Path, variable: str) -> Path:
    """Make a folder that only this user can enter, or check that it is one. Its parent may be open to everybody.

    Args:
        folder: the folder.
        variable: environment variable that can name another place, for the error.

    Raises:
        UserError: it cannot be made, it is a link or another user's, or others can enter it.
    """
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise UserError(f"cannot make {folder} ({error.strerror}); set {variable} to another folder") from None
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or others_write(found):
        raise UserError(
            f"{folder} is not a folder of this user alone: it is a link, another user's, or others can write into it; "
            f"remove it, or set {variable} to another folder"
        )
    folder.chmod(0o700)
    return folder


def ray_address() -> str:
    """Address of the cluster that RAY_ADDRESS names; empty if a command starts Ray itself.

    Ray would wait four minutes for an address at which nothing answers.

    Raises:
        UserError: it is no address, or no cluster answers there.
    """
    given = os.environ.get("RAY_ADDRESS", "").strip()
    if given in ("", "local"):
        return ""
    if given == "auto":
        address = started_here()
        if not address:
            raise UserError(
                "RAY_ADDRESS=auto, and no cluster that you began with `ray start` answers on this machine; start one, "
                "name its HOST:PORT, or unset RAY_ADDRESS"
            )
        return address
    if "://" in given:
        raise UserError(
            f"RAY_ADDRESS={given!r} is a URL, and a command joins a cluster at HOST:PORT (6379 unless another port was "
            "chosen); a dashboard's URL is for `ray job submit`"
        )
    problem = _problem_at(given)
    if problem:
        raise UserError(f"no cluster answers at RAY_ADDRESS={given!r} ({problem}); correct it, or unset it")
    return given


def cannot_join(address: str, error: BaseException) -> UserError:
    """The error of a cluster that answers and does not let this process join.

    Args:
        address: the cluster's.
        error: what Ray raised. The reason is among its causes.
    """
    reasons = [str(error)]
    while error.__cause__ is not None:
        error = error.__cause__
        reasons.append(str(error))
    if any("InvalidAuthToken" in reason or "Unauthenticated" in reason for reason in reasons):
        reason = (
            "it wants its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN unless it is in "
            "~/.ray/auth_token"
        )
    else:
        reason = " ".join(reasons[0].split())
    return UserError(f"cannot join the cluster at RAY_ADDRESS={address}: {reason}")


def started_here() -> str:
    """Address of the cluster that this user's `ray start` left on this machine; empty if none answers.

    Ray keeps the address of a killed cluster, and in a folder that is open to everybody.
    """
    place = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    file = Path(place, "ray", "ray_current_cluster")
    try:
        if os.lstat(file).st_uid not in (0, os.getuid()):
            return ""
        address = file.read_text().strip()
    except (OSError, ValueError):
        return ""
    return "" if _problem_at(address) else address


def _problem_at(address: str) -> str:
    """Why no cluster answers at an address; empty if one does."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        return "expected HOST:PORT"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):
                # A cluster speaks HTTP/2: both sides begin with a frame of settings, whose type is 4.
                connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
                if connection.recv(4)[3:] != b"\x04":
                    return "another program listens there"
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def lease_silent_s() -> float:
    """Seconds without a beat after which the holder of a name counts as dead.

    Raises:
        UserError: the variable is not a positive, finite number.
    """
    value = os.environ.get("CECA_LEASE_SILENT_S") or "60"
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"CECA_LEASE_SILENT_S must be a positive number of seconds, found {value!r}")
    return seconds


def usable_gpus(gpus: Number) -> Number:
    """Number of GPUs that a worker computes on: `gpus`, or 0 if a local cluster only declares its GPUs.

    Declared GPUs let Ray place work as on a real GPU cluster (cluster/local.py).
    """
    return 0 if os.environ.get("CECA_DECLARED_GPUS") else gpus


def ray_job_id() -> str:
    """Submission id of the Ray job that started this process; empty if none did."""
    job = json.loads(os.environ.get(RAY_JOB_CONFIG, "{}"))
    return job.get("metadata", {}).get("job_submission_id", "")


class Proxy(NamedTuple):
    """A proxy of the environment: the variable that names it, and its address without a password."""

    variable: str
    address: str


def on_this_machine(url: str) -> bool:
    """Whether a URL is of this machine, so that no proxy may stand before it."""
    try:
        host = (urlsplit(url).hostname or "").rstrip(".")
        if host == "localhost" or host.endswith(".localhost"):
            return True
        address = ipaddress.ip_address(host)
        address = getattr(address, "ipv4_mapped", None) or address
        return address.is_loopback or address.is_unspecified
    except ValueError:  # a name, or no URL
        return False


def find_proxy(url: str) -> Proxy | None:
    """The proxy that the environment names for a URL; None if there is none, or `no_proxy` names the host."""
    scheme, _, rest = url.partition("://")
    proxies = urllib.request.getproxies()
    scheme = scheme if scheme in proxies else "all"
    if scheme not in proxies or urllib.request.proxy_bypass(rest.partition("/")[0].rpartition("@")[2]):
        return None
    kind, _, host = proxies[scheme].rpartition("@")
    address = f"{kind.partition('://')[0]}://***@{host}" if kind else host
    name = f"{scheme}_proxy"
    return Proxy(name if os.environ.get(name) else name.upper(), address)
