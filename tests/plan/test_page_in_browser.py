"""The page in a real browser: no errors, nothing wider than the window, folds and search by keyboard, both colour schemes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import autotp
from tests.plan.test_page import HOSTILE, QUOTES
from tests.support.families import transformer

#: As root, without a sandbox of its own; nothing looks for updates.
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = autotp.plan(transformer("mixtral", num_hidden_layers=3), tp=3, check="graph")
    other = autotp.plan(transformer("mixtral", num_hidden_layers=3), tp=2, check="graph")
    found = tmp_path_factory.mktemp("page") / "page.html"
    found.write_text(replace(plan, notes=(HOSTILE, QUOTES)).to_html(against={"tp=2": other}), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=list(FLAGS))
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any, file: Path) -> Iterator[Any]:
    """Opens the page in a window; afterwards nothing was said on the console, and nothing was asked from elsewhere."""
    contexts, said, asked = [], [], []

    def open_page(width: int = 1100, scheme: str = "light", text: str | None = None) -> Any:
        contexts.append(browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800}))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        if text is None:
            page.goto(file.as_uri())
        else:
            page.set_content(text)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == [] and set(asked) <= {file.as_uri()}


def too_wide(page: Any) -> list[str]:
    """Elements that reach out of the window, but for what scrolls by itself."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll('body *')].filter((e) => !e.closest('.scroll') &&
        e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map((e) => e.outerHTML.slice(0, 80))"""
    )
    return found


@pytest.mark.parametrize("width", [360, 768, 1100])
def test_nothing_is_wider_than_the_window(opened: Any, width: int) -> None:
    page = opened(width)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    assert too_wide(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_content("<p style='width: 2000px'>a control</p>")
    assert len(too_wide(page)) == 1


def test_dark_and_light(opened: Any) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    light, dark = opened().evaluate(colour), opened(scheme="dark").evaluate(colour)
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(20, 24, 28)")


def test_folds_open_by_keyboard(opened: Any) -> None:
    page = opened()
    focused = "document.activeElement.parentElement.className + '|' + document.activeElement.innerText"
    for _ in range(30):
        page.keyboard.press("Tab")
        if "input_layernorm.weight" in page.evaluate(focused):
            break
    assert page.evaluate(focused).startswith("leaf whole|")
    reason = page.locator("details.leaf.whole p", has_text="it carries the width of the model").first
    assert not reason.is_visible()
    page.keyboard.press("Enter")
    assert reason.is_visible()
    page.keyboard.press("Enter")
    assert not reason.is_visible()


def test_search_and_reasons(opened: Any) -> None:
    page = opened()
    rows = page.locator("#parameters tbody tr")
    everything = rows.count()
    page.get_by_label("Search").fill("row-parallel o_proj")
    shown = [row.inner_text() for row in rows.all() if row.is_visible()]
    assert len(shown) == 1 and "self_attn.o_proj.weight" in shown[0]
    assert page.locator("#count").inner_text() == f"1 of {everything} rows"
    page.get_by_label("Search").fill("")
    assert all(row.is_visible() for row in rows.all())
    page.locator("#parameters a").first.click()
    assert page.locator("#reason-1").evaluate("e => e.open")


def test_only_the_script_of_the_page_runs(browser: Any, file: Path) -> None:
    """A control: a script that was put into the page is refused by its policy, and the console says so."""
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.set_content(file.read_text(encoding="utf-8").replace("</body>", "<script>document.title = 'run'</script></body>"))
    assert page.title() != "run" and any("Content Security Policy" in text for text in said)
    page.close()
