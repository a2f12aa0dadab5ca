"""GQA: every figure against a plain loop over the questions."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.metrics import metric_intervals
from symphony_vlm.evaluation.scoring import score_files
from symphony_vlm.evaluation.task import get_task
from symphony_vlm.evaluation.tasks.gqa import distribution
from symphony_vlm.files import write_json

STEPS = [
    {"operation": "select", "argument": "dog (1)", "dependencies": []},
    {"operation": "relate", "argument": "near,s (2)", "dependencies": [0]},
    {"operation": "query", "argument": "name", "dependencies": [1]},
]


def _questions(n: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    rng = random.Random(seed)
    questions: dict[str, dict[str, Any]] = {}
    for number in range(n):
        structural = rng.choice(["query", "verify", "choose"])
        entailed = [f"20{rng.randrange(n)}" for _ in range(rng.randrange(3))]
        questions[f"20{number}"] = {
            "question": " ".join(["word"] * rng.randint(3, 5)) + "?",
            "answer": rng.choice(["red", "blue", "dog"]) if structural != "verify" else rng.choice(["yes", "no"]),
            "imageId": f"n{number // 4}",
            "isBalanced": number % 7 != 0,
            "types": {"structural": structural, "semantic": rng.choice(["attr", "rel"]), "detailed": "x"},
            "groups": {"global": rng.choice(["color", "animal", None]), "local": "l"},
            "entailed": [f"20{number}", *entailed, "not in the file"],
            "semantic": STEPS[: rng.randint(1, 3)],
        }
    return questions


def _oracle(questions: dict[str, dict[str, Any]], predictions: dict[str, str]) -> dict[str, float]:
    """The authors' loop."""
    scores: dict[str, list[float]] = defaultdict(list)
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    said: dict[str, Counter[str]] = defaultdict(Counter)

    def right(question_id: str) -> float:
        return float(predictions.get(question_id) == questions[question_id]["answer"])

    for question_id, question in questions.items():
        if not question["isBalanced"]:
            continue
        steps = sum(
            not any(o in f"{s['operation']}: {s['argument']}" for o in ("exist", "query: name", "choose name"))
            for s in question["semantic"]
        )
        kind = question["types"]["structural"]
        for name in (
            "accuracy",
            "accuracy/open" if kind == "query" else "accuracy/binary",
            f"accuracy/structural/{kind}",
            f"accuracy/semantic/{question['types']['semantic']}",
            f"accuracy/words/{len(question['question'].split())}",
            f"accuracy/steps/{steps}",
        ):
            scores[name].append(right(question_id))
        others = [e for e in question["entailed"] if e != question_id and e in questions]
        if right(question_id) and others:
            scores["consistency"].append(sum(map(right, others)) / len(others))
        if (group := question["groups"]["global"]) is not None:
            gold[group][question["answer"]] += 1
            if question_id in predictions:
                said[group][predictions[question_id]] += 1
    result = {name: sum(values) / len(values) for name, values in scores.items()}
    total = weight = 0.0
    for group, answers in gold.items():
        size = sum(answers.values())
        total += size * sum((said[group][a] - e) ** 2 / e for a, e in answers.items())
        weight += size
    return {**result, "distribution": total / weight / 100}


@pytest.mark.parametrize("seed", range(3))
def test_all_figures_are_those_of_the_loop(tmp_path: Path, seed: int) -> None:
    questions = _questions(80, seed)
    rng = random.Random(seed + 100)
    predictions = {
        question_id: question["answer"] if rng.random() < 0.5 else rng.choice(["red", "no", "zebra"])
        for question_id, question in questions.items()
        if rng.random() < 0.95
    }
    write_json(tmp_path / "q.json", questions)
    write_json(tmp_path / "p.json", [{"questionId": q, "prediction": p} for q, p in predictions.items()])
    found = score_files(get_task("gqa"), tmp_path / "p.json", annotations=tmp_path / "q.json")
    values = {name: value for name, value in found.values.items() if value is not None}
    assert values == pytest.approx(_oracle(questions, predictions))
    assert set(found.values) - set(values) == {"validity", "plausibility"}


def test_a_bootstrap_of_the_distribution_is_that_of_the_resampled_questions(tmp_path: Path) -> None:
    questions = _questions(40)
    write_json(tmp_path / "q.json", questions)
    write_json(tmp_path / "p.json", [{"questionId": q, "prediction": "red"} for q in questions])
    outcomes = score_files(get_task("gqa"), tmp_path / "p.json", annotations=tmp_path / "q.json").outcomes
    metric = next(m for m in get_task("gqa").metrics(outcomes) if m.name == "distribution")
    weights = np.random.default_rng(0).integers(0, 3, len(outcomes))
    weighted = float(metric.combine(weights @ metric.terms(outcomes)))
    many = {
        f"{name}#{copy}": question
        for (name, question), weight in zip(questions.items(), weights, strict=True)
        for copy in range(weight)
    }
    assert weighted == pytest.approx(_oracle(many, dict.fromkeys(many, "red"))["distribution"])
    interval = metric_intervals([metric], outcomes, seed=0, n_resamples=200)["distribution"]
    assert interval is not None
    assert interval.low <= interval.high


def test_a_perfect_prediction_has_distribution_0_and_no_question_has_none() -> None:
    assert distribution(["a", "a"], np.array([3.0, 1.0, 3.0, 1.0])) == 0
    assert np.isnan(distribution(["a"], np.array([0.0, 0.0])))
    assert distribution(["a", "a"], np.array([2.0, 2.0, 4.0, 0.0])) == pytest.approx(0.04)


@pytest.mark.parametrize(("text", "right"), [("Yes.", True), ("yes..", True), ("yes ", True), ("yes!", False)])
def test_final_periods_go_and_case_does_not_matter(tmp_path: Path, text: str, right: bool) -> None:
    question = {**_questions(1)["200"], "answer": "yes", "isBalanced": True}
    write_json(tmp_path / "q.json", {"1": question})
    (tmp_path / "a.jsonl").write_text(json.dumps({"question_id": "1", "prompt": "", "text": text}) + "\n")
    found = score_files(get_task("gqa"), tmp_path / "a.jsonl", annotations=tmp_path / "q.json")
    assert found.values["accuracy"] == float(right)


def test_the_hubs_folder_with_pictures_in_a_subset_of_their_own(tmp_path: Path) -> None:
    import datasets

    rows = [{"id": name, **question, "entailed": str(question["entailed"])} for name, question in _questions(8).items()]
    images = [{"id": f"n{number}", "image": {"bytes": bytes([number]), "path": None}} for number in range(2)]
    for part, content in (("instructions", rows), ("images", images)):
        folder = tmp_path / f"testdev_balanced_{part}"
        folder.mkdir()
        datasets.Dataset.from_list(content).to_parquet(folder / "testdev-00000-of-00001.parquet")
    items = get_task("gqa").load(tmp_path, None, tmp_path, 0)
    assert items[5].images[0].data == b"\x01"
    assert items[5].image_key == "n1.jpg"
    assert {"205", "file"} <= set(items[5].meta["entailed"])
    assert items[5].question.endswith("?\nAnswer the question using a single word or phrase.")


def test_an_id_that_is_unknown_or_stands_twice(tmp_path: Path) -> None:
    write_json(tmp_path / "q.json", _questions(3))
    for ids, message in [(["209"], "'209' is no question"), (["201", "201"], "record 1: a second answer to '201'")]:
        write_json(tmp_path / "p.json", [{"questionId": name, "prediction": "a"} for name in ids])
        with pytest.raises(InputError, match=message):
            score_files(get_task("gqa"), tmp_path / "p.json", annotations=tmp_path / "q.json")


def test_annotations_given_as_predictions_are_no_perfect_score(tmp_path: Path) -> None:
    write_json(tmp_path / "q.json", _questions(3))
    with pytest.raises(InputError, match="no answer: none of the fields text, prediction"):
        score_files(get_task("gqa"), tmp_path / "q.json", annotations=tmp_path / "q.json")
