"""Who may ask: API keys with scopes, a limit of each, and a log of what was asked.

A file names the SHA-256 of each key and not the key, so that reading it opens nothing:

    keys:
      - name: portal
        sha256: 5e88…
        scopes: [search]
        per_minute: 600

`python -m serve.access portal --scopes search` makes a key, shows it on the terminal and prints its entry for the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import logging
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ceca.errors import UserError

Scope = Literal["search", "write", "admin"]
AUDIT = logging.getLogger("ceca.audit")


@dataclass(frozen=True)
class Key:
    """One key: whose it is, its SHA-256 in hex, what it is for, and how many requests a minute it may make."""

    name: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]
    per_minute: Annotated[int, Field(ge=1)] = 600


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file.

    Raises:
        UserError: it cannot be read, or something in it is not valid; never says what a key is.
    """
    try:
        content = yaml.safe_load(path.read_text())
        entries = content["keys"]
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise UserError(f"cannot read keys from {path}: {type(error).__name__}: {error}; see serve/access.py") from None
    try:
        keys = TypeAdapter(tuple[Key, ...]).validate_python(entries)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors())
        raise UserError(f"{path}: {problems}") from None
    if len({key.name for key in keys}) < len(keys) or not keys:
        raise UserError(f"{path}: every key needs a name of its own, and there must be one; found {len(keys)}")
    return keys


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a request is not answered: HTTP status, what to tell, after how many seconds to come again, and whose key."""

    status: int
    detail: str
    retry_after: int | None = None
    who: str = "unknown"


class Gate:
    """Lets requests with a key through, at most so many a minute; without keys everybody, for this machine alone.

    A bucket per key and per ingress replica: `replicas` share a key's limit between them.
    """

    def __init__(self, keys: Sequence[Key], replicas: int = 1, clock: Any = time.monotonic):
        self.keys, self.replicas, self.clock = tuple(keys), replicas, clock
        self.buckets = {key.name: (self._size(key), clock()) for key in self.keys}

    def _size(self, key: Key) -> float:
        return max(1.0, key.per_minute / self.replicas)

    def admit(self, given: str | None, scope: Scope | None) -> Key | Refusal | None:
        """The key, a refusal, or None where there are no keys at all. Scope None: any key."""
        if not self.keys:
            return None
        if not given:
            return Refusal(401, "a key is needed: Authorization: Bearer KEY")
        digest = hashlib.sha256(given.encode()).hexdigest()
        # Every key is compared, each in constant time: how long it takes tells nothing.
        (*_, found) = [None, *(key for key in self.keys if hmac.compare_digest(key.sha256, digest))]
        if found is None:
            return Refusal(401, "this key is not known")
        if scope is not None and scope not in found.scopes:
            detail = f"this key is for {', '.join(found.scopes)}, and this needs {scope}"
            return Refusal(403, detail, who=found.name)
        left, then = self.buckets[found.name]
        now, size = self.clock(), self._size(found)
        left = min(size, left + (now - then) * size / 60)
        if left < 1:
            self.buckets[found.name] = (left, now)
            wait = int((1 - left) * 60 / size) + 1
            return Refusal(429, f"this key may ask {found.per_minute} times a minute", wait, who=found.name)
        self.buckets[found.name] = (left - 1, now)
        return found


def audit(who: str, action: str, status: int, **facts: Any) -> None:
    """A line of JSON in the log `ceca.audit`. Words that were searched for are given as their hash, never as such."""
    AUDIT.info(
        json.dumps(
            {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "who": who,
                "action": action,
                "status": status,
                **facts,
            }
        )
    )


def hashed(query: str | bytes) -> str:
    return hashlib.sha256(query if isinstance(query, bytes) else query.encode()).hexdigest()[:16]


def main(argv: list[str] | None = None) -> None:
    def make(
        name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help="whose key it is")],
        scopes: tuple[Scope, ...] = ("search",),
        per_minute: int = 600,
    ) -> None:
        key = secrets.token_urlsafe(32)
        entry = {
            "name": name,
            "sha256": hashlib.sha256(key.encode()).hexdigest(),
            "scopes": list(scopes),
            "per_minute": per_minute,
        }
        print(f"the key, shown this once: {key}", file=sys.stderr)  # so that a file of the rest does not hold it
        print(yaml.safe_dump({"keys": [entry]}, sort_keys=False), end="")

    tyro.cli(make, args=argv, prog="python -m serve.access", description="Make an API key.")


if __name__ == "__main__":
    main()
