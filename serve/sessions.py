"""Sessions of browsers: a cookie with a random number that stands for a key, for some hours.

A session is signed, so every ingress replica knows it without asking another. The secret is made when the service is
deployed, and is in no file: whoever reads the file of keys cannot make a session. A deployment ends all sessions.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

SESSION_S = 8 * 3600  # a working day
COOKIE = "ceca_session"
PORT = re.compile(r":(\d{1,5})$")


class Named(Protocol):
    """A key; only its name matters here."""

    @property
    def name(self) -> str: ...


K = TypeVar("K", bound=Named)


class Sessions:
    """Makes sessions, knows them again, and ends them.

    Args:
        secret: signs sessions; all replicas have the same one.
        clock: seconds since 1970, for tests.
    """

    def __init__(self, secret: bytes, clock: Any = time.time):
        self.secret, self.clock = secret, clock
        self.ended: dict[str, int] = {}  # sessions that were ended early, and when they would have ended

    def begin(self, name: str) -> str:
        """A new session of the key with this name."""
        number, end = secrets.token_urlsafe(16), int(self.clock()) + SESSION_S
        return f"{number}.{end}.{self._sign(number, end, name)}"

    def key(self, session: str, keys: Sequence[K]) -> K | None:
        """The key that a session stands for; None if it has ended or is not ours."""
        number, _, rest = session.partition(".")
        digits, _, signature = rest.partition(".")
        if not re.fullmatch("[0-9]{1,12}", digits) or int(digits) <= self.clock() or number in self.ended:
            return None
        # Compare every key, each in constant time, so that the duration reveals nothing.
        given, end = signature.encode(errors="replace"), int(digits)
        (*_, key) = [
            None,
            *(key for key in keys if hmac.compare_digest(self._sign(number, end, key.name).encode(), given)),
        ]
        return key

    def end(self, session: str) -> None:
        """End a session that `key` knows."""
        number, _, rest = session.partition(".")
        self.ended[number] = int(rest.partition(".")[0])

    def merge(self, ended: Mapping[str, int]) -> dict[str, int]:
        """Take over what another replica knows to have ended. Returns all that have, but those that are over anyway."""
        now = self.clock()
        self.ended = {number: end for number, end in {**self.ended, **ended}.items() if end > now}
        return self.ended

    def _sign(self, number: str, end: int, name: str) -> str:
        return hmac.new(self.secret, f"{number}.{end}.{name}".encode(), hashlib.sha256).hexdigest()


def cookie_name(host: str) -> str:
    """The cookie's name. Browsers send a cookie to every port of a host, so each port has a name of its own.

    Args:
        host: the request's Host header.
    """
    port = PORT.search(host)
    return f"{COOKIE}_{port[1]}" if port else COOKIE
