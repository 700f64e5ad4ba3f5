"""The page in a real browser: Debian's Chromium, driven by playwright; at two sizes, light and dark, and printed."""

from __future__ import annotations

import json
import math
import shutil

import pytest

import inspect_model
from tests.inspection.test_page import CHROMIUM
from tests.makers.models import save_durably, started

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}

OVER = """() => [...document.querySelectorAll("body *")]
  .filter((e) => !e.closest(".scroll") && !e.closest("svg") && e.getBoundingClientRect().right > innerWidth + 1)
  .map((e) => e.tagName + " " + e.textContent.slice(0, 40))"""

UNREACHED = """() => [...document.querySelectorAll("summary, input, button, .scroll")]
  .filter((e) => !e.hidden && e.tabIndex < 0).map((e) => e.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started_one:
        made = started_one.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """The page of a model with a log of 3,000 steps, and that of a folder with it twice."""
    root = tmp_path_factory.mktemp("root")
    made, model, optimizer = started(root / "models")
    save_durably(made, model, optimizer, step=3000, metrics={"val_loss": 2.5})
    made.close()
    with (root / "models/dante/metrics.jsonl").open("w") as log:
        for step in range(1, 3001):
            loss = 2 + 3 / math.sqrt(step)
            log.write(json.dumps({"step": step, "loss": loss, "learning_rate": 1e-3 / step}) + "\n")
            if step % 100 == 0:
                log.write(json.dumps({"step": step, "val_loss": loss + 0.1}) + "\n")
    shutil.copytree(root / "models/dante", root / "models/again")
    assert inspect_model.main([str(root / "models/dante"), "--html", str(root / "one.html")]) == 0
    assert inspect_model.main([str(root / "models"), "--html", str(root / "all.html")]) == 0
    return root


def opened(browser, file, size, scheme="light"):
    """A page, and what it wrote to the console and asked for."""
    page = browser.new_page(viewport=size, color_scheme=scheme)
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url))
    page.goto(file.as_uri())
    return page, said


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "all"])
def test_nothing_overflows_or_is_asked_for_or_complains(browser, page_file, name, size, scheme):
    file = page_file / f"{name}.html"
    page, said = opened(browser, file, size, scheme)
    assert said == [file.as_uri()]
    assert page.evaluate(OVER) == []
    assert page.evaluate("() => document.documentElement.scrollWidth") <= size["width"]
    for summary in page.query_selector_all("details:not([open]) > summary"):
        summary.evaluate("(e) => { e.parentElement.open = true; }")
    assert page.evaluate(OVER) == []
    page.close()


def test_the_page_loads_within_three_tenths_of_a_second(browser, page_file):
    times = []
    for _ in range(5):
        page, _ = opened(browser, page_file / "one.html", WIDE)
        times.append(page.evaluate("() => performance.getEntriesByType('navigation')[0].loadEventEnd"))
        page.close()
    assert 0 < min(times) < 300


def test_the_keyboard_reaches_everything_and_reads_the_curve(browser, page_file):
    page, _ = opened(browser, page_file / "one.html", WIDE)
    assert page.evaluate(UNREACHED) == []
    page.focus("#at")
    page.keyboard.press("Home")
    assert page.inner_text("#here").startswith("step 1: train loss 5.0")
    page.keyboard.press("End")
    said = page.inner_text("#here")
    assert said.startswith("step 3,000: train loss 2.05") and "validation loss 2.15" in said
    page.focus("summary:has-text('Evaluations')")
    page.keyboard.press("Enter")
    assert page.is_visible("td:has-text('2.1548')")
    page.focus("th button >> nth=3")
    page.keyboard.press("Enter")
    sizes = [int(cell.replace(",", "")) for cell in page.locator("#tensors tbody td:nth-child(4)").all_inner_texts()]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) > 10
    page.fill("#search", "ln_f")
    assert page.locator("#tensors tbody tr").count() == 2
    assert page.inner_text("time").endswith("ago)")
    page.close()


def test_print_cuts_nothing(browser, page_file, tmp_path):
    page, _ = opened(browser, page_file / "one.html", {"width": 700, "height": 1000}, "dark")
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("() => dispatchEvent(new Event('beforeprint'))")
    cut = "() => [...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth + 1).length"
    assert page.evaluate(cut) == 0 and page.evaluate(OVER) == []
    assert page.evaluate("() => getComputedStyle(document.body).color") == "rgb(28, 35, 48)"  # dark on white
    assert page.evaluate("() => [...document.querySelectorAll('#histograms details')].every((e) => e.open)")
    assert page.pdf(path=tmp_path / "page.pdf").count(b"/Type /Page\n") <= 12
    page.close()
