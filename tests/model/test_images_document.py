"""``docs/images.md`` says what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from symphony_vlm.config.recipe import MAX_SCALE
from symphony_vlm.data.images import MAX_PIXELS, MAX_SIDE
from symphony_vlm.model.image_processor import ResizeMode

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "images.md").read_text(encoding="utf-8")


def test_the_table_of_tokens_is_what_its_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    exec(program, {})
    printed = capsys.readouterr().out
    assert printed.count("\n") == 8 and printed in DOCUMENT


def test_every_mode_and_limit_is_named() -> None:
    assert re.findall(r"^\| `(\w+)` \| ", DOCUMENT, flags=re.MULTILINE)[1:] == list(get_args(ResizeMode))
    assert DOCUMENT.count(f"{MAX_PIXELS:,}") == 2 and f"a side above {MAX_SIDE:,} pixels" in DOCUMENT
    assert f"go up to {MAX_SCALE}." in DOCUMENT
    assert f"beyond 1 : {MAX_PIXELS // 336 // 336}" in DOCUMENT
