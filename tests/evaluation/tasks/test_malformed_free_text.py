"""Over a thousand broken records: each is read as what it says, or is one error that names its file."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.scoring import score_files
from symphony_vlm.evaluation.task import get_task

JUNK: list[Any] = [None, 5, True, "", "x", [], {}, [None], ["x"], [[1]], {"a": 1}, "\ud800"]
TEN = [{"answer": "yes", "answer_id": i, "answer_confidence": "yes"} for i in range(10)]
GQA = {
    "question": "Is it?",
    "answer": "yes",
    "imageId": "n1",
    "isBalanced": True,
    "types": {"structural": "verify", "semantic": "obj"},
    "groups": {"global": "g"},
    "entailed": ["2"],
    "semantic": [{"operation": "exist", "argument": "?"}],
}
VISTA = {
    "pid": "1",
    "question": "Q?",
    "image": "1.jpg",
    "choices": ["1", "2"],
    "unit": "m",
    "precision": 1.0,
    "answer": "1",
    "question_type": "multi_choice",
    "answer_type": "text",
    "metadata": {"task": "t", "skills": ["a"]},
    "response": "1",
    "extraction": "A",
}
VQA = {"question_id": 1, "image_id": 2, "question": "Q?", "question_type": "is", "answer_type": "yes/no"}

CASES: dict[str, tuple[Any, Any]] = {
    "textvqa": (
        {"data": [{"question_id": 1, "image_id": "a", "question": "Q?", "answers": ["a"] * 10, "ocr_tokens": ["b"]}]},
        [{"question_id": "a", "prompt": "Q?\nAnswer the question using a single word or phrase.", "text": "a"}],
    ),
    "vqav2": ({"annotations": [{**VQA, "answers": TEN}]}, [{"question_id": 1, "answer": "yes"}]),
    "vizwiz": (
        [{"image": "1.jpg", "question": "Q?", "answers": TEN, "answer_type": "other", "answerable": 1}],
        [{"image": "1.jpg", "answer": "yes"}],
    ),
    "gqa": ({"1": GQA, "2": {**GQA, "entailed": ["1"]}}, [{"questionId": "1", "prediction": "yes"}]),
    "chartqa": (
        [{"imgname": "1.png", "query": "Q?", "label": "5", "id": "1"}],
        [{"imgname": "1.png", "query": "Q?", "question_id": "1", "prediction": "5"}],
    ),
    "ocrbench": (
        [{"id": 1, "dataset_name": "d", "image_path": "1.png", "question": "Q?", "answers": ["a"], "type": "t"}],
        [{"id": 1, "predict": "a"}],
    ),
    "mathvista": ({"1": VISTA}, {"1": {"response": "A", "extraction": "A"}}),
    "mmvet": (
        {"v1_1": {"imagename": "1.jpg", "question": "Q?", "answer": "a", "capability": ["ocr"]}},
        {"v1_1": {"model": ["judge"], "content": ["1"], "score": [1.0]}},
    ),
    "llava_bench": (
        [{"question_id": 1, "image": "1.jpg", "category": "conv", "text": "Q?", "caption": ["c"], "gpt_answer": "a"}],
        [{"question_id": 1, "category": "conv", "content": "8 9", "tuple": [8, 9]}],
    ),
}


def _broken(value: Any) -> Iterator[Any]:
    """The value with each of its parts removed, or replaced by junk."""
    for place in _places(value):
        for junk in ["removed", *JUNK]:
            changed = copy.deepcopy(value)
            *way, last = place
            parent = changed
            for step in way:
                parent = parent[step]
            if junk == "removed":
                del parent[last]
            else:
                parent[last] = junk
            yield changed


def _places(value: Any) -> Iterator[tuple[Any, ...]]:
    keys = value.keys() if isinstance(value, dict) else range(min(len(value), 2)) if isinstance(value, list) else ()
    for key in keys:
        yield (key,)
        yield from ((key, *rest) for rest in _places(value[key]))


def _write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", CASES)
def test_broken_files_give_a_score_or_one_error(name: str, tmp_path: Path) -> None:
    annotations, predictions = CASES[name]
    task = get_task(name)
    variants = [(broken, predictions) for broken in _broken(annotations)]
    variants += [(annotations, broken) for broken in _broken(predictions)]
    errors = 0
    for truth, answers in variants:
        files = _write(tmp_path / "truth.json", truth), _write(tmp_path / "answers.json", answers)
        try:
            score_files(task, files[1], annotations=files[0]).to_dict()
        except InputError as error:
            errors += 1
            assert "truth.json" in str(error) or "answers.json" in str(error)
        except Exception as error:
            raise AssertionError(f"{error!r} of {truth} and {answers}") from error
    assert len(variants) > 100
    assert errors > len(variants) / 10


@pytest.mark.parametrize("name", ["ocrbench", "mathvista", "mmvet", "llava_bench"])
def test_broken_files_that_hold_the_truth_themselves(name: str, tmp_path: Path) -> None:
    annotations, predictions = CASES[name]
    whole = {
        "ocrbench": [{**annotations[0], "predict": "a"}] if name == "ocrbench" else None,
        "mathvista": annotations,
    }.get(name, predictions)
    for broken in _broken(whole):
        path = _write(tmp_path / "answers.json", broken)
        try:
            score_files(get_task(name), path).to_dict()
        except InputError as error:
            assert "answers.json" in str(error)
        except Exception as error:
            raise AssertionError(f"{error!r} of {broken}") from error


def test_there_are_over_a_thousand_of_them() -> None:
    assert sum(1 for pair in CASES.values() for value in pair for _ in _broken(value)) > 1000
