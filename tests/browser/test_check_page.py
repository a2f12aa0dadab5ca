"""The page of ``data check`` in a real browser, opened as a file. Screenshots stay in pytest's temporary folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from symphony_vlm.cli import main

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ATTACK = "</span><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page_file(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of five records, one with a hostile text and two that are broken."""
    folder = tmp_path_factory.mktemp("check")
    Image.new("RGB", (320, 200), "teal").save(folder / "a.png")
    records = [
        {
            "id": f"r{number}",
            "image": "no.png" if number > 2 else "a.png",
            "conversations": [
                {"from": "human", "value": f"<image>\n{ATTACK if number == 1 else 'What color is it?'} ({number})"},
                {"from": "gpt", "value": "It is teal. " * 12},
            ],
        }
        for number in range(5)
    ]
    (folder / "train.json").write_text(json.dumps(records))
    with pytest.raises(SystemExit) as stop:
        data = ["--data", str(folder / "train.json"), "--output", str(folder / "out"), "--show", "5"]
        main(["data", "check", *data, "--model", str(tiny_model_folder), "--max-length", "120"])
    assert stop.value.code == 1
    return folder / "out" / "check.html"


@pytest.mark.parametrize(("width", "theme"), [(1200, "light"), (390, "dark")])
def test_the_page_works_from_a_file_and_fits_the_window(
    browser: Any, page_file: Path, tmp_path: Path, width: int, theme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    problems: list[str] = []
    requested: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: requested.append(request.url))
    page.goto(page_file.as_uri())
    assert problems == []
    assert [url for url in requested if not url.startswith("data:")] == [page_file.as_uri()]
    assert page.title() == "train.json: data check"
    assert ATTACK in page.inner_text(".list")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    sizes = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert sizes == [224] * 3
    assert page.locator(".broken").count() == 2
    assert not page.locator(".list sub").first.is_visible()
    page.check("#ids")
    assert page.locator(".list sub").first.is_visible()
    page.screenshot(path=tmp_path / f"{width}_{theme}.png", full_page=True)
    page.close()
