"""The chat page in a real browser, on a machine that may be busy: every step waits for what it needs to see.

Screenshots are left in pytest's temporary folder.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from symphony_vlm.serving import gradio_app
from symphony_vlm.serving.chat import ChatSession

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
BUBBLE = {"user": "#chat .user.message", "bot": "#chat .bot.message"}
TIMEOUT_MS = 40_000


@pytest.fixture(scope="module")
def url(tiny_model_folder: Path) -> Iterator[str]:
    app = gradio_app.launch(str(tiny_model_folder), port=0, block=False)
    yield app.local_url
    app.close(verbose=False)


@pytest.fixture(scope="module")
def url_of_two(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page on which two models answer (with the same weights, which the page does not know)."""
    other = tmp_path_factory.mktemp("other") / "baseline"
    shutil.copytree(tiny_model_folder, other)
    app = gradio_app.launch(str(other), str(tiny_model_folder), port=0, block=False)
    yield app.local_url
    app.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Page:
    """The page as a visitor uses it."""

    def __init__(self, browser: Any, url: str, *, width: int = 1280, height: int = 900, theme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(TIMEOUT_MS)
        self.problems: list[str] = []
        self.outside: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda line: self.problems.append(line.text) if line.type == "error" else None)
        self.page.on("request", lambda request: self._note_request(request.url, url))
        self.page.goto(f"{url}?__theme={theme}", wait_until="domcontentloaded")
        self.page.wait_for_selector("#chat button.example")

    def _note_request(self, requested: str, url: str) -> None:
        if not requested.startswith((url, "data:", "blob:")):
            self.outside.append(requested)

    def attach(self, file: Path) -> None:
        self.page.set_input_files("#question input[type=file]", str(file))
        self.page.wait_for_selector("#question .thumbnail-item")

    def ask(self, text: str) -> None:
        """Sends a question and waits until the box is open again."""
        asked = self.count("user")
        self.page.fill("#question textarea", text)
        self.page.click("#question .submit-button")
        self.wait_for_answer(asked)

    def wait_for_answer(self, asked: int) -> None:
        """Waits until one more question has its answer below it, the box is open and the cursor is back in it."""
        self.page.wait_for_function(
            f"""() => {{
              const users = document.querySelectorAll('{BUBBLE["user"]}');
              const answer = [...document.querySelectorAll('{BUBBLE["bot"]}')].at(-1);
              const box = document.querySelector('#question textarea');
              return users.length > {asked} && answer && document.querySelector('#question .submit-button')
                && users[users.length - 1].compareDocumentPosition(answer) & Node.DOCUMENT_POSITION_FOLLOWING
                && document.activeElement === box;
            }}"""
        )

    def wait_until_open(self) -> None:
        """Waits until no answer is being written."""
        self.page.wait_for_selector("#question .submit-button")

    def press(self, label: str) -> None:
        """Clicks a button under the last answer until it acts: gradio draws them anew when an answer has ended."""
        sent: list[str] = []
        self.page.on("request", lambda request: sent.append(request.url) if "/queue/join" in request.url else None)
        for _ in range(5):
            self.page.click(f"#chat button[aria-label={label}]")
            for _ in range(20):
                if sent:
                    return
                self.page.wait_for_timeout(100)
        raise AssertionError(f"{label} does nothing")

    def open_tab(self, name: str) -> None:
        self.page.click(f"#{name}_tab-button")
        self.page.wait_for_selector(f"#{name}_tab", state="visible")

    def fits(self) -> list[int]:
        """Width and height of what could be scrolled; of the window if nothing overflows."""
        size: list[int] = self.page.evaluate(
            "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
        )
        return size

    def wider_than_its_place(self) -> list[str]:
        """Visible parts of the page that reach out of the window to the right."""
        parts: list[str] = self.page.evaluate(
            """[...document.querySelectorAll('.main *')].filter(part => {
                 const box = part.getBoundingClientRect();
                 return box.width > 1 && box.height > 1 && box.right > innerWidth + 1;
               }).map(part => part.tagName + ' ' + part.id + ' ' + part.className)"""
        )
        return parts

    def count(self, role: str) -> int:
        return int(self.page.locator(BUBBLE[role]).count())

    def last(self, role: str) -> str:
        return str(self.page.locator(BUBBLE[role]).last.inner_text())


@pytest.fixture
def red(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (320, 240), "red").save(path)
    return path


def test_upload_ask_break_and_go_on(browser: Any, url: str, red: Path, tmp_path: Path) -> None:
    page = Page(browser, url)
    page.page.screenshot(path=tmp_path / "empty.png")
    assert "symphony_smoe" in page.page.inner_text("#header")

    page.attach(red)
    page.ask("What color is <b>it</b>?")
    assert "What color is <b>it</b>?" in page.last("user")
    assert page.page.locator("#chat .user.message img").count() == 1
    assert page.last("bot").strip() not in ("", "…")
    page.page.screenshot(path=tmp_path / "answer.png")

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    page.attach(broken)
    page.ask("And this one?")
    assert "Image 'broken.png' is not an image" in page.last("bot")
    assert page.page.input_value("#question textarea") == "And this one?"
    page.page.screenshot(path=tmp_path / "error.png")

    page.ask("And now?")
    assert "Not answered" not in page.last("bot")
    page.page.click("#new")
    page.page.wait_for_selector("#chat button.example")
    assert page.count("user") == 0
    assert page.problems == []
    assert page.outside == []


def test_an_example_answers_with_one_click(browser: Any, url: str) -> None:
    page = Page(browser, url)
    question = page.page.locator("#chat .example-text").nth(1).inner_text()
    page.page.locator("#chat button.example").nth(1).click()
    page.wait_for_answer(0)
    assert question in page.last("user")
    assert page.page.locator("#chat .user.message img").count() == 1


def test_stop_keeps_what_is_written_and_new_chat_clears_it(
    browser: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(self: ChatSession, text: str, **settings: Any) -> Iterator[str]:
        for number in range(200):
            if stopped:
                return
            yield f"{number} "
            time.sleep(0.05)

    stopped: list[int] = []
    monkeypatch.setattr(ChatSession, "stream", stream)
    monkeypatch.setattr(ChatSession, "stop", lambda self: stopped.append(1))
    page = Page(browser, url)
    page.page.fill("#question textarea", "Count.")
    page.page.click("#question .submit-button")
    page.page.wait_for_selector(f"{BUBBLE['bot']}:has-text('3')")
    page.page.click("#question .stop-button")
    page.page.wait_for_selector("#question .submit-button")
    assert page.last("bot").strip().startswith("0 1 2 3")

    stopped.clear()
    page.page.fill("#question textarea", "Again.")
    page.page.click("#question .submit-button")
    page.page.wait_for_selector(f"{BUBBLE['bot']} >> nth=1")
    page.page.click("#new")
    page.page.wait_for_selector("#chat button.example")
    page.page.wait_for_timeout(500)
    assert page.count("bot") == 0
    assert page.page.is_enabled("#question textarea")


def test_ask_again_and_take_back(browser: Any, url: str, red: Path) -> None:
    page = Page(browser, url)
    page.attach(red)
    page.ask("What is <this>?")
    answer = page.last("bot")
    page.press("Retry")
    page.page.wait_for_function(f"document.querySelectorAll('{BUBBLE['bot']}').length === 1")
    page.wait_until_open()
    assert page.count("user") == 1
    assert page.last("bot") == answer

    page.press("Undo")
    page.page.wait_for_function("document.querySelector('#question textarea').value === 'What is <this>?'")
    page.page.wait_for_selector("#question .thumbnail-item")
    page.page.wait_for_selector("#chat button.example")
    page.ask("What is <that>?")
    assert "What is <that>?" in page.last("user")
    assert page.page.locator("#chat .user.message img").count() == 1
    assert page.problems == []


def test_a_corrupted_picture_is_answered_beside_the_clean_one(
    browser: Any, url: str, red: Path, tmp_path: Path
) -> None:
    page = Page(browser, url)
    page.open_tab("corruption")
    page.page.wait_for_selector("#asked .empty")
    page.page.screenshot(path=tmp_path / "corruption_empty.png")
    page.open_tab("chat")
    page.attach(red)
    page.ask("What color is <i>it</i>?")

    page.open_tab("corruption")
    page.page.wait_for_selector("#clean_picture img")
    assert page.page.inner_text("#asked") == "What color is <i>it</i>?"
    page.page.fill("#severity input[type=number]", "5")
    page.page.press("#severity input[type=number]", "Tab")
    page.page.click("#compare")
    page.page.wait_for_selector("#corrupted_picture img")
    page.page.wait_for_selector("#corrupted_answers .card p:not(:has(.waiting))")
    page.page.wait_for_selector("#compare:not([disabled])")
    sources = page.page.evaluate("['clean', 'corrupted'].map(n => document.querySelector(`#${n}_picture img`).src)")
    assert sources[0] != sources[1]
    page.page.screenshot(path=tmp_path / "corruption.png")
    assert page.problems == []


def test_the_routing_of_an_answer(browser: Any, url: str, red: Path, tmp_path: Path) -> None:
    page = Page(browser, url)
    page.open_tab("routing")
    page.page.wait_for_selector("#routing .empty")
    page.open_tab("chat")
    page.attach(red)
    page.ask("What <script>?")
    page.open_tab("routing")
    page.page.wait_for_selector("#routing h3:has-text('Experts of layer 1')")
    # A picture of 320 x 240 on a square: of 4 x 4 patches the outer rows are half padding, so all are drawn.
    assert page.page.locator("#routing .patches rect").count() == 16
    assert page.page.locator("#routing .graph circle").count() == 4
    assert "<script>?" in page.page.inner_text("#routing .words").replace("\u2060", "")
    page.page.click("#layer input")
    page.page.click("#layer [role=option]:has-text('Layer 0')")
    page.page.wait_for_selector("#routing h3:has-text('Experts of layer 0')")
    page.page.screenshot(path=tmp_path / "routing.png")
    page.page.click("#new")
    page.open_tab("routing")
    page.page.wait_for_selector("#routing .empty")
    assert page.problems == []


@pytest.mark.parametrize(("width", "height", "theme"), [(1280, 900, "light"), (390, 844, "dark")])
def test_two_models_answer_side_by_side_or_one_under_the_other(
    browser: Any, url_of_two: str, red: Path, tmp_path: Path, width: int, height: int, theme: str
) -> None:
    page = Page(browser, url_of_two, width=width, height=height, theme=theme)
    page.attach(red)
    page.ask("What is it?")
    page.page.wait_for_selector("#chat_2 .bot.message")
    page.wait_until_open()
    first, second = (page.page.locator(f"#{name}").bounding_box() for name in ("chat", "chat_2"))
    if width > 600:
        assert second["x"] >= first["x"] + first["width"]
        assert second["y"] == first["y"]
    else:
        assert second["y"] >= first["y"] + first["height"]
        assert second["x"] == first["x"]
    assert min(first["height"], second["height"]) > 150
    assert page.fits() == [width, height]
    page.page.screenshot(path=tmp_path / f"two_{width}_{theme}.png")
    for tab, ready in (("corruption", "#clean_picture img"), ("routing", "#routing .patches")):
        page.open_tab(tab)
        page.page.wait_for_selector(ready)
        if tab == "corruption":
            page.page.click("#compare")
            page.page.wait_for_selector("#corrupted_answers .card:nth-child(2) p:not(:has(.waiting))")
        assert page.fits() == [width, height]
        assert page.wider_than_its_place() == []
        page.page.screenshot(path=tmp_path / f"two_{tab}_{width}_{theme}.png")
    page.page.click("#routing_model label:has-text('baseline')")
    page.page.wait_for_selector("#routing .patches")
    assert page.problems == []


# The page of two models is looked at in the other two combinations.
@pytest.mark.parametrize(("width", "height", "theme"), [(1280, 900, "dark"), (390, 844, "light")])
def test_page_fits_the_window(browser: Any, url: str, tmp_path: Path, width: int, height: int, theme: str) -> None:
    page = Page(browser, url, width=width, height=height, theme=theme)
    page.page.locator("#chat button.example").first.click()
    page.wait_for_answer(0)
    page.ask("colors " * 30)
    page.page.screenshot(path=tmp_path / f"{width}_{theme}.png")
    assert page.fits() == [width, height]
    box = page.page.locator("#question .submit-button").bounding_box()
    assert box["y"] + box["height"] < height
    page.page.click("#settings button")
    page.page.wait_for_selector("#settings input[type=range]", state="visible")
    page.page.screenshot(path=tmp_path / f"settings_{width}_{theme}.png")
    assert page.fits() == [width, height]
    assert page.wider_than_its_place() == []
