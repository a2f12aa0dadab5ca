"""Options scored from one prefill have the log probabilities of separate full passes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from symphony_vlm.data.sample import ImageRef, Message, TextPart
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.likelihood import choose, option_scores
from symphony_vlm.evaluation.options import Options, options_of
from symphony_vlm.evaluation.predictor import Predictor
from symphony_vlm.evaluation.runner import EvaluationPlan, evaluate
from symphony_vlm.evaluation.task import get_task
from symphony_vlm.moe.configuration import MoEConfig

TEXTS = (("A", "B", "C"), ("a red star", "yes", "no circle at the top", "a"), ("how many shapes",), ("B", "no"))
QUESTIONS = ("What?", "Which of these is seen in the picture?", "?", "Is it?")
IMAGES = (1, 2, 0, 1)


def item(number: int) -> EvaluationItem:
    refs = tuple(ImageRef(data=b"x", name=str(i)) for i in range(IMAGES[number]))
    return EvaluationItem(id=str(number), question=QUESTIONS[number], answers=("A",), images=refs)


@pytest.fixture(params=["dense", "smoe", "symphony_smoe", "token graph"])
def model(request: pytest.FixtureRequest, tiny_model_factory: Any) -> Any:
    moe = {
        "dense": None,
        "smoe": MoEConfig(num_experts=4, router="smoe"),
        "symphony_smoe": MoEConfig(num_experts=4, router="symphony_smoe"),
        "token graph": MoEConfig(num_experts=4, router="symphony_smoe", token_graph="similarity"),
    }[request.param]
    return tiny_model_factory(moe=moe)


def asked(model: Any) -> tuple[list[EvaluationItem], list[list[Tensor] | None]]:
    numbers = np.random.default_rng(0)
    pictures = [numbers.integers(0, 255, (20, 30, 3), dtype=np.uint8) for _ in range(sum(IMAGES))]
    encoded = iter(Predictor(model, batch_size=8, max_new_tokens=1).encode_images(pictures))
    return [item(n) for n in range(4)], [[next(encoded) for _ in range(n)] or None for n in IMAGES]


@torch.no_grad()
def separately(model: Any, one: EvaluationItem, images: Sequence[Tensor] | None, text: str) -> float:
    """The definition: a full pass over prompt and answer, the sum over the answer's tokens."""
    messages = [*one.messages, Message(role="assistant", parts=(TextPart(text=text),))]
    encoded = model.processor.encode(messages)
    ids = torch.tensor([encoded.input_ids])
    log_SV = model(input_ids=ids, image_features=images).logits[0].log_softmax(-1)
    stops = model.processor.stop_token_ids
    answer = [n for n, label in enumerate(encoded.labels) if label >= 0 and label not in stops]
    return sum(float(log_SV[n - 1, ids[0, n]]) for n in answer)


def test_scores_are_those_of_a_full_pass_for_each_option(model: Any) -> None:
    items, features = asked(model)
    found = option_scores(model, items, features, TEXTS)
    for one, images, texts, scores in zip(items, features, TEXTS, found, strict=True):
        for text, score in zip(texts, scores, strict=True):
            # fp32 sums of up to a dozen terms near 6, in another order.
            assert score.log_probability == pytest.approx(separately(model, one, images, text), abs=1e-5)
            assert score.n_tokens >= 1
            assert score.per_token == score.log_probability / score.n_tokens
    assert {score.n_tokens > 1 for scores in found for score in scores} == {True, False}


def test_the_choice_does_not_depend_on_the_batch_and_is_the_likeliest_option(model: Any) -> None:
    items, features = asked(model)
    offered = [Options(texts=texts, answers=tuple(f"<{text}>" for text in texts)) for texts in TEXTS]
    together = choose(model, items, features, offered)
    for n, answer in enumerate(together):
        assert choose(model, items[n : n + 1], features[n : n + 1], offered[n : n + 1]) == [answer]
        scores = [separately(model, items[n], features[n], text) for text in TEXTS[n]]
        assert answer == f"<{TEXTS[n][int(np.argmax(scores))]}>"
        means = [s / t for s, t in zip(scores, answer.facts["n_option_tokens"], strict=True)]
        assert answer.facts["prediction_per_token"] == f"<{TEXTS[n][int(np.argmax(means))]}>"
        assert answer.facts["log_probabilities"] == pytest.approx(scores, abs=6e-4), "rounded to three digits"


def test_letters_are_scored_where_the_reference_is_one_and_texts_elsewhere() -> None:
    choices = ("a cat", " a dog ")
    by_letter = options_of(EvaluationItem(id="1", question="?", answers=("B",), choices=choices))
    assert by_letter == Options(texts=("A", "B"), answers=("A", "B"))
    by_text = options_of(EvaluationItem(id="1", question="?", answers=("a cat",), choices=choices))
    assert by_text == Options(texts=("a cat", "a dog"), answers=("a cat", "a dog"))
    assert options_of(EvaluationItem(id="1", question="?", answers=("B",))) is None


def test_an_evaluation_scored_by_likelihood(tiny_model_folder: Path, tmp_path: Path) -> None:
    questions = [
        {"question_id": n, "question": f"What is {n}?", "answer": "AB"[n % 2], "question_type_id": 1}
        | {f"choice_{letter}": f"{text} {n}" for letter, text in zip("abcd", ("cat", "dog", "red", "top"), strict=True)}
        for n in range(4)
    ]
    data = tmp_path / "SEED-Bench.json"
    data.write_text(json.dumps({"questions": questions, "question_type": {"Scene": 1}}))
    plan = EvaluationPlan(model=str(tiny_model_folder), tasks=("seedbench",), data=data, scoring="likelihood")
    evaluate(plan, tmp_path / "out", console=Console(quiet=True))
    lines = (tmp_path / "out" / "predictions" / "seedbench.none.0.jsonl").read_text().splitlines()
    for n, record in enumerate(map(json.loads, lines)):
        assert record["options"] == [f"cat {n}", f"dog {n}", f"red {n}", f"top {n}"]
        assert record["prediction"] == "ABCD"[int(np.argmax(record["log_probabilities"]))]
        assert record["parse_status"] == "ok"
        assert record["score"] == float(record["prediction"] == record["answer"])
        assert (record["n_new_tokens"], record["stop_reason"]) == (0, "likelihood")
    assert len(lines) == 4
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["scoring"] == "likelihood"


def test_seedbench_asks_without_the_options_as_its_authors_do() -> None:
    item = EvaluationItem(id="1", question="What?\nA. a\nB. b", answers=("A",), choices=("a", "b"), asked="What?")
    assert get_task("seedbench").options(item) == Options(question="What?", texts=("a", "b"), answers=("A", "B"))
