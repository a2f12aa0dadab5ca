"""TextVQA: prompts with and without OCR tokens, LLaVA's key, and what the answers' prompts say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.scoring import score_files
from symphony_vlm.evaluation.task import get_task
from symphony_vlm.files import write_json

SHORT = "\nAnswer the question using a single word or phrase."


def _record(question_id: int, image_id: str, question: str, *answers: str, **more: Any) -> dict[str, Any]:
    filled = [*answers, *(f"other {i}" for i in range(10 - len(answers)))]
    return {"question_id": question_id, "image_id": image_id, "question": question, "answers": filled, **more}


RECORDS = [
    _record(34602, "003a", "What is the Brand?", "nokia", "nokia", "Nokia", "nokia"),
    _record(34603, "003a", "what number?", "2", "two"),
    _record(34604, "1b", "what number?", "3"),
    _record(34605, "1b", "who?", "bob"),
]


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    folder = tmp_path / "textvqa"
    write_json(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": RECORDS})
    return folder


def _answers(path: Path, *rows: tuple[str, str, str]) -> Path:
    lines = [{"question_id": image, "prompt": prompt, "text": text, "model_id": "m"} for image, prompt, text in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _items(task: str, data: Path) -> list[Any]:
    return list(get_task(task).load(data, None, data, 0))


def test_prompts_without_tokens_with_them_and_with_none_found(annotations: Path) -> None:
    assert _items("textvqa", annotations)[0].question == f"What is the Brand?{SHORT}"
    rosetta = [{"image_id": "003a", "ocr_tokens": ["NOKIA", "e5"]}, {"image_id": "1b", "ocr_tokens": []}]
    write_json(annotations / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": rosetta})
    first, _, third, _ = _items("textvqa", annotations)
    assert first.question == f"What is the Brand?\nReference OCR token: NOKIA, e5{SHORT}"
    assert third.question == f"what number?\nReference OCR token: {SHORT}", "the line is present and empty"
    assert first.meta["with_ocr"]
    assert _items("textvqa_no_ocr", annotations)[0].question == f"What is the Brand?{SHORT}"
    assert first.images[0].path == annotations / "003a.jpg"


def test_llavas_prompts_are_taken_as_they_are(annotations: Path) -> None:
    text = f"what is the brand?\nReference OCR token: Nokia{SHORT}"
    line = {"question_id": "003a", "image": "003a.jpg", "text": text, "category": "default"}
    (annotations / "llava_textvqa_val_v051_ocr.jsonl").write_text(json.dumps(line) + "\n")
    first, second, *_ = _items("textvqa", annotations)
    assert first.question == text
    assert first.meta["with_ocr"]
    assert not second.meta["with_ocr"]


@pytest.mark.parametrize(
    ("ocr", "named"), [("\nReference OCR token: a, b", "accuracy/with_ocr"), ("", "accuracy/without_ocr")]
)
def test_answers_join_by_image_and_question_in_any_order(
    annotations: Path, tmp_path: Path, ocr: str, named: str
) -> None:
    predictions = _answers(
        tmp_path / "answers.jsonl",
        ("1b", f"what number?{ocr}{SHORT}", "3"),
        ("003a", f"what number?{ocr}{SHORT}", "Two"),
        ("003a", f"What is the brand?{ocr}{SHORT}", "Nokia."),
    )
    found = score_files(get_task("textvqa"), predictions, annotations=annotations / "TextVQA_0.5.1_val.json")
    # 4 matches; "2" and "two" are both 2: 2 matches; 1 match; missing.
    assert [outcome.scored.score for outcome in found.outcomes] == [1.0, 0.6, 0.3, 0.0]
    assert found.values == {"accuracy": pytest.approx(1.9 / 4), named: pytest.approx(1.9 / 4)}
    assert found.missing == ["34605"]
    assert found.subset


def test_results_by_question_id_say_nothing_of_ocr(annotations: Path, tmp_path: Path) -> None:
    path = write_results(tmp_path / "results.json", [{"question_id": 34602, "answer": "nokia"}])
    found = score_files(get_task("textvqa"), path, annotations=annotations)
    assert set(found.values) == {"accuracy", "accuracy/ocr_unknown"}
    assert found.outcomes[0].scored.score == 1.0


def write_results(path: Path, value: Any) -> Path:
    write_json(path, value)
    return path


def test_the_same_question_twice_about_a_picture_takes_two_answers_and_no_third(tmp_path: Path) -> None:
    data = tmp_path / "TextVQA_0.5.1_val.json"
    write_json(data, {"data": [_record(1, "a", "Who?", "x"), _record(2, "a", "who?", "x")]})
    prompt = f"who?{SHORT}"
    two = _answers(tmp_path / "two.jsonl", ("a", prompt, "x"), ("a", prompt, "y"))
    assert score_files(get_task("textvqa"), two, annotations=data).values["accuracy"] == pytest.approx(0.15)
    three = _answers(tmp_path / "three.jsonl", *[("a", prompt, "x")] * 3)
    with pytest.raises(InputError, match=r"three.jsonl: line 3: a second answer to 'a', 'who\?'"):
        score_files(get_task("textvqa"), three, annotations=data)


def test_an_answer_without_an_item_is_an_error(annotations: Path, tmp_path: Path) -> None:
    path = _answers(tmp_path / "a.jsonl", ("zz", f"who?{SHORT}", "x"))
    with pytest.raises(InputError, match=r"line 1: 'zz', 'who\?' is no question of the benchmark"):
        score_files(get_task("textvqa"), path, annotations=annotations)


@pytest.mark.parametrize("answers", [["a"] * 9, ["a"] * 9 + [None], "aaaaaaaaaa"])
def test_ten_answers_are_needed(tmp_path: Path, answers: Any) -> None:
    data = tmp_path / "TextVQA_0.5.1_val.json"
    write_json(data, {"data": [{**_record(1, "a", "q"), "answers": answers}]})
    with pytest.raises(InputError, match=r"TextVQA_0.5.1_val.json: record 0: field 'answers'"):
        _items("textvqa", data)


def test_the_hubs_parquet(tmp_path: Path) -> None:
    import datasets

    rows = [
        {**record, "image": {"bytes": b"png", "path": None}, "ocr_tokens": ["A", "b"], "set_name": "val"}
        for record in RECORDS
    ]
    (tmp_path / "hub/data").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "hub/data/validation-00000-of-00003.parquet")
    items = _items("textvqa", tmp_path / "hub")
    assert items[0].question == f"What is the Brand?\nReference OCR token: A, b{SHORT}"
    assert items[0].images[0].data == b"png"
    assert items[0].image_key == items[1].image_key != items[2].image_key
    assert items[0].answers[:3] == ("nokia", "nokia", "Nokia")
