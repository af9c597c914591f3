"""The page in a real browser, at the widths of a phone and of a desk; needs chromium and playwright."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from lamella.lab.report import TokenLayer, TokenText, write_report

pytestmark = pytest.mark.heavy

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
DESK = {"viewport": {"width": 1280, "height": 900}}
HOSTILE = [
    "</script><script>window.hacked=1</script>",
    "<img src=http://x.invalid/ onerror=window.hacked=2>",
    "\"'`${window.hacked=3}",
    "\u2028\u2029",
    "\u202eright to left",
    "مرحبا",
    "x" * 1000,
    "",
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    executable = shutil.which("chromium")
    assert executable, "install chromium (apt-get install chromium)"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=executable)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Opens a report; at the end the page must have said nothing on the console and asked for nothing but itself."""
    opened = []

    def go(report, device):
        path = write_report(report, tmp_path / "report.html")
        page = browser.new_context(**device).new_page()
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        opened.append((page, said, asked, path.as_uri()))
        return page

    yield go
    assert opened
    for page, said, asked, address in opened:
        assert said == []
        assert asked == [address]
        page.context.close()


def tip(page):
    """The tooltip's words, None where it is hidden."""
    return (
        " ".join(page.locator("#token-tip").inner_text().split()) if page.locator("#token-tip").is_visible() else None
    )


def fits(page):
    """Whether the page is no wider than the window, tooltip included."""
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


@pytest.mark.parametrize("device", [PHONE, DESK], ids=["390", "1280"])
def test_layers_are_switched_and_weights_read(full_report, visit, device):
    page = visit(full_report, device)
    assert page.evaluate("innerWidth") == device["viewport"]["width"]
    assert fits(page)
    token = page.locator(".token").first
    token.hover()
    assert tip(page) == "where layer 0 expert 0 75.0 % expert 1 25.0 %"
    before = token.evaluate("token => getComputedStyle(token).backgroundColor")
    page.select_option("#token-layer", label="layer 1")
    assert tip(page) == "where layer 1 expert 2 70.0 % expert 1 20.0 % expert 0 10.0 %"
    assert token.get_attribute("data-expert") == "2"
    assert token.evaluate("token => getComputedStyle(token).backgroundColor") != before
    assert page.locator("#token-legend li").count() == 3
    assert page.locator("#token-words").inner_text().startswith("layer 1: Expert")
    assert fits(page)
    page.mouse.move(0, 0)
    assert tip(page) is None
    page.click("#token-before")
    assert page.locator("#token-legend li").count() == 2
    assert page.locator("#token-before").is_disabled()


def test_the_keyboard_walks_over_the_tokens(full_report, visit):
    page = visit(full_report, DESK)
    page.focus("#token-numbers")
    page.keyboard.press("Tab")
    assert tip(page).startswith("where layer 0")
    page.keyboard.press("ArrowRight")
    assert tip(page) == "is layer 0 expert 1 100.0 % 1 other: 0.0 %"
    focused = page.locator(".token:focus")
    assert focused.get_attribute("aria-describedby") == "token-tip"
    assert focused.get_attribute("aria-selected") == "true"
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    assert tip(page).startswith("is ")
    page.keyboard.press("Escape")
    assert tip(page) is None
    page.keyboard.press("Tab")  # the next text is one stop away
    assert tip(page).startswith("who ")
    page.keyboard.press("Shift+Tab")  # back to the token that was left
    assert tip(page).startswith("is ")
    assert page.locator(".tokens [aria-selected]").count() == 2


def test_arrows_go_to_the_line_above_and_below(report, visit):
    words = ["word"] * 1000
    text = TokenText("long", words, [TokenLayer("layer 0", 2, [[1.0, 0.0]] * len(words))])
    page = visit(replace(report, texts=[text]), DESK)
    place = """() => {
        const both = [document.activeElement, document.querySelector(".token")];
        const [at, first] = both.map(token => token.getBoundingClientRect());
        return [Math.round(at.left - first.left), Math.round(at.top - first.top)];
    }"""
    page.locator(".token").nth(3).click()
    places = [page.evaluate(place)]
    for key in ("ArrowDown", "ArrowDown", "ArrowUp"):
        page.keyboard.press(key)
        places.append(page.evaluate(place))
    (left, top), once, twice, back = places
    assert once[0] == twice[0] == left
    assert top < once[1] < twice[1]
    assert back == once


def test_a_tap_shows_the_weights_and_they_stay(full_report, visit):
    page = visit(full_report, PHONE)
    page.locator(".token").nth(1).tap()
    assert tip(page) == "is layer 0 expert 1 100.0 % 1 other: 0.0 %"
    box = page.locator("#token-tip").bounding_box()
    assert 0 <= box["x"] <= box["x"] + box["width"] <= 390
    page.locator("#token-words").tap()
    assert tip(page) is None


@pytest.mark.parametrize("device", [PHONE, DESK], ids=["390", "1280"])
def test_the_weights_are_shown_inside_the_page_wherever_the_token_is(report, visit, device):
    rows = np.full((60, 8), 0.125)
    page = visit(replace(report, texts=[TokenText("text", ["word"] * 60, [TokenLayer("layer 0", 8, rows)])]), device)
    for number in range(60):
        page.locator(".token").nth(number).hover()
        box = page.locator("#token-tip").bounding_box()
        assert 0 <= box["x"] <= box["x"] + box["width"] <= device["viewport"]["width"]
    assert fits(page)


def test_numbers_can_be_switched_off(full_report, visit):
    page = visit(full_report, DESK)
    number = "token => getComputedStyle(token, '::after').content"
    assert "attr" in page.locator(".token").first.evaluate(number) or '"0"' in page.locator(".token").first.evaluate(
        number
    )
    page.uncheck("#token-numbers")
    assert page.locator(".token").first.evaluate(number) == "none"


@pytest.mark.parametrize("device", [PHONE, DESK], ids=["390", "1280"])
def test_hostile_text_stays_inert(report, visit, device):
    weights = np.eye(9)[: len(HOSTILE)]
    title = "".join(HOSTILE[:3]) + "\u202e"
    text = TokenText(title, HOSTILE, [TokenLayer(f"layer {title}", 9, weights)])
    page = visit(replace(report, title=title, texts=[text]), device)
    shown = page.locator(".token").all_text_contents()
    assert shown == [*HOSTILE[:6], "x" * 200 + "…", ""]
    for number in range(6):
        page.locator(".token").nth(number).hover()
        assert tip(page) is not None
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    assert fits(page)


def test_right_to_left_text_runs_to_the_left_and_so_do_its_arrows(report, visit):
    text = TokenText("Arabic", ["مرحبا", "بالعالم"], [TokenLayer("layer 0", 2, [[1.0, 0.0]] * 2)])
    page = visit(replace(report, texts=[text]), DESK)
    first, second = (page.locator(".token").nth(at).bounding_box() for at in range(2))
    assert first["x"] > second["x"]
    page.locator(".token").first.click()
    page.keyboard.press("ArrowLeft")
    assert page.locator(".token:focus").text_content() == "بالعالم"


def test_ten_thousand_tokens_are_all_there_and_laid_out_only_in_sight(report, visit):
    words = ["word"] * 10_000
    text = TokenText("long", words, [TokenLayer("layer 0", 8, np.eye(8)[np.arange(10_000) % 8])])
    page = visit(replace(report, texts=[text]), DESK)
    assert page.locator(".token").count() == 10_000
    assert page.locator(".run").count() == 25
    page.locator(".token").first.click()
    page.keyboard.press("End")
    assert page.locator(".token:focus").get_attribute("data-expert") == str(9_999 % 8)
    assert page.locator(".token:focus").bounding_box()["y"] < 900
    assert fits(page)


def test_a_page_without_texts_needs_no_script(report, visit):
    page = visit(report, PHONE)
    assert page.locator("script").count() == 0
    assert fits(page)
