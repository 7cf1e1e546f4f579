"""What Ray's proxies and the ingress replicas agree on about requests and answers. Imports nothing: proxies load it."""

from __future__ import annotations

from collections.abc import Iterable

INGRESS = "CecaIngress"  # the deployment that answers HTTP
BODY_LIMIT = 64 * 1024  # bytes of a body that is no image; the longest query is a few thousand
ASK = "ceca.ask"  # extension of a request's scope: answer only whether it would be let in
ADMITTED = b"ceca-admitted"  # header of that answer
# Header of every answer to a proxy, which takes it out: seconds in which a replica answers or says that it cannot.
TIME_LIMIT = b"ceca-time-limit"
# Headers of every answer that does not set them itself. A browser keeps none, takes none for another type than it is,
# and shows none in pages of other sites.
HEADERS = {
    b"cache-control": b"no-store",
    b"x-content-type-options": b"nosniff",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"no-referrer",
}


def with_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers of an answer, with those of `HEADERS` that it does not have."""
    own = list(headers)
    names = {name.lower() for name, _ in own}
    return own + [(name, value) for name, value in HEADERS.items() if name not in names]
