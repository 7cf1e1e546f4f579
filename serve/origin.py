"""Where a request comes from, as far as browsers say: pages of other sites must not use the service.

Any page can make its visitor's browser send requests to `http://127.0.0.1:8000`. A page can also come from a name that
later resolves to 127.0.0.1, so that the browser takes the service for the page's own host. Programs that are no
browsers send none of these headers but Host.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.datastructures import Headers

HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@/]+)(?::[0-9]{1,5})?")
PORTS = {"http": ":80", "https": ":443"}


def names_this_machine(headers: Headers) -> bool:
    """Whether the Host of a request is a loopback address or `localhost`."""
    hosts = headers.getlist("host")
    found = HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    return found is not None and is_loopback(found[1].strip("[]"))


def is_loopback(host: str) -> bool:
    """Whether a name or address, without a port, is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in ("localhost", "localhost.")


def of_another_site(headers: Headers) -> bool:
    """Whether a page of another site sent a request; also one of the same host and another port."""
    sites, origins, hosts = (headers.getlist(name) for name in ("sec-fetch-site", "origin", "host"))
    if any(site.strip().lower() not in ("same-origin", "none") for site in sites):
        return True
    return bool(origins) and not (len(origins) == len(hosts) == 1 and _same(origins[0], hosts[0]))


def _same(origin: str, host: str) -> bool:
    """Whether an Origin is the host of a request. TLS may end before the service, so the scheme does not matter."""
    scheme, _, place = origin.partition("://")
    port = PORTS.get(scheme, "")
    return bool(port and place) and place.lower().removesuffix(port) == host.lower().removesuffix(port)
