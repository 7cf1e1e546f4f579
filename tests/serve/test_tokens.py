"""Tokens of an OIDC issuer: what they open, and which are refused."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from starlette.testclient import TestClient

from ceca.config import ServeConfig
from ceca.data.store import Store
from ceca.errors import UserError
from serve.access import Gate, InvalidToken, Refusal
from serve.api import make_api
from serve.app import build
from serve.tokens import Issuer, Tokens, read_issuer
from tests.serve.dataset import QUERY
from tests.serve.inside import InProcess

KEY, OTHER = (rsa.generate_private_key(65537, 2048) for _ in range(2))
CURVE = ec.generate_private_key(ec.SECP256R1())
SCOPES = {"ceca-search": ["search"], "ceca-loader": ["write"], "ceca-operator": ["search", "write", "admin"]}
ISSUER: dict[str, Any] = {
    "issuer": "https://login.example.org",
    "audience": "ceca",
    "claim": "realm_access.roles",
    "scopes": SCOPES,
}


def public(key: Any, name: str, algorithm: str) -> dict[str, Any]:
    method = jwt.algorithms.get_default_algorithms()[algorithm]
    return {**json.loads(method.to_jwk(key.public_key())), "kid": name, "alg": algorithm, "use": "sig"}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """An issuer with two signing keys, and a shared secret that must not count."""
    shared = {"kty": "oct", "kid": "shared", "alg": "HS256", "k": base64.urlsafe_b64encode(b"s" * 32).decode()}
    keys = [public(KEY, "first", "RS256"), public(CURVE, "second", "ES256"), shared]
    file = tmp_path_factory.mktemp("issuer") / "jwks.json"
    file.write_text(json.dumps({"keys": keys}))
    made = Tokens(Issuer(**ISSUER, jwks=str(file)))
    asyncio.run(made.refresh())
    return made


def claims(*roles: str, **changed: Any) -> dict[str, Any]:
    now = int(time.time())
    given = {"iss": ISSUER["issuer"], "aud": "ceca", "sub": "ada", "iat": now, "exp": now + 600}
    return {**given, "realm_access": {"roles": list(roles)}, **changed}


def signed(*roles: str, key: Any = KEY, name: str = "first", algorithm: str = "RS256", **changed: Any) -> str:
    held = {name: value for name, value in claims(*roles, **changed).items() if value is not None}
    return jwt.encode(held, key, algorithm, headers={"kid": name})


@pytest.fixture(scope="module")
def client(people: Store, tokens: Tokens) -> TestClient:
    service = InProcess(people, ServeConfig(), ())
    service.gate = Gate((), tokens=tokens)
    return TestClient(make_api(service, ServeConfig(), service.gate), "http://people.example")


def asked(client: TestClient, token: str) -> dict[str, int]:
    """Status of a request of each scope."""
    headers = {"Authorization": f"Bearer {token}"}
    return {
        "search": client.post("/v1/search", json={"query": QUERY}, headers=headers).status_code,
        "write": client.get("/v1/jobs/add-0123456789abcdef", headers=headers).status_code,
        "admin": client.get("/v1/status", headers=headers).status_code,
    }


@pytest.mark.parametrize(
    ("roles", "opened"),
    [
        (["ceca-search"], {"search"}),
        (["ceca-loader"], {"write"}),
        (["ceca-loader", "ceca-search", "baker"], {"search", "write"}),
        (["ceca-operator"], {"search", "write", "admin"}),
        (["baker"], set()),
        ([], set()),
    ],
)
def test_a_token_opens_what_its_claim_gives_and_nothing_else(
    client: TestClient, roles: list[str], opened: set[str]
) -> None:
    statuses = asked(client, signed(*roles))
    assert {scope for scope, status in statuses.items() if status != 403} == opened
    assert 401 not in statuses.values()


def test_each_signing_key_counts(client: TestClient) -> None:
    assert asked(client, signed("ceca-search", key=CURVE, name="second", algorithm="ES256"))["search"] == 200


def altered(token: str) -> str:
    """The same token with the claims of an operator."""
    head, _, signature = token.split(".")
    body = base64.urlsafe_b64encode(json.dumps(claims("ceca-operator")).encode()).decode().rstrip("=")
    return f"{head}.{body}.{signature}"


PEM = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
PAST = int(time.time()) - 600


def by_hand(algorithm: str, secret: bytes) -> str:
    """A token whose signature is a shared secret's; PyJWT refuses to sign with a public key."""
    import hashlib
    import hmac

    parts = [{"alg": algorithm, "kid": "first", "typ": "JWT"}, claims("ceca-operator")]
    text = ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
    signature = hmac.new(secret, text.encode(), hashlib.sha256).digest()
    return f"{text}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(signed("ceca-operator", exp=PAST), id="expired"),
        pytest.param(signed("ceca-operator", exp=None), id="for ever"),
        pytest.param(signed("ceca-operator", nbf=int(time.time()) + 600), id="not yet"),
        pytest.param(signed("ceca-operator", aud="another"), id="wrong audience"),
        pytest.param(signed("ceca-operator", aud=None), id="no audience"),
        pytest.param(signed("ceca-operator", iss="https://login.example.com"), id="another issuer"),
        pytest.param(signed("ceca-operator", sub=None), id="nobody"),
        pytest.param(jwt.encode(claims("ceca-operator"), None, "none", headers={"kid": "first"}), id="alg none"),
        pytest.param(signed("ceca-operator", key=OTHER), id="swapped key"),
        pytest.param(signed("ceca-operator", key=OTHER, name="third"), id="unknown key"),
        pytest.param(signed("ceca-operator", name="second"), id="name of another key"),
        pytest.param(signed("ceca-operator", algorithm="PS256"), id="another algorithm than the key's"),
        pytest.param(by_hand("HS256", PEM), id="public key as a shared secret"),
        pytest.param(signed("ceca-operator", key="s" * 32, name="shared", algorithm="HS256"), id="shared secret"),
        pytest.param(altered(signed("ceca-search")), id="altered claims"),
        pytest.param("a.b.c", id="no token"),
        pytest.param("..", id="nothing"),
    ],
)
def test_any_other_token_is_401(client: TestClient, token: str) -> None:
    assert set(asked(client, token).values()) == {401}


def test_a_token_begins_no_session(client: TestClient) -> None:
    answer = client.post("/v1/session", json={"key": signed("ceca-search")})
    assert answer.status_code == 422
    assert "set-cookie" not in answer.headers


def test_the_log_names_the_holder_and_each_has_a_limit_of_its_own(tokens: Tokens) -> None:
    limited = Tokens(Issuer(**ISSUER, jwks="-", per_minute=2))
    limited.keys = tokens.keys
    gate = Gate((), clock=lambda: 0.0, tokens=limited)
    ada, bob = signed("ceca-search"), signed("ceca-search", sub="bob")
    answers = [gate.admit(token, "search") for token in (ada, ada, ada, bob)]
    assert [getattr(answer, "name", "429") for answer in answers] == ["oidc:ada", "oidc:ada", "429", "oidc:bob"]
    assert isinstance(answers[2], Refusal)
    assert answers[2].who == "oidc:ada"


def test_before_the_signing_keys_are_read_it_is_503_and_not_401() -> None:
    refusal = Gate((), tokens=Tokens(Issuer(**ISSUER, jwks="-"))).admit(signed("ceca-search"), "search")
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.retry_after) == (503, 1)


def test_a_key_that_is_new_at_the_issuer_counts_after_the_next_reading(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    made = Tokens(Issuer(**ISSUER, jwks=str(file)))
    for key, name in ((KEY, "first"), (OTHER, "third")):
        file.write_text(json.dumps({"keys": [public(key, name, "RS256")]}))
        asyncio.run(made.refresh())
        assert made.holder(signed("ceca-search", key=key, name=name)).scopes == ("search",)
    with pytest.raises(InvalidToken, match="unknown key"):
        made.holder(signed("ceca-search"))
    assert made.unknown.is_set(), "so the keys are read again soon"


@pytest.mark.parametrize(
    "content", ["{}", '{"keys": []}', '{"keys": [{"kty": "oct", "k": "czE", "alg": "HS256"}]}', "-"]
)
def test_a_key_set_without_public_keys_replaces_nothing(tmp_path: Path, tokens: Tokens, content: str) -> None:
    made = Tokens(Issuer(**ISSUER, jwks=str(tmp_path / "jwks.json")))
    made.keys = tokens.keys
    (tmp_path / "jwks.json").write_text(content)
    with pytest.raises((ValueError, KeyError)):
        asyncio.run(made.refresh())
    assert made.keys is tokens.keys


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"jwks": "http://login.example.org/keys"}, "https"),
        ({"scopes": {"ceca-search": ["everything"]}}, "scopes"),
        ({"scopes": {}}, "scopes"),
        ({"audience": ""}, "audience"),
    ],
)
def test_an_issuer_s_file_that_is_not_right_is_refused(tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    file = tmp_path / "oidc.yaml"
    file.write_text(json.dumps({**ISSUER, "jwks": "https://login.example.org/keys"} | changed))
    with pytest.raises(UserError, match=says):
        read_issuer(file)


def test_the_service_starts_with_an_issuer_alone(people: Store, tmp_path: Path) -> None:
    file = tmp_path / "oidc.yaml"
    file.write_text(json.dumps({**ISSUER, "jwks": "https://login.example.org/keys"}))
    assert build({"data": people.uri, "oidc": str(file)})
    with pytest.raises(UserError, match="oidc=FILE"):
        build({"data": people.uri})
