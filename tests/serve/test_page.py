"""The page in a real browser."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from playwright.sync_api import Browser, Page, expect

from ceca.data.changes import arrival_id
from tests.serve.conftest import TOP_K_LIMIT, Changing, Running
from tests.serve.dataset import QUERY, draw_person

LOADED = "document.images.length > 0 && [...document.images].every(image => image.complete && image.naturalWidth)"


def wait_until(page: Page, expression: str, value: object = True) -> None:
    """By asking again: the page's own policy forbids to evaluate strings in it, which Playwright would do to wait."""
    deadline = time.monotonic() + 10
    while (found := page.evaluate(expression)) != value:
        assert time.monotonic() < deadline, f"{expression} is {found}"
        time.sleep(0.05)


SHOWN = "[...document.querySelectorAll('#grid .picture')].map(found => found.closest('.card').dataset.image)"


def open_page(url: str, browser: Browser) -> Page:
    page = browser.new_page(viewport={"width": 1280, "height": 2000})
    page.goto(url)
    return page


def ask(page: Page, query: str) -> None:
    page.get_by_label("Description of the person").fill(query)
    page.get_by_role("button", name="Search", exact=True).click()


def test_a_person_searches_with_the_page(running: Running, browser: Browser) -> None:
    page, problems = browser.new_page(viewport={"width": 1200, "height": 2000}), []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(running.url)
    expect(page.get_by_text("16 images")).to_be_visible()
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    page.keyboard.type(QUERY)
    page.keyboard.press("Enter")
    cards = page.locator("#grid .card")
    expect(cards).to_have_count(10)
    expect(page.locator("#status")).to_contain_text("10 images, best first")
    wait_until(page, LOADED)
    expected = [hit.identity for hit in running.searcher.search(QUERY, omega=0.3, top_k=10)]
    shown = "[...document.querySelectorAll('#grid .card')].map(card => Number(card.dataset.identity))"
    assert page.evaluate(shown) == expected

    page.locator("#omega").fill("1")
    local = [hit.identity for hit in running.searcher.search(QUERY, omega=1.0, top_k=10)]
    wait_until(page, shown, local)
    cards.first.locator("summary").click()
    expect(cards.first.locator("details p")).to_contain_text("A person in a")
    page.go_back()  # to the empty search
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert not problems


def test_the_page_asks_for_the_key_that_a_service_needs(running: Running, browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 2000})
    page.goto(f"{running.url}/closed/")
    page.get_by_role("button", name="red").first.click()
    page.get_by_label("Key").fill("guessed")
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_text("This key is not known")).to_be_visible()
    page.get_by_label("Key").fill(running.keys["portal"])
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#grid .card")).to_have_count(10)
    wait_until(page, LOADED)
    page.get_by_role("button", name="Log out").click()
    expect(page.locator("#grid .card")).to_have_count(0)
    page.get_by_role("button", name="red").first.click()
    expect(page.get_by_label("Key")).to_be_visible()


def test_the_page_explains_filters_and_holds_a_conversation(running: Running, browser: Browser) -> None:
    page = open_page(running.url, browser)
    ask(page, QUERY)
    card = page.locator("#grid .card").first
    card.get_by_role("button", name="Why?").click()
    words = card.locator(".why .words > span")
    expect(words).to_have_count(len(QUERY.split()))
    image_id = card.get_attribute("data-image")
    explained = running.client.post("/v1/explain", json={"query": QUERY, "image_id": image_id}).json()
    expected = explained["words"][3]
    shown = rf"{expected['word']}: [+−-]?{abs(expected['contribution']):.3f}"
    assert re.search(shown, words.nth(3).get_attribute("title") or "")
    expect(card.locator(".why .sentences li").first).to_contain_text("A person in a")

    page.get_by_role("button", name="Filters").click()
    page.get_by_label("c1", exact=True).check(force=True)
    cameras = {hit["image_id"] for hit in running.search(query=QUERY, top_k=12, where={"camera": ["c1"]})["hits"]}
    wait_until(page, "document.querySelectorAll('#grid .picture').length", len(cameras))
    assert {element.get_attribute("data-image") for element in page.locator("#grid .card").all()} == cameras
    page.get_by_role("button", name="Remove camera: c1").click()
    expect(page.locator("#grid .card")).to_have_count(10)

    page.get_by_label("From (UTC)").fill("2026-03-02T09:00")
    page.get_by_label("From (UTC)").dispatch_event("change")
    where = {"time": ["2026-03-02T09:00.."]}
    later = {hit["image_id"] for hit in running.search(query=QUERY, top_k=TOP_K_LIMIT, where=where)["hits"]}
    wait_until(page, "document.querySelectorAll('#grid .picture').length", min(len(later), 10))
    assert page.evaluate("location.hash").endswith("where.time=2026-03-02T09%3A00..")
    page.get_by_role("button", name="Remove time: 2026-03-02T09:00..").click()
    assert page.get_by_label("From (UTC)").input_value() == ""
    expect(page.locator("#grid .card")).to_have_count(10)

    page.get_by_role("button", name="Help me narrow it down").click()
    answer = page.locator("#talk .answers button").first
    expect(page.locator("#talk .question")).to_contain_text("What colour are the clothes on the upper body?")
    colour = answer.inner_text().split()[0]
    answer.click()
    expect(page.get_by_role("button", name=f"Remove upper colour: {colour}")).to_be_visible()
    told = running.search(query=QUERY, top_k=10, answers={"upper_colour": colour})["hits"]
    wait_until(page, SHOWN, [hit["image_id"] for hit in told])
    expect(page.get_by_text("No further question would help")).to_be_visible()

    page.get_by_role("button", name="More results").click()
    wait_until(page, "document.querySelectorAll('#grid .picture').length", TOP_K_LIMIT)
    page.locator("#grid .card").nth(2).get_by_role("button", name="More like this").click()
    like = {"image_id": told[2]["image_id"], "top_k": 10}
    alike = running.client.post("/v1/search/like", json=like).json()["hits"]
    assert alike[0]["image_id"] == told[2]["image_id"]
    wait_until(page, SHOWN, [hit["image_id"] for hit in alike])


def test_a_search_by_image_is_filtered(running: Running, browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "person.png").write_bytes(picture := draw_person(3))
    page = open_page(running.url, browser)
    page.get_by_label("Search by image").set_input_files(tmp_path / "person.png")
    expect(page.locator("#grid .card")).to_have_count(10)
    page.get_by_role("button", name="Filters").click()
    page.get_by_label("c1", exact=True).check(force=True)
    headers, where = {"Content-Type": "image/png"}, json.dumps({"camera": ["c1"]})
    found = running.client.post("/v1/search/image", params={"where": where}, content=picture, headers=headers).json()
    assert 1 < len(found["hits"]) < 10
    wait_until(page, SHOWN, [hit["image_id"] for hit in found["hits"]])
    page.get_by_role("button", name="Remove camera: c1").click()
    expect(page.locator("#grid .card")).to_have_count(10)


def test_an_image_is_added_shown_and_deleted_with_the_page(
    running: Running, changing: Changing, browser: Browser, tmp_path: Path
) -> None:
    (tmp_path / "gold.png").write_bytes(picture := draw_person(40))
    page = open_page(f"{running.url}/closed/", browser)
    ask(page, QUERY)
    page.get_by_label("Key").fill(running.keys["both"])
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#grid .card")).to_have_count(10)
    page.get_by_role("button", name="Add an image").click()
    page.locator("#add").get_by_label("Image").first.set_input_files(tmp_path / "gold.png")
    page.locator("#add").get_by_label("What the person looks like").fill("A person in gold & <b>silver</b>.")
    page.get_by_role("button", name="Add to the gallery").click()
    expect(page.locator("#added li")).to_contain_text("is searchable.", timeout=20_000)
    page.get_by_role("button", name="Show it").click()
    card = page.locator("#grid .card").first
    image_id = arrival_id(picture)
    wait_until(page, "document.querySelector('#grid .card').dataset.image", image_id)
    card.locator("summary").click()
    expect(card.locator("details p")).to_have_text("A person in gold & <b>silver</b>.")
    card.get_by_role("button", name="Delete").click()
    card.get_by_role("button", name="Keep").click()
    card.get_by_role("button", name="Delete").click()
    card.locator(".confirm").get_by_role("button", name="Delete").click()
    expect(page.locator("#status")).to_contain_text("erased everywhere", timeout=20_000)
    assert page.locator(f"[data-image='{image_id}']").count() == 0
    assert changing.client.get(f"/v1/images/{image_id}").status_code == 404


def test_page_needs_nothing_from_elsewhere(running: Running) -> None:
    response = running.client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    page = "".join(running.client.get(f"/{name}").text for name in ("", "page.js", "page.css"))
    assert not re.search(r"https?:|src\s*=\s*[\"']?//|@import|url\(|innerHTML|{{", page)
    assert f'data-top-k-limit="{TOP_K_LIMIT}"' in page
    assert running.client.get("/docs").status_code == 404  # FastAPI's own pages load scripts from elsewhere
