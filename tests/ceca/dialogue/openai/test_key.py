"""The key goes to the endpoint alone, and requests go past or through the proxy that the environment names."""

import http.server
import logging
import threading
from collections.abc import Iterator

import pytest

from ceca.config import OpenAIConfig
from ceca.dialogue.conversation import DialogueError, EngineError
from ceca.dialogue.openai import OpenAIEngine
from tests.ceca.dialogue.openai.conftest import KEY, ask, make, refusal

# --- the key ----------------------------------------------------------------------------------------------


def test_the_key_comes_from_the_named_variable(endpoint, monkeypatch):
    monkeypatch.setenv("MY_KEY", f"{KEY}-mine\n")
    ask(make(endpoint, api_key_variable="MY_KEY"))
    assert endpoint.keys == [f"Bearer {KEY}-mine"]


def test_a_key_is_optional(endpoint, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    ask(make(endpoint))
    assert endpoint.keys == [None]


@pytest.mark.parametrize("status", [400, 401, 500])
def test_the_key_is_in_no_message_even_if_the_endpoint_repeats_it(endpoint, caplog, status):
    endpoint.replies = [refusal(status, f"bad key {KEY}")]
    with caplog.at_level(logging.DEBUG), pytest.raises((DialogueError, EngineError)) as caught:
        ask(make(endpoint, retries=0))
    assert "bad key ***" in str(caught.value)
    assert KEY not in str(caught.value) + caplog.text
    assert caught.value.__cause__ is None


def test_an_invalid_key_is_refused_without_repeating_it(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}…")
    with pytest.raises(EngineError, match=r"\$OPENAI_API_KEY") as caught:
        ask(make(endpoint))
    assert KEY not in str(caught.value)


# --- proxies ----------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Targets of the requests that reach the proxy of this environment."""
    reached: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            reached.append(self.path)
            self.send_error(502)

        do_GET = do_POST
        do_CONNECT = do_POST

        def log_message(self, *_: object) -> None: ...

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://me:secret@127.0.0.1:{listening.server_port}")
    yield reached
    listening.shutdown()


def test_an_endpoint_on_this_machine_is_asked_past_the_proxy(endpoint, proxy, monkeypatch):
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
    port = endpoint.url.split(":")[-1]
    for host in ("127.0.0.1", "localhost", "127.0.0.2"):
        endpoint.url = f"http://{host}:{port}"
        if host != "127.0.0.2":  # nothing listens there
            assert ask(make(endpoint)).text == "a man"
        else:
            with pytest.raises(EngineError, match="nothing answers"):
                ask(make(endpoint))
    endpoint.url = f"http://127.0.0.1:{port}"
    assert proxy == []


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_an_error_names_the_proxy_without_its_password(proxy, caplog, scheme):
    engine = OpenAIEngine(OpenAIConfig(base_url=f"{scheme}://models.example/v1", model="m", retries=0), 0.0, 0)
    with pytest.raises(
        EngineError, match=rf"through the proxy http://\*\*\*@127\.0\.0\.1:\d+ of \${scheme}_proxy"
    ) as caught:
        ask(engine)
    assert proxy
    assert "pictures go to" in caplog.text
    assert "secret" not in str(caught.value) + caplog.text


def test_a_proxy_that_cannot_be_used_is_one_error(monkeypatch):
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
    engine = OpenAIEngine(OpenAIConfig(base_url="http://models.example/v1", model="m"), 0.0, 0)
    with pytest.raises(EngineError, match=r"through the proxy socks5://127\.0\.0\.1:9 of \$all_proxy"):
        ask(engine)
