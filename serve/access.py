"""API keys with scopes and rate limits; tokens of an OIDC issuer beside them (serve/tokens.py).

The file of keys holds the SHA-256 of each key and not the key, so reading the file gives no access:

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
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import tyro
import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ceca.errors import UserError
from ceca.settings import check_name
from serve.sessions import Sessions

Scope = Literal["search", "write", "admin"]
OIDC = "oidc:"  # begins the names of token holders
BUCKETS = 10_000  # holders whose requests are counted at a time


@dataclass(frozen=True)
class Key:
    """One API key.

    Args:
        name: its owner.
        sha256: its SHA-256 in hex.
        scopes: what it gives access to.
        per_minute: limit of requests per minute.
    """

    name: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]
    per_minute: Annotated[int, Field(ge=1)] = 600


@dataclass(frozen=True)
class Holder:
    """The holder of a token of an OIDC issuer.

    Args:
        name: `oidc:` and what the issuer calls the holder.
        scopes: what the token gives access to.
        per_minute: limit of requests per minute.
    """

    name: str
    scopes: tuple[Scope, ...]
    per_minute: int


class InvalidToken(Exception):
    """A token is not accepted. Response: 401 with this message."""


class NoSigningKeys(Exception):
    """The keys that tokens are signed with are not known yet. Response: 503."""


class Identifies(Protocol):
    """Knows the holders of tokens (`serve.tokens.Tokens`)."""

    def holder(self, token: str) -> Holder: ...


def read_keys(path: Path) -> tuple[Key, ...]:
    """Read the keys of a file.

    Raises:
        UserError: the file cannot be read or is not valid. The message never contains a key.
    """
    try:
        content = yaml.safe_load(path.read_text())
        entries = content["keys"]
    except (OSError, ValueError, RecursionError, yaml.YAMLError, TypeError, KeyError) as error:
        # What YAML says of an error quotes the line, in which there may be a key.
        mark = getattr(error, "problem_mark", None)
        what = str(error) if isinstance(error, OSError | KeyError) else ""
        why = f"{type(error).__name__} {f'in line {mark.line + 1}' if mark else what}".strip()
        raise UserError(f"cannot read keys from {path}: {why}; see serve/access.py") from None
    try:
        keys = TypeAdapter(tuple[Key, ...]).validate_python(entries)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        raise UserError(f"{path}: {problems}") from None
    if len({key.name for key in keys}) < len(keys) or not keys:
        raise UserError(f"{path}: expected at least one key, each with a different name; found {len(keys)} keys")
    if any(key.name.startswith(OIDC) for key in keys):
        raise UserError(f"{path}: names that begin with {OIDC} are those of token holders; choose another name")
    return keys


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a key is not admitted.

    Args:
        status: HTTP status.
        detail: the reason, for the client.
        retry_after: seconds after which the client may try again.
        who: name of the key.
    """

    status: int
    detail: str
    retry_after: int | None = None
    who: str = "unknown"


class Gate:
    """Admits requests by their key, session or token, within its limit. Without keys and tokens it admits everybody.

    Each ingress replica has a token bucket per key, with its share of the key's limit.

    Args:
        keys: the API keys.
        replicas: number of ingress replicas that share each key's limit.
        clock: seconds, for tests.
        secret: signs sessions; all replicas need the same one. None is for a single replica.
        tokens: knows the holders of tokens; None accepts no tokens.
    """

    def __init__(
        self,
        keys: Sequence[Key],
        replicas: int = 1,
        clock: Any = time.monotonic,
        secret: bytes | None = None,
        tokens: Identifies | None = None,
    ):
        self.keys, self.replicas, self.clock, self.tokens = tuple(keys), replicas, clock, tokens
        self.sessions = Sessions(secret or secrets.token_bytes(32))
        self.buckets: dict[str, tuple[float, float]] = {}  # name → requests left, and when

    @property
    def closed(self) -> bool:
        """Whether requests need a key or a token."""
        return bool(self.keys) or self.tokens is not None

    def _size(self, key: Key | Holder) -> float:
        return max(1.0, key.per_minute / self.replicas)

    def admit(
        self, given: str | None, scope: Scope | None, *, session: str | None = None, take: bool = True
    ) -> Key | Holder | Refusal | None:
        """Check a key, a session or a token, and take one request from its limit.

        Args:
            given: the key or the token that the client sent.
            scope: the scope that the key needs; None admits any key.
            session: the session that the client sent; it counts if there is no key.
            take: false looks whether a request would be admitted, and takes nothing.

        Returns:
            The key or the holder of the token, or the refusal, or None if the service needs neither.
        """
        if not self.closed:
            return None
        if not given and not session:
            return Refusal(401, "a key is needed: Authorization: Bearer KEY")
        try:
            key = self._known(given) if given else self.sessions.key(session or "", self.keys)
        except InvalidToken as error:
            return Refusal(401, str(error))
        except NoSigningKeys:
            return Refusal(503, "the keys that tokens are signed with are not known yet", 1)
        if key is None:
            return Refusal(401, "this key is not known" if given else "this session has ended: give the key again")
        if scope is not None and scope not in key.scopes:
            detail = f"this key is for {', '.join(key.scopes) or 'nothing'}, and this needs {scope}"
            return Refusal(403, detail, who=key.name)
        wait = self._take(key, 1 if take else 0)
        if wait:
            return Refusal(429, f"this key may ask {key.per_minute} times a minute", wait, who=key.name)
        return key

    def _known(self, given: str) -> Key | Holder | None:
        if self.tokens is not None and given.count(".") == 2:  # keys have no dots
            return self.tokens.holder(given)
        digest = hashlib.sha256(given.encode()).hexdigest()
        # Compare every key, each in constant time, so that the duration reveals nothing.
        (*_, key) = [None, *(key for key in self.keys if hmac.compare_digest(key.sha256, digest))]
        return key

    def _take(self, key: Key | Holder, requests: int) -> int:
        """Take requests from a key's bucket. Returns the seconds to wait if the bucket is empty, else 0."""
        now, size = self.clock(), self._size(key)
        left, then = self.buckets.pop(key.name, (size, now))
        while len(self.buckets) >= BUCKETS:  # of the holders of tokens, whose number has no limit
            del self.buckets[next(iter(self.buckets))]  # the one that has asked for nothing the longest
        left = min(size, left + (now - then) * size / 60)
        if left < 1:
            self.buckets[key.name] = (left, now)
            return int((1 - left) * 60 / size) + 1
        self.buckets[key.name] = (left - requests, now)
        return 0


def main(argv: list[str] | None = None) -> None:
    """Make an API key and print its entry for the file of keys."""

    def make(
        name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help="owner of the key")],
        scopes: tuple[Scope, ...] = ("search",),
        per_minute: int = 600,
    ) -> None:
        key = secrets.token_urlsafe(32)
        entry = {
            "name": check_name(name),
            "sha256": hashlib.sha256(key.encode()).hexdigest(),
            "scopes": list(scopes),
            "per_minute": per_minute,
        }
        print(
            f"the key, shown this once: {key}", file=sys.stderr
        )  # on stderr, so that a file with the output does not hold it
        print(yaml.safe_dump({"keys": [entry]}, sort_keys=False), end="")

    try:
        tyro.cli(make, args=argv, prog="python -m serve.access", description="Make an API key.")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
