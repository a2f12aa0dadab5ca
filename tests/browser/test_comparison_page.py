"""The page of ``compare`` in a real browser: nothing wider than the screen or the sheet, and everything legible."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from symphony_vlm.evaluation.compare_report import write_comparison
from symphony_vlm.evaluation.quantities import Resampling

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

TOO_WIDE = """() => {
  const width = document.documentElement.clientWidth;
  return [...document.querySelectorAll('body, body *')]
    .filter(e => !e.closest('.scroll') || e.matches('.scroll'))
    .filter(e => e.getBoundingClientRect().right > width + 1 || e.getBoundingClientRect().left < -1)
    .map(e => e.tagName + '.' + e.className);
}"""

CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = rgb(getComputedStyle(document.documentElement).getPropertyValue('--card'));
  return [...document.querySelectorAll('td, .verdict, .caption, .mark')].map(e => {
    const tint = rgb(getComputedStyle(e).backgroundColor);
    const behind = paper.map((v, i) => i < 3 ? v + (tint[i] - v) * tint[3] / 255 : 255);
    const [high, low] = [light(rgb(getComputedStyle(e).color)), light(behind)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  });
}"""
"""WCAG 2's contrast of text and what is behind it."""


def _fixture() -> ModuleType:
    path = Path(__file__).parents[1] / "evaluation" / "scenes_fixture.py"
    spec = importlib.util.spec_from_file_location("scenes_fixture_of_the_page", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fixture = _fixture()
    root = tmp_path_factory.mktemp("comparison")
    data = fixture.make_scenes(root / "data", pictures=8)
    pair = [
        fixture.write_scene_evaluation(root / router, data, router=router, cost=cost)
        for router, cost in (("smoe", 0.09), ("symphony_smoe_with_a_long_name", 0.03))
    ]
    return write_comparison(*pair, root / "out", resampling=Resampling(n_resamples=200, n_draws=500)).html


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "media"), [(1280, "screen"), (390, "screen"), (760, "print")])
def test_nothing_overflows_and_text_is_legible(
    browser: Any, page_file: Path, tmp_path: Path, width: int, media: str, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    failed: list[str] = []
    page.on("requestfailed", lambda request: failed.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.emulate_media(media=media, color_scheme=scheme)
    page.goto(page_file.as_uri())
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert page.evaluate(TOO_WIDE) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    pictures = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(pictures) >= 8 and set(pictures) == {64}
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) > 100
    assert min(contrasts) >= 4.5  # WCAG AA for text
    assert failed == []
    context.close()
