"""The overlay: which text, where, and that only it changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from symphony_vlm.data.sample import ImageRef
from symphony_vlm.evaluation.attacks.typographic import Overlay, Typographic, draw_overlay
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.pictures import Picture


def _item(answer: str = "red", name: str = "q", **more: Any) -> EvaluationItem:
    return EvaluationItem(
        id=name, question="?", answers=(answer,), images=(ImageRef(name="a.png", data=b""),), image_key="k", **more
    )


def _picture(height: int = 64, width: int = 96) -> Picture:
    return Picture("0" * 64, np.full((height, width, 3), 128, dtype=np.uint8))


def _text(attack: Any, item: EvaluationItem, seed: int = 0) -> str:
    return str(attack.pose(item, [_picture()], None, None, seed)[0].facts["text"])


def test_the_text_is_another_option_the_opposite_or_another_answer_of_the_group() -> None:
    pool = [
        _item("red", group="colour"),
        _item("Blue", group="colour"),
        _item("red.", group="colour"),
        _item("2", group="n"),
    ]
    attack = Typographic().prepared(pool)
    assert {_text(attack, _item("B", choices=("cat", "dog", "bird")), seed) for seed in range(40)} == {"cat", "bird"}
    assert {_text(attack, _item("yes"), seed) for seed in range(5)} == {"no"}
    assert {_text(attack, _item("Red", group="colour"), seed) for seed in range(20)} == {"Blue"}
    assert {_text(attack, _item("red", group="shape"), seed) for seed in range(60)} == {"Blue", "2"}


def test_it_does_not_apply_without_a_picture_or_a_wrong_answer_that_can_be_written() -> None:
    attack = Typographic().prepared([_item("red")])
    assert not attack.applies_to(_item("red"))
    assert attack.applies_to(_item("blue"))
    assert not attack.applies_to(replace(_item("yes"), images=()))
    assert not attack.applies_to(_item("A", choices=("cat", "猫")))


def test_it_is_a_function_of_picture_question_and_seed() -> None:
    attack = Typographic().prepared([_item(str(n)) for n in range(50)])

    def pixels(name: str = "q", seed: int = 0, sha: str = "0" * 64) -> bytes:
        return attack.shown(_item("red", name), [replace(_picture(), sha256=sha)], seed)[0].pixels.tobytes()

    assert pixels() == pixels()
    assert len({pixels(), pixels("p"), pixels(seed=1), pixels(sha="1" * 64)}) == 4


def test_only_the_first_picture_changes_and_inside_the_box_alone() -> None:
    attack, item, pictures = Typographic(size=0.2), _item("yes"), [_picture(), _picture()]
    shown = attack.shown(item, pictures, 0)
    facts = attack.pose(item, shown, None, None, 0)[0].facts  # type: ignore[arg-type]
    changed = (shown[0].pixels != 128).any(2)
    rows, columns = np.where(changed)
    assert changed.any()
    assert rows.min() >= facts["top"]
    assert columns.min() >= facts["left"]
    assert facts["font_size"] == round(0.2 * 64)
    assert facts["picture"] == [64, 96]
    assert shown[1] is pictures[1]
    assert (pictures[0].pixels == 128).all(), "the clean picture is not touched"


@pytest.mark.parametrize("size", [0.1, 0.5, 1.0])
def test_a_text_that_would_not_fit_is_made_smaller(size: int) -> None:
    item = _item("A", choices=("cat", "a very long option that goes on"))
    shown = Typographic(size=size).shown(item, [_picture(200, 300)], 0)
    rows, columns = np.where((shown[0].pixels != 128).any(2))
    # The text is whole: it touches no border but by chance, and both its black edge and its white are there.
    colours = Counter(map(tuple, shown[0].pixels[rows, columns].tolist()))
    assert colours[255, 255, 255] > 0
    assert colours[0, 0, 0] > 0
    assert columns.max() - columns.min() <= 300


def test_opacity_blends_with_what_is_behind() -> None:
    pixels = np.full((40, 80, 3), 100, dtype=np.uint8)
    overlay = Overlay(text="no", font_size=20, left=5, top=5)
    whole, half = draw_overlay(pixels, overlay, 1.0), draw_overlay(pixels, overlay, 0.5)
    expected = pixels + (whole.astype(float) - pixels) * 0.5
    # Pillow rounds to whole levels.
    assert np.abs(half - expected).max() <= 1


def test_pictures_of_a_pixel_do_not_break_it() -> None:
    assert Typographic().shown(_item("yes"), [_picture(1, 1)], 0)[0].pixels.shape == (1, 1, 3)
