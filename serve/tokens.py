"""Tokens of an OpenID Connect issuer, beside API keys.

A file names the issuer, and says which scopes the values of a claim give:

    issuer: https://login.example.org/realms/people
    audience: ceca
    jwks: https://login.example.org/realms/people/protocol/openid-connect/certs
    claim: realm_access.roles
    scopes:
      ceca-search: [search]
      ceca-operator: [search, write, admin]

Notable: only signatures with a public key count (no `none`, no shared secrets), by the algorithm that the key names.
Signing keys are read in the background, and again when a token names an unknown one. A token is checked here alone: one
that the issuer withdraws is valid until it expires.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import httpx
import jwt
import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from ceca.environment import on_this_machine
from ceca.errors import UserError
from serve.access import OIDC, Holder, InvalidToken, NoSigningKeys, Scope

log = logging.getLogger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
LEEWAY_S = 30  # by which clocks may differ
REFRESH_S, AGAIN_S = 300.0, 10.0  # between two readings of the signing keys; and at least, if an unknown one is named
JWKS_LIMIT = 1024 * 1024  # bytes


@dataclass(frozen=True)
class Issuer:
    """The issuer whose tokens are accepted.

    Args:
        issuer: claim `iss` of its tokens.
        audience: claim `aud` of tokens for this service.
        jwks: URL or file of its public keys.
        claim: claim that gives scopes: a list, or words with spaces between them; a dot leads into a claim.
        scopes: value of this claim → scopes.
        name: claim that names the holder in the log.
        per_minute: limit of requests per minute of each holder.
    """

    issuer: Annotated[str, Field(min_length=1)]
    audience: Annotated[str, Field(min_length=1)]
    jwks: Annotated[str, Field(min_length=1)]
    scopes: Annotated[dict[str, tuple[Scope, ...]], Field(min_length=1)]
    claim: Annotated[str, Field(min_length=1)] = "scope"
    name: Annotated[str, Field(min_length=1)] = "sub"
    per_minute: Annotated[int, Field(ge=1)] = 600

    @field_validator("jwks")
    @classmethod
    def _not_over_plain_http(cls, place: str) -> str:
        if place.startswith("http://") and not on_this_machine(place):
            raise ValueError("whoever is on the way could replace keys that come over http://; use https://")
        return place


def read_issuer(path: Path) -> Issuer:
    """Read the file of an issuer.

    Raises:
        UserError: the file cannot be read or is not valid.
    """
    try:
        return TypeAdapter(Issuer).validate_python(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the OIDC issuer from {path}: {error}; see serve/tokens.py") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        raise UserError(f"{path}: {problems}") from None


class Tokens:
    """Knows the holders of an issuer's tokens.

    Args:
        issuer: whose tokens are accepted.
    """

    def __init__(self, issuer: Issuer):
        self.issuer = issuer
        self.keys: dict[str, jwt.PyJWK] = {}  # by their id
        self.unknown = asyncio.Event()  # a token named a key that is not here

    def holder(self, token: str) -> Holder:
        """The holder of a token.

        Raises:
            InvalidToken: the token is not valid here.
            NoSigningKeys: the issuer's keys have not been read yet.
        """
        if not self.keys:
            raise NoSigningKeys
        issuer = self.issuer
        try:
            key = self._key(jwt.get_unverified_header(token))
            claims = jwt.decode(
                token,
                key,
                algorithms=ALGORITHMS,
                audience=issuer.audience,
                issuer=issuer.issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud", issuer.name]},
            )
        except jwt.ExpiredSignatureError:
            raise InvalidToken("this token has expired") from None
        except jwt.InvalidAudienceError:
            raise InvalidToken("this token is for another audience") from None
        except jwt.InvalidIssuerError:
            raise InvalidToken("this token is of another issuer") from None
        except (jwt.PyJWTError, ValueError, TypeError):
            raise InvalidToken("this token is not valid") from None
        given = {scope for value in _values(claims, issuer.claim) for scope in issuer.scopes.get(value, ())}
        return Holder(f"{OIDC}{claims[issuer.name]}", tuple(sorted(given)), issuer.per_minute)

    def _key(self, header: Mapping[str, Any]) -> jwt.PyJWK:
        """The key that a token's header names; the only one if it names none."""
        name = header.get("kid")
        key = next(iter(self.keys.values())) if name is None and len(self.keys) == 1 else self.keys.get(str(name))
        if key is None:
            self.unknown.set()
            raise InvalidToken("this token is signed with an unknown key")
        if header.get("alg") != key.algorithm_name:
            raise InvalidToken("this token is not valid")
        return key

    async def keep(self) -> None:
        """Read the signing keys now and then, as long as the replica lives."""
        while True:
            try:
                await self.refresh()
            except Exception as error:  # the issuer may answer the next time; the earlier keys still count
                log.warning("cannot read the signing keys of %s: %s", self.issuer.issuer, error)
            await asyncio.sleep(AGAIN_S)
            try:
                async with asyncio.timeout(REFRESH_S if self.keys else 0):
                    await self.unknown.wait()
            except TimeoutError:
                pass
            self.unknown.clear()

    async def refresh(self) -> None:
        """Read the signing keys.

        Raises:
            ValueError: they are not a key set.
            OSError, httpx.HTTPError: they cannot be read.
        """
        place = self.issuer.jwks
        if place.startswith(("https://", "http://")):
            content = await _fetch(place)
        else:
            content = await asyncio.to_thread(Path(place).expanduser().read_bytes)
        found = {}
        for entry in json.loads(content)["keys"]:
            if entry.get("kty") == "oct" or entry.get("use", "sig") != "sig":
                continue  # a shared secret, or a key to encrypt with
            key = jwt.PyJWK(entry)
            if key.algorithm_name in ALGORITHMS:
                found[str(entry.get("kid"))] = key
        if not found:
            raise ValueError("there is no public key for signatures")
        self.keys = found


async def _fetch(url: str) -> bytes:
    """The content of a URL; no redirect is followed, and no more than the limit is read."""
    content = b""
    async with httpx.AsyncClient(timeout=10) as client, client.stream("GET", url) as answer:
        answer.raise_for_status()
        async for piece in answer.aiter_bytes():
            content += piece
            if len(content) > JWKS_LIMIT:
                raise ValueError(f"more than {JWKS_LIMIT} bytes")
    return content


def _values(claims: Mapping[str, Any], name: str) -> list[str]:
    """Values of a claim. A name with a dot is looked up as it is, and then as a way into a claim."""
    value: Any = claims.get(name)
    if value is None:
        value = claims
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, str):
        return value.split()
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []
