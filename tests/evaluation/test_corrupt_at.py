"""Where corruptions are applied: as decoded, at a common size, or on what the model sees."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from symphony_vlm.cli import main
from symphony_vlm.corruptions import at_long_side, corrupt, corruption_rng, image_key, parse_corrupt_at
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.opening import OpenedModel, check_corrupt_at
from symphony_vlm.evaluation.pictures import open_picture
from symphony_vlm.evaluation.predictor import Predictor
from symphony_vlm.evaluation.runner import EvaluationPlan, evaluate
from symphony_vlm.evaluation.stock_predictor import StockPredictor
from symphony_vlm.evaluation.task import get_task
from symphony_vlm.model.image_processor import SymphonyImageProcessor
from symphony_vlm.model.model_input import check_model_input, model_input

SIZES = [(32, 32), (48, 64), (64, 48), (20, 333), (1, 400), (7, 5), (300, 301)]
ENCODER = {
    "library": "open_clip",
    "size": [224, 224],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def _picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3)).astype(np.uint8)


def _cell(corruption: str = "none", severity: int = 0, corrupt_at: str = "native", seed: int = 0) -> Cell:
    return Cell(task=get_task("scenes"), corruption=corruption, severity=severity, corrupt_at=corrupt_at, seed=seed)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A picture of 90 x 60 pixels."""
    path = tmp_path / "picture.png"
    Image.fromarray(_picture(60, 90)).save(path)
    return path


@pytest.fixture
def predictor(tiny_model: Any) -> Predictor:
    """Of a model that sees 32 x 32 pixels, padded."""
    return Predictor(tiny_model, batch_size=4, max_new_tokens=2)


@pytest.mark.parametrize("text", ["native", "model_input", "long_side:1", "long_side:336", "long_side:8192"])
def test_names(text: str) -> None:
    assert parse_corrupt_at(text) == text


@pytest.mark.parametrize(
    "text", ["", "Native", "long_side", "long_side:", "long_side:0", "long_side:-1", "long_side:8193", "long_side:03x"]
)
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(
        InputError, match=r"corrupt_at: '.*' is none of native, model_input, long_side:N.*long_side:336"
    ):
        parse_corrupt_at(text)


@pytest.mark.parametrize(
    ("size", "length", "expected"),
    [
        ((60, 90), 30, (20, 30)),
        ((90, 60), 336, (336, 224)),
        ((1, 1000), 100, (1, 100)),
        ((100, 100), 7, (7, 7)),
        ((3, 2), 4, (4, 3)),  # 2.67
        ((4, 2), 5, (5, 3)),  # 2.5, halves go up
    ],
)
def test_long_side(size: tuple[int, int], length: int, expected: tuple[int, int]) -> None:
    picture = _picture(*size)
    resized = at_long_side(picture, length)
    assert resized.shape[:2] == expected
    reference = Image.fromarray(picture).resize(expected[::-1], Image.Resampling.BICUBIC)
    assert np.array_equal(resized, np.asarray(reference))


def test_native_is_as_decoded(file: Path) -> None:
    ref, pixels, key = ImageRef(path=file), _picture(60, 90), image_key(file.read_bytes())
    assert np.array_equal(open_picture(ref, _cell()).pixels, pixels)
    expected = corrupt(pixels, "fog", 3, corruption_rng(key, "fog", 3, 7))
    assert np.array_equal(open_picture(ref, _cell("fog", 3, seed=7)).pixels, expected)


def test_at_a_long_side_the_clean_picture_has_the_size_too(file: Path) -> None:
    ref, key = ImageRef(path=file), image_key(file.read_bytes())
    small = at_long_side(_picture(60, 90), 45)
    clean = open_picture(ref, _cell(corrupt_at="long_side:45"))
    assert np.array_equal(clean.pixels, small) and clean.sha256 == key
    expected = corrupt(small, "shot_noise", 2, corruption_rng(key, "shot_noise", 2, 0))
    assert np.array_equal(open_picture(ref, _cell("shot_noise", 2, "long_side:45")).pixels, expected)


@pytest.mark.parametrize("mode", ["pad", "crop", "stretch", "encoder"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_the_model_sees_is_prepared_unchanged(mode: Any, size: tuple[int, int]) -> None:
    """Bit-equal: at severity 0 the ordinary path then gives what it gives of the file itself."""
    preprocessing = ENCODER | {"size": [32, 32]} if mode == "encoder" else None
    processor = SymphonyImageProcessor(32, resize_mode=mode, preprocessing=preprocessing)
    check_model_input(processor, (1,))
    picture = _picture(*size)
    seen = model_input(processor, picture)
    assert seen.pixels.shape == (32, 32, 3) and seen.pixels.dtype == np.uint8
    direct, again = processor([picture, seen.pixels])["pixel_values"]
    assert direct.equal(again)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_rectangle_is_where_padding_leaves_the_picture(size: tuple[int, int]) -> None:
    """Rows and columns whose middle lies in the picture, by the geometry of a centred square."""
    height, width = size
    rows, columns = model_input(SymphonyImageProcessor(32), _picture(height, width)).content
    side = max(height, width)
    for found, length in ((rows, height), (columns, width)):
        start = (side - length) // 2
        middles = (np.arange(32) + 0.5) * side / 32
        inside = np.flatnonzero((middles >= start) & (middles <= start + length))
        if len(inside):
            # A filter as wide as bicubic's decides on a border by what is beside it too.
            assert abs(found.start - inside[0]) <= 1 and abs(found.stop - 1 - inside[-1]) <= 1
        else:
            assert found.stop - found.start == 1, "the row that the strip makes up most"


@pytest.mark.parametrize("mode", ["crop", "stretch"])
def test_without_padding_all_of_it_is_the_picture(mode: Any) -> None:
    found = model_input(SymphonyImageProcessor(32, resize_mode=mode), _picture(20, 50)).content
    assert found == (slice(0, 32), slice(0, 32))


def test_only_the_picture_is_corrupted_and_not_the_padding(file: Path, predictor: Predictor) -> None:
    ref, key = ImageRef(path=file), image_key(file.read_bytes())
    clean = open_picture(ref, _cell(corrupt_at="model_input"), predictor).pixels
    found = open_picture(ref, _cell("impulse_noise", 5, "model_input"), predictor).pixels
    seen = predictor.model_input(_picture(60, 90))
    rows, columns = seen.content
    # 60 of 90 rows are 21.3 of 32.
    assert (rows, columns) == (slice(5, 27), slice(0, 32))
    assert np.array_equal(clean, seen.pixels)
    rng = corruption_rng(key, "impulse_noise", 5, 0)
    assert np.array_equal(found[rows, columns], corrupt(clean[rows, columns], "impulse_noise", 5, rng))
    assert np.array_equal(np.delete(found, range(5, 27), axis=0), np.delete(clean, range(5, 27), axis=0))


def test_models_that_see_no_single_square_are_refused(file: Path) -> None:
    with pytest.raises(InputError, match=r"model_input: is not defined for .* tiles \(anyres\).*native or long_side"):
        check_model_input(SymphonyImageProcessor(32, resize_mode="anyres"), (1,))
    with pytest.raises(InputError, match=r"several scales \[1, 3\]"):
        check_model_input(SymphonyImageProcessor(96), (1, 3))
    # timm's and some transformers' processors resize to more than they crop.
    larger = {"library": "transformers", "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}}
    cropping = larger | {"crop_size": {"height": 32, "width": 32}, "do_resize": True, "do_center_crop": True}
    processor = SymphonyImageProcessor(32, resize_mode="encoder", preprocessing=cropping)
    with pytest.raises(InputError, match="changes pictures of 32 x 32, the size that it makes"):
        check_model_input(processor, (1,))
    opened = OpenedModel(model=None, processor=None, router="llava", is_stock=True)
    check_corrupt_at(opened, "native")
    with pytest.raises(InputError, match="'llava' is a model of transformers"):
        check_corrupt_at(opened, "model_input")
    stock = object.__new__(StockPredictor)
    with pytest.raises(InputError, match="models trained here alone"):
        open_picture(ImageRef(path=file), _cell("fog", 1, "model_input"), stock)


@pytest.fixture(scope="module")
def plan(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluationPlan:
    """A clean and a corrupted cell of one picture."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    generate_scenes(folder, train=1, test=2)
    return EvaluationPlan(
        model=str(tiny_model_folder),
        tasks=("scenes",),
        data=folder,
        corruptions=("gaussian_noise",),
        severities=(5,),
        limit=1,
        max_new_tokens=2,
    )


Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def records(plan: EvaluationPlan, tmp_path: Path) -> Run:
    """Runs the plan at a place and gives the records of a cell."""

    def run(corrupt_at: str, cell: str) -> list[dict[str, Any]]:
        output = tmp_path / corrupt_at.replace(":", "_")
        evaluate(dataclasses.replace(plan, corrupt_at=corrupt_at), output, console=Console(quiet=True))
        for name in ("manifest.json", "results.json"):
            written = json.loads((output / name).read_text())
            assert (written.get("provenance") or written)["corrupt_at"] == corrupt_at
        lines = (output / "predictions" / f"scenes.{cell}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return run


def test_runs_record_where(records: Run) -> None:
    places = ("native", "long_side:48", "model_input")
    clean = {place: records(place, "none.0") for place in places}
    noisy = {place: records(place, "gaussian_noise.5") for place in places}
    for place in places:
        assert {record["corrupt_at"] for record in clean[place] + noisy[place]} == {place}
    # Scenes have 64 pixels a side and the model sees 32: three different pictures, and as many noises.
    for cells in (clean, noisy):
        assert len({cells[place][0]["pixels_sha256"] for place in places}) == 3
        assert len({cells[place][0]["image_sha256"] for place in places}) == 1
    answers = [[record["prediction"] for record in clean[place]] for place in ("native", "model_input")]
    assert answers[0] == answers[1], "the clean cell at the model's input is the ordinary one"


def test_another_place_is_another_evaluation(plan: EvaluationPlan, tmp_path: Path) -> None:
    evaluate(plan, tmp_path / "out", console=Console(quiet=True))
    with pytest.raises(InputError, match="differs in corrupt_at"):
        evaluate(dataclasses.replace(plan, corrupt_at="long_side:40"), tmp_path / "out", console=Console(quiet=True))


def test_the_command_takes_it(plan: EvaluationPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "--model", plan.model, "--task", "scenes", "--data", str(plan.data), "--limit", "1"]
    arguments += ["--max-new-tokens", "1", "--output", str(tmp_path / "out"), "--corrupt-at"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "long_side:40"])
    assert stop.value.code == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["corrupt_at"] == "long_side:40"
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "longside"])
    assert stop.value.code == 2
    assert "'longside' is none of native" in capsys.readouterr().err


def test_a_tiled_model_is_refused_before_anything_is_answered(
    plan: EvaluationPlan, tiny_model_factory: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_model_factory(scales=(1, 3))
    model.save_pretrained(tmp_path / "model")
    model.processor.save_pretrained(tmp_path / "model")
    tiled = dataclasses.replace(plan, model=str(tmp_path / "model"), corrupt_at="model_input")
    with pytest.raises(InputError, match="several scales"):
        evaluate(tiled, tmp_path / "out", console=Console(quiet=True))
    assert not (tmp_path / "out" / "predictions").exists()
