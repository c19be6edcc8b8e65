"""The report as Chromium shows it: nothing loaded, nothing complained of, legible in light, in dark and on a phone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from optpass.export import report
from tests.export import pages

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")

LEAST = 4.5
"""Contrast of text that WCAG 2 asks for at level AA."""

CONTRASTS = """() => {
  const channels = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, a = 1] = channels(getComputedStyle(at).backgroundColor);
      if (a > 0) return [r, g, b];
    }
    return [255, 255, 255];
  };
  document.querySelectorAll("details").forEach(details => details.open = true);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, style = getComputedStyle(element);
    // the counts in the pictures lie on an image, with an outline of their own
    if (!walker.currentNode.data.trim() || element.closest(".patches") || element.closest("style")) continue;
    const text = channels(element.closest("svg") ? style.fill : style.color), page = behind(element);
    const [high, low] = [light(text), light(page)].sort((a, b) => b - a);
    found.push([(high + 0.05) / (low + 0.05), walker.currentNode.data.trim().slice(0, 40)]);
  }
  return found;
}"""

FIELDS = """() => [...document.querySelectorAll("[data-field]")].map(
  e => [e.dataset.field, e.dataset.value, e.textContent])"""


OPEN = "document.querySelectorAll('details').forEach(d => d.open = true)"
REACH = """[...document.querySelectorAll("body *:not(.wide *)")].map(
  e => [e.getBoundingClientRect().right, e.tagName])"""
SMALLEST = """Math.min(...[...document.querySelectorAll("main p, main td, main figcaption")].map(
  e => parseFloat(getComputedStyle(e).fontSize)))"""
CAPTIONED = """[...document.querySelectorAll("table")].every(
  table => table.caption && table.caption.textContent.trim())"""
DRAWN = """[...document.querySelectorAll("svg[role=img]")].filter(e => e.checkVisibility()).map(
  e => [e.getBoundingClientRect().width, e.getBoundingClientRect().height])"""
DECODED = """Promise.all([...document.querySelectorAll("image")].map(e => {
  const image = new Image();
  image.src = e.getAttribute("href");
  return image.decode().then(() => [image.naturalWidth, image.naturalHeight]);
}))"""


@pytest.fixture(scope="module")
def page_file(reported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.report(reported, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def shown(browser: Any, page_file: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page in a fresh profile; on its way out, that it said and asked for nothing."""
    width, scheme = getattr(request, "param", (1200, "light"))
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda failed: said.append(failed.url))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    yield page
    context.close()
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {page_file.as_uri()}


def test_figures_are_those_of_the_manifest(shown: Any, reported: Path) -> None:
    manifest = json.loads((reported / "manifest.json").read_text())
    fields = shown.evaluate(FIELDS)
    own = [(path, value, text) for path, value, text in fields if path.partition(".")[0] in manifest]
    assert len(own) > 150
    for path, value, text in own:
        expected = pages.at(manifest, path)
        assert value == ("" if expected is None else str(expected)), path
        assert text.strip()


@pytest.mark.parametrize("shown", [(1200, "light"), (1200, "dark")], indirect=True, ids=["light", "dark"])
def test_text_has_contrast(shown: Any) -> None:
    found = shown.evaluate(CONTRASTS)
    assert len(found) > 200
    assert [pair for pair in found if pair[0] < LEAST] == []


def test_dark_is_not_light(browser: Any, page_file: Path) -> None:
    colours = []
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(page_file.as_uri())
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.close()
    assert colours[0] != colours[1]


@pytest.mark.parametrize("shown", [(360, "light")], indirect=True)
def test_a_phone_scrolls_tables_and_not_the_page(shown: Any) -> None:
    shown.evaluate(OPEN)
    assert shown.evaluate("document.documentElement.scrollWidth") <= 360
    assert [pair for pair in shown.evaluate(REACH) if pair[0] > 360.5] == []
    assert shown.evaluate(SMALLEST) >= 13


def test_what_reads_pages_aloud_finds_names(shown: Any) -> None:
    assert shown.evaluate(CAPTIONED)
    assert shown.locator("main h2").count() == 8
    drawings = shown.get_by_role("img").all()
    assert len(drawings) > 6
    assert all(drawing.get_attribute("aria-label") for drawing in drawings)


def test_charts_and_pictures_are_drawn(shown: Any) -> None:
    shown.evaluate(OPEN)
    sizes = shown.evaluate(DRAWN)
    assert len(sizes) > 6
    assert all(width > 80 and height > 40 for width, height in sizes)
    assert shown.evaluate(DECODED) == [[16, 16], [16, 16]]
