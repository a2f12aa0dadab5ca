"""The data of a run: the split, what broken data does to ``train``, and which pictures can be trained on."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from symphony_vlm.cli import main
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.data.datasets import open_samples
from symphony_vlm.data.images import image_key
from symphony_vlm.data.mixture import SampleList
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.tasks.short_answer import load_items
from symphony_vlm.training.run import train
from symphony_vlm.training.run_data import RunData, open_run_data

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)


def _record(number: int, image: str | None, **changes: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": f"r{number}",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat color is it?" if image else "What is up?"},
            {"from": "gpt", "value": "red"},
        ],
        **changes,
    }
    return record | {"image": image} if image else record


def _pictures(folder: Path, names: Iterable[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.fromarray(np.roll(PIXELS, number, axis=0)).save(folder / name)


def _write(folder: Path, records: Any, name: str = "train.json") -> Path:
    path = folder / name
    path.write_text(records if isinstance(records, str) else json.dumps(records))
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A folder with ten good records about ten pictures."""
    _pictures(tmp_path / "data", [f"{i}.png" for i in range(10)])
    _write(tmp_path / "data", [_record(i, f"{i}.png") for i in range(10)])
    return tmp_path / "data"


@pytest.fixture
def short(only_stage: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """A recipe of one step on the given data."""

    def make(data: Path | list[Path], **settings: Any) -> Recipe:
        files = [str(path) for path in (data if isinstance(data, list) else [data])]
        settings = {"captions": None, "train": files, "validation_fraction": 0.2, **settings}
        return only_stage("instruct", max_steps=1, batch_size=2, data=settings)

    return make


def _train_by_command(
    recipe: Recipe, folder: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[int, str, list[str]]:
    """Exit code, standard output and the lines of standard error of ``symphony-vlm train``."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(file), "--output", str(folder / "run"), *more])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err.splitlines()


# The split.


def _images(samples: SampleList) -> set[str]:
    return {image_key(ref) for i in range(len(samples)) for ref in samples[i].images}


def _assert_held_out(data: RunData) -> None:
    held = set().union(*(_images(samples) for samples in data.validation.values()))
    trained = set().union(*(_images(samples) for samples in data.train.values()))
    assert held
    assert trained
    assert held & trained == set()


def test_no_picture_held_out_is_trained_on_in_any_stage(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    recipe = only_stage("pretrain")
    values = recipe.model_dump(mode="json")
    values["stages"][0]["data"] = ["captions", "train"]
    data = open_run_data(Recipe.model_validate(values), tmp_path, quiet.print)
    _assert_held_out(data)


def test_files_that_share_pictures_hold_out_the_same_ones(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    """Captions of twenty pictures, and many questions about ten of them: each file alone would choose others."""
    _pictures(tmp_path, [f"{i}.png" for i in range(20)])
    captions = _write(tmp_path, [_record(i, f"{i}.png") for i in range(20)], "captions.json")
    questions = _write(tmp_path, [_record(i, f"{i % 10}.png") for i in range(40)])
    values = only_stage("pretrain", data={"train": str(questions), "captions": str(captions)}).model_dump(mode="json")
    values["data"]["validation_fraction"] = 0.3
    values["stages"][0]["data"] = ["captions", "train"]
    said: list[str] = []
    data = open_run_data(Recipe.model_validate(values), tmp_path / "run", said.append)
    _assert_held_out(data)
    assert any("more left out, held out in another file" in line for line in said)
    for role, file in (("captions", "captions.json"), ("train", "train.json")):
        assert data.counts[f"{role}: {file}"]["train"] == len(data.train[role])


def test_records_are_either_trained_on_or_held_out(
    good: Path, short: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    data = open_run_data(short(good / "train.json"), tmp_path / "run", quiet.print)
    train_ids = {data.train["train"][i].id for i in range(len(data.train["train"]))}
    held_ids = {data.validation["train"][i].id for i in range(len(data.validation["train"]))}
    assert train_ids | held_ids == {f"r{i}" for i in range(10)}
    assert train_ids & held_ids == set()
    assert len(held_ids) == 2


def test_without_a_validation_share_everything_is_trained_on_and_nothing_is_written(
    good: Path, short: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    recipe = short(good / "train.json", validation_fraction=0.0)
    data = open_run_data(recipe, tmp_path / "run", quiet.print)
    assert len(data.train["train"]) == 10
    assert len(data.validation["train"]) == 0
    train(recipe, tmp_path / "run", console=quiet)


def test_the_held_out_records_are_written_so_that_eval_can_read_them(
    good: Path, short: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, _ = _train_by_command(short(good / "train.json"), tmp_path, capsys)
    assert code == 0
    validation = tmp_path / "run" / "validation.jsonl"
    items = load_items(validation, None)
    assert len(items) == 2
    assert all(item.question == "What color is it?" and item.answers == ("red",) for item in items)
    model, output = str(tmp_path / "run"), tmp_path / "eval"
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--model", model, "--data", str(validation), "--output", str(output), "--json"])
    assert not stop.value.code
    assert json.loads((output / "results.json").read_text())["results"][0]["n_items"] == 2


def test_held_out_questions_about_the_word_image_are_read_back_as_they_were(
    short: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    """In LLaVA's form the word would be a marker, and the record would have more markers than images."""
    _pictures(tmp_path, [f"{i}.png" for i in range(4)])
    text = {"type": "text", "text": "What does <image> mean here?"}
    more = {"type": "text", "text": " Be exact."}
    records = [
        {
            "id": str(i),
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [text, {"type": "image", "image": f"{i}.png"}, more]},
                {"role": "assistant", "content": "A picture, <image>."},
            ],
        }
        for i in range(4)
    ]
    data = open_run_data(short(_write(tmp_path, records), validation_fraction=0.5), tmp_path / "run", quiet.print)
    again = open_samples(tmp_path / "run" / "validation.jsonl")
    assert len(again) == len(data.validation["train"]) == 2
    for found, original in zip(again, data.validation["train"], strict=True):
        assert found.messages == original.messages
        assert [ref.path for ref in found.images] == [ref.path for ref in original.images]


def test_held_out_records_of_several_files_without_ids_have_ids_of_their_own(
    short: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    """Such files number their records, each from 0."""
    files = []
    for name in "ab":
        _pictures(tmp_path / name, ["0.png", "1.png"])
        records = [{k: v for k, v in _record(i, f"{i}.png").items() if k != "id"} for i in range(2)]
        files.append(_write(tmp_path / name, records))
    open_run_data(short(files, validation_fraction=0.5), tmp_path / "run", quiet.print)
    items = load_items(tmp_path / "run" / "validation.jsonl", None)
    assert len({item.id for item in items}) == len(items) == 2


def test_pictures_inside_a_table_are_written_beside_the_held_out_records(
    short: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    from datasets import Dataset

    buffers = []
    for number in range(6):
        buffer = io.BytesIO()
        Image.fromarray(np.roll(PIXELS, number, axis=0)).save(buffer, format="PNG")
        buffers.append(buffer.getvalue())
    rows = {"image": [{"bytes": b, "path": None} for b in buffers], "question": ["a?"] * 6, "answer": ["b"] * 6}
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    open_run_data(short(tmp_path / "train.parquet"), tmp_path / "run", quiet.print)
    items = load_items(tmp_path / "run" / "validation.jsonl", None)
    assert len(items) == 1
    path = items[0].images[0].path
    assert path is not None
    assert path.read_bytes() in buffers


# Faults.


def _missing(folder: Path) -> str:
    (folder / "3.png").unlink()
    return "3.png"


def _truncated_jpeg(folder: Path) -> str:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, format="JPEG")
    (folder / "3.png").write_bytes(buffer.getvalue()[:-200])
    return "3.png"


def _empty(folder: Path) -> str:
    (folder / "3.png").write_bytes(b"")
    return "3.png"


def _broken_json(folder: Path) -> str:
    _write(folder, '[{"id": "a",')
    return "line 1 column"


def _not_a_list(folder: Path) -> str:
    _write(folder, '{"id": "a"}')
    return "must be one list of records"


def _marker_without_image(folder: Path) -> str:
    records = [_record(i, f"{i}.png") for i in range(10)]
    records[7]["conversations"][0]["value"] = "<image><image> Which?"
    _write(folder, records)
    return "record 7 (id 'r7')"


def _wrong_roles(folder: Path) -> str:
    records = [_record(i, f"{i}.png") for i in range(10)]
    records[2]["conversations"].reverse()
    _write(folder, records)
    return "record 2 (id 'r2')"


@pytest.mark.parametrize(
    "damage",
    [_missing, _truncated_jpeg, _empty, _broken_json, _not_a_list, _marker_without_image, _wrong_roles],
    ids=lambda damage: damage.__name__.strip("_"),
)
def test_broken_data_stops_train_with_one_line_that_names_it_before_any_stage(
    good: Path,
    short: Callable[..., Recipe],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], str],
) -> None:
    named = damage(good)
    code, _, lines = _train_by_command(short(good / "train.json"), tmp_path, capsys)
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert named in lines[0]
    assert "train.json" in lines[0]
    assert not (tmp_path / "run" / "instruct").exists()


def test_debug_keeps_the_traceback(
    good: Path, short: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (good / "3.png").unlink()
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(short(good / "train.json").model_dump(mode="json")))
    with pytest.raises(InputError, match=r"3\.png"):
        main(["--debug", "train", "--config", str(file), "--output", str(tmp_path / "run")])


def test_a_role_without_data_is_named_with_the_stage_that_needs_it(
    short: Callable[..., Recipe], good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = short(good / "train.json", train=None)
    code, _, lines = _train_by_command(recipe, tmp_path, capsys)
    assert code == 2
    assert lines == [
        "error: data.train: stage 'instruct' trains on data.train, which is not set. "
        "Add data.train=FILE (LLaVA JSON, JSONL or parquet)."
    ]


def test_all_faults_are_found_at_once(
    good: Path, short: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (good / "3.png").unlink()
    (good / "8.png").write_bytes(b"")
    _, _, lines = _train_by_command(short(good / "train.json"), tmp_path, capsys)
    assert "2 of 10 records cannot be used" in lines[0]
    assert "3.png" in lines[0]
    assert "8.png" in lines[0]


def test_skipping_leaves_bad_records_out_and_counts_and_names_them(
    good: Path, short: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (good / "3.png").unlink()
    (good / "8.png").write_bytes(b"")
    code, out, lines = _train_by_command(short(good / "train.json", on_bad_sample="skip"), tmp_path, capsys, "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["step"] == 1
    assert "train.json: 10 records, 10 images, 2 faults; 6 to train on, 2 held out" in lines
    left_out = [line for line in lines if line.startswith("  left out: ")]
    assert ["3.png" in left_out[0], "8.png" in left_out[1]] == [True, True]
    counts = json.loads((tmp_path / "run" / "provenance.json").read_text())["counts"]["train: train.json"]
    assert counts == {
        "records": 10,
        "listed": 0,
        "images": 10,
        "faults": 2,
        "train": 6,
        "validation": 2,
        "weight": 1.0,
        "per_epoch": 6,
    }


def test_training_leaves_out_what_data_check_has_listed(
    good: Path, short: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command that finds the faults to the run that skips them, by the file that the one writes."""
    (good / "3.png").unlink()
    records = [_record(i, f"{i}.png") for i in range(10)]
    records[5]["conversations"][1]["value"] = " "
    records[8]["id"] = "r2"
    _write(good, records)
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", "--data", str(good / "train.json"), "--output", str(tmp_path / "check")])
    assert stop.value.code == 1
    code, _, lines = _train_by_command(short(good / "train.json"), tmp_path, capsys)
    assert code == 2 and "2 of 10 records cannot be used" in " ".join(lines)
    recipe = short(good / "train.json", skip=[str(tmp_path / "check" / "faults.jsonl")])
    code, _, lines = _train_by_command(recipe, tmp_path, capsys)
    assert code == 0, lines
    counts = json.loads((tmp_path / "run" / "provenance.json").read_text())["counts"]["train: train.json"]
    assert (counts["records"], counts["listed"], counts["faults"]) == (10, 3, 0)
    assert counts["train"] + counts["validation"] == 7


def test_a_skipped_record_may_contain_what_looks_like_markup(
    good: Path, short: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [_record(i, f"{i}.png") for i in range(10)]
    records[4]["conversations"][1] = "[INST] red [/INST]"
    code, _, lines = _train_by_command(short(_write(good, records), on_bad_sample="skip"), tmp_path, capsys)
    assert code == 0
    assert any("[INST] red [/INST]" in line for line in lines)


def test_nothing_left_to_train_on_is_an_error_even_when_skipping(
    good: Path, short: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in good.glob("*.png"):
        path.unlink()
    code, _, lines = _train_by_command(short(good / "train.json", on_bad_sample="skip"), tmp_path, capsys)
    assert code == 2
    assert "None is left to train on" in lines[0]


def test_without_decoding_a_damaged_image_is_met_in_training_and_named_in_one_line(
    good: Path, short: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in good.glob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    recipe = short(good / "train.json", check_images=False)
    code, _, lines = _train_by_command(recipe, tmp_path, capsys)
    assert code == 2
    assert [line.startswith("error: image ") for line in lines if "rror" in line] == [True]


# Pictures of every kind.


def _png16(path: Path) -> None:
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40).save(path)


PICTURES: dict[str, Callable[[Path], None]] = {
    "rgba.png": lambda path: Image.fromarray(PIXELS).convert("RGBA").save(path),
    "palette.png": lambda path: Image.fromarray(PIXELS).convert("P").save(path),
    "grey.png": lambda path: Image.fromarray(PIXELS).convert("L").save(path),
    "grey_alpha.png": lambda path: Image.fromarray(PIXELS).convert("LA").save(path),
    "two_colours.png": lambda path: Image.fromarray(PIXELS).convert("1").save(path),
    "sixteen_bits.png": _png16,
    "cmyk.jpg": lambda path: Image.fromarray(PIXELS).convert("CMYK").save(path),
    "one_pixel.png": lambda path: Image.new("RGB", (1, 1)).save(path),
    "strip.png": lambda path: Image.new("RGB", (300, 1)).save(path),
}


def test_pictures_of_every_kind_train(
    short: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, save in PICTURES.items():
        save(tmp_path / name)
    file = _write(tmp_path, [_record(i, name) for i, name in enumerate(PICTURES)])
    recipe = short(file, validation_fraction=0.0)
    stage = recipe.stages[0].model_copy(update={"batch_size": len(PICTURES)})
    code, out, _ = _train_by_command(recipe.model_copy(update={"stages": [stage]}), tmp_path, capsys, "--json")
    assert code == 0
    assert np.isfinite(json.loads(out.splitlines()[-1])["loss"])


def test_records_with_no_one_and_several_pictures_train_together(
    good: Path, short: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    records = [_record(0, None), _record(1, "1.png"), _record(2, None), _record(3, None)]
    records[2] |= {"image": ["2.png", "3.png"]}
    records[2]["conversations"][0]["value"] = "Compare <image> with <image>."
    recipe = short(_write(good, records), validation_fraction=0.0)
    stage = recipe.stages[0].model_copy(update={"batch_size": 1, "max_steps": 4, "log_steps": 1})
    train(recipe.model_copy(update={"stages": [stage]}), tmp_path / "run", console=quiet)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(entry["loss"]) for entry in log)
    assert len(log) == 4


def test_contrastive_training_leaves_out_records_without_a_picture_and_says_how_many(
    good: Path, only_stage: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _write(good, [_record(i, None if i in (4, 5) else f"{i}.png") for i in range(10)])
    data = {"captions": str(file), "train": None, "validation_fraction": 0.0}
    recipe = only_stage("encoder", start=None, batch_size=4, max_steps=2, data=data)
    code, _, lines = _train_by_command(recipe, tmp_path, capsys)
    assert code == 0
    assert "encoder: 2 records without an image left out" in lines
