"""API keys: what a gate lets through, how often, and a file of keys that is not right."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from ceca.errors import UserError
from serve.access import Gate, Key, Refusal, main, read_keys


def key(name: str, **settings: object) -> Key:
    values = {"scopes": ("search",), "sha256": hashlib.sha256(name.encode()).hexdigest(), **settings}
    return Key(name=name, **values)  # type: ignore[arg-type]


def test_a_bucket_empties_with_requests_and_fills_with_time():
    now = [0.0]
    gate = Gate([key("a", per_minute=3), key("b")], clock=lambda: now[0])
    assert [getattr(gate.admit("a", "search"), "name", 429) for _ in range(4)] == ["a", "a", "a", 429]
    refusal = gate.admit("a", "search")
    assert isinstance(refusal, Refusal)
    assert refusal.retry_after == 21  # a third of a minute, rounded up
    assert isinstance(gate.admit("b", "search"), Key)
    now[0] = float(refusal.retry_after)
    assert isinstance(gate.admit("a", "search"), Key)
    assert isinstance(gate.admit("a", "search"), Refusal)


def test_replicas_share_a_limit():
    gate = Gate([key("a", per_minute=10)], replicas=5, clock=lambda: 0.0)
    assert [isinstance(gate.admit("a", "search"), Key) for _ in range(3)] == [True, True, False]


def test_without_keys_everybody_is_let_in_and_with_keys_nobody_without():
    assert Gate([]).admit(None, "search") is None
    for given, status in ((None, 401), ("", 401), ("nobody", 401), ("a", 403)):
        refusal = Gate([key("a")]).admit(given, "write")
        assert isinstance(refusal, Refusal)
        assert refusal.status == status


DIGEST = "ab" * 32


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("keys: []", "expected at least one key"),
        ("[]", "cannot read keys"),
        ("keys: [{name: a, sha256: secret, scopes: [search]}]", "sha256"),
        (f"keys: [{{name: a, sha256: {DIGEST}, scopes: [everything]}}]", "scopes"),
        ("keys:\n" + 2 * f"- {{name: a, sha256: {DIGEST}, scopes: [search]}}\n", "each with a different name"),
    ],
)
def test_a_file_that_is_not_right_is_refused_without_saying_a_key(tmp_path: Path, content: str, says: str):
    (tmp_path / "keys.yaml").write_text(content)
    with pytest.raises(UserError, match=says) as refused:
        read_keys(tmp_path / "keys.yaml")
    assert "secret" not in str(refused.value)


def test_the_command_makes_a_key_that_its_entry_admits(tmp_path: Path, capsys: pytest.CaptureFixture):
    main(["portal", "--scopes", "search", "write"])
    printed = capsys.readouterr()
    (tmp_path / "keys.yaml").write_text(printed.out)
    keys = read_keys(tmp_path / "keys.yaml")
    secret = printed.err.strip().rpartition(" ")[2]
    assert secret not in printed.out
    assert isinstance(Gate(keys).admit(secret, "write"), Key)


@pytest.mark.parametrize(
    "content",
    [
        b"keys:\n- {name: a, sha256: the-secret, scopes: [search]\n",
        b"keys:\n- name: a\n  sha256: the-secret: x\n",
        b"the-secret",
        b"\xff\xfet\0h\0e\0",
        b"[" * 5000,
    ],
    ids=range(5),
)
def test_a_file_that_is_no_yaml_is_refused_without_a_line_of_it(tmp_path: Path, content: bytes):
    (tmp_path / "keys.yaml").write_bytes(content)
    with pytest.raises(UserError, match="cannot read keys from") as refused:
        read_keys(tmp_path / "keys.yaml")
    assert "the-secret" not in str(refused.value)
