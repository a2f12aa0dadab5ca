"""What can be scored without looking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from symphony_vlm.data.sample import ImagePart, ImageRef, Message, Sample, TextPart
from symphony_vlm.evaluation.baselines import constant_baselines, same_question_baseline, text_only_baseline
from symphony_vlm.evaluation.task import EvaluationItem, get_task


def _items(*answers: tuple[str, str | None]) -> list[EvaluationItem]:
    return [
        EvaluationItem(id=str(i), question="What?", answers=(answer,), image_key=f"p{i // 2}", group=group)
        for i, (answer, group) in enumerate(answers)
    ]


def test_the_best_constant_answer_and_the_best_per_group_are_counted_by_hand() -> None:
    items = _items(("yes", "a"), ("yes", "a"), ("no", "a"), ("2", "b"), ("2", "b"), ("3", "b"))
    overall, by_group = constant_baselines("t", items, seed=0)
    assert overall["name"] == "constant answer ('yes')"
    assert overall["value"] == pytest.approx(2 / 6)
    assert by_group["value"] == pytest.approx(4 / 6)
    assert overall["n_items"] == 6
    for row in (overall, by_group):
        assert row["ci_low"] <= row["value"] <= row["ci_high"]


def test_without_groups_there_is_one_baseline() -> None:
    assert len(constant_baselines("t", _items(("yes", None), ("no", None)), seed=0)) == 1


def test_any_accepted_answer_counts() -> None:
    items = _items(("grey", None), ("grey", None))
    items.append(EvaluationItem(id="x", question="?", answers=("gray", "grey"), image_key="q"))
    assert constant_baselines("t", items, seed=0)[0]["value"] == 1.0


def test_the_text_only_model_gets_the_question_but_no_trace_of_the_picture(tiny_model: Any) -> None:
    seen: list[Any] = []
    language_model, tokenizer = tiny_model.language_model, tiny_model.processor.tokenizer
    original = language_model.generate

    def generate(**kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"])
        return original(**kwargs)

    language_model.generate = generate
    picture = ImageRef(path=Path("never_opened.png"), name="never_opened.png")
    items = [
        EvaluationItem(id="a", question="What color is it?", answers=("red",), images=(picture,), image_key="a"),
        EvaluationItem(
            id="b", question="Is the circle at the top?", answers=("yes",), images=(picture,), image_key="b"
        ),
    ]
    row = text_only_baseline(language_model, tokenizer, "compact", get_task("scenes"), items, seed=0)
    assert row["name"].startswith("text only")
    assert row["n_items"] == 2
    assert 0 <= row["value"] <= 1
    (ids,) = seen
    assert tiny_model.config.image_token_id not in ids.flatten().tolist()
    texts = tokenizer.batch_decode(ids)
    assert all(item.question in text for item, text in zip(items, texts, strict=True))


def test_the_text_only_baseline_does_not_depend_on_the_others_in_the_batch(tiny_model: Any) -> None:
    items = [EvaluationItem(id=str(i), question="What? " * (i + 1), answers=("a",), image_key=str(i)) for i in range(3)]
    answers: list[list[str]] = []
    task = get_task("scenes")

    def ask(chosen: list[EvaluationItem]) -> None:
        import dataclasses

        given: list[str] = []

        def score(prediction: str, item: EvaluationItem) -> Any:
            given.append(prediction)
            return task.score(prediction, item)

        recording = dataclasses.replace(task, score=score, max_new_tokens=4)
        model, tokenizer = tiny_model.language_model, tiny_model.processor.tokenizer
        text_only_baseline(model, tokenizer, "compact", recording, chosen, seed=0)
        answers.append(given)

    ask(items)
    for item in items:
        ask([item])
    assert [answer for single in answers[1:] for answer in single] == answers[0]


def _conversation(*turns: tuple[str, str]) -> Sample:
    messages = []
    for number, (question, answer) in enumerate(turns):
        picture = (ImagePart(index=0), TextPart(text=f"\n{question}")) if number == 0 else (TextPart(text=question),)
        messages.append(Message(role="user", parts=picture))
        messages.append(Message(role="assistant", parts=(TextPart(text=answer),)))
    return Sample(id="s", origin="train.json: record 0", messages=tuple(messages))


def test_the_words_alone_give_the_most_frequent_training_answer_to_the_same_question_or_to_its_form() -> None:
    training = [
        _conversation(("What color is it?", "red"), ("How many stars are there?", "2")),
        _conversation(("What color is it?", "red"), ("What color is the star?", "blue")),
        _conversation(("What color is it?", "blue"), ("Where?\nA. here\nB. there\nOne letter.", "B")),
    ]

    def value(question: str, answer: str) -> float:
        item = EvaluationItem(id="a", question=question, answers=(answer,), image_key="a")
        row = same_question_baseline(get_task("scenes"), [item], training, seed=0)
        return float(row["value"])

    assert value("What color is it?", "red") == 1.0, "twice red, once blue"
    assert value("What color is the star?", "blue") == 1.0, "the same words win over the form, where red is as frequent"
    assert value("What color is the ring?", "red") == 1.0, "its form: red, red, blue, blue; the first seen wins"
    assert value("How many rings are there?", "2") == 1.0
    assert value("Where?\nA. up\nB. down\nOne letter.", "B") == 1.0, "a choice's form includes its last line"
    assert value("Is there a star?", "red") == 1.0, "a form never seen gets the most frequent answer of all"
