"""Batches of questions: each answer as if it had been asked alone."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from PIL import Image

from symphony_vlm.data.sample import ImagePart, Message, TextPart
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration as Model
from symphony_vlm.serving.batching import BatchScheduler, Closed, QueueFull
from symphony_vlm.serving.jobs import Event, Failed, Finished, Job, Picture, Piece, Row
from symphony_vlm.serving.sampling import SamplingSettings

QUESTIONS = ["What color is the circle?", "no", "How many shapes are there? " * 4, "a small red star", "x" * 60, "?"]
Schedulers = Callable[..., BatchScheduler]


@pytest.fixture
def start(tiny_moe_model: Model) -> Iterator[Schedulers]:
    started: list[BatchScheduler] = []

    def make(**settings: Any) -> BatchScheduler:
        started.append(BatchScheduler(tiny_moe_model, **settings))
        return started[-1]

    yield make
    for scheduler in started:
        scheduler.close(timeout=0)
        scheduler.close(timeout=10)
        assert not scheduler.is_open


class Asked:
    """A job with what became of it."""

    def __init__(self, model: Model, text: str, *, num_pictures: int = 0, **settings: Any) -> None:
        processor = model.processor
        assert processor is not None
        noise = [Image.effect_noise((40 + 8 * i, 40), 90).convert("RGB") for i in range(num_pictures)]
        pictures = tuple(
            Picture(key=str(id(image)), inputs=processor.image_processor(image), num_tokens=16) for image in noise
        )
        parts = (*(ImagePart(index=i) for i in range(num_pictures)), TextPart(text=text))
        encoded = processor.encode([Message(role="user", parts=parts)], generation_prompt=True)
        self.events: queue.Queue[Event] = queue.Queue()
        chosen = SamplingSettings(**{"max_tokens": 12, **settings})
        self.job = Job(input_ids=encoded.input_ids, pictures=pictures, settings=chosen, emit=self.events.put)

    def result(self) -> tuple[str, Finished | Failed]:
        text = ""
        while isinstance(event := self.events.get(timeout=30), Piece):
            text += event.text
        assert self.events.empty()
        return text, event


def ask(scheduler: BatchScheduler, questions: list[Asked]) -> list[tuple[str, Finished | Failed]]:
    for question in questions:
        scheduler.submit(question.job)
    return [question.result() for question in questions]


def batch_sizes(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    original = model.generate

    def generate(**arguments: Any) -> Any:
        sizes.append(len(arguments["input_ids"]))
        return original(**arguments)

    monkeypatch.setattr(model, "generate", generate)
    return sizes


def mixed_questions(model: Model) -> list[Asked]:
    """Greedy and sampled rows of different lengths, some with pictures."""
    return [
        Asked(model, QUESTIONS[0], num_pictures=1),
        Asked(model, QUESTIONS[1], max_tokens=3),
        Asked(model, QUESTIONS[2], temperature=1.0, seed=5),
        Asked(model, QUESTIONS[3], num_pictures=2, temperature=1.5, top_p=0.9, seed=6),
        Asked(model, QUESTIONS[4], max_tokens=20),
        Asked(model, QUESTIONS[5], temperature=0.8, seed=-7, max_tokens=20),
    ]


def test_answers_do_not_depend_on_the_batch(
    tiny_moe_model: Model, start: Schedulers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 the sums of a padded batch differ in the last digits only, far from changing a token of this model."""
    questions = mixed_questions(tiny_moe_model)
    sizes = batch_sizes(tiny_moe_model, monkeypatch)
    alone = [ask(start(max_batch=1), [question])[0] for question in questions]
    assert sizes == [1] * 6
    again = mixed_questions(tiny_moe_model)
    for new, old in zip(again, questions, strict=True):
        new.job.pictures = old.job.pictures
    assert ask(start(gather_seconds=1.0, max_batch=6), again) == alone
    assert sizes[6:] == [6]
    assert [end.num_tokens for _, end in alone if isinstance(end, Finished)][1] <= 3


def test_greedy_answers_equal_the_models_own(tiny_moe_model: Model, start: Schedulers) -> None:
    questions = [Asked(tiny_moe_model, text) for text in QUESTIONS]
    expected = [tiny_moe_model.chat(text, max_new_tokens=12) for text in QUESTIONS]
    assert [text for text, _ in ask(start(gather_seconds=1.0, max_batch=6), questions)] == expected


def test_seeds_decide_and_no_seed_is_another_each_time(tiny_moe_model: Model, start: Schedulers) -> None:
    def answers(seed: int | None) -> set[str]:
        many = [Asked(tiny_moe_model, "What?", temperature=1.5, seed=seed) for _ in range(4)]
        return {text for text, _ in ask(start(), many)}

    assert len(answers(3)) == 1
    assert answers(3) != answers(4)
    assert len(answers(None)) == 4


def test_a_stop_text_ends_one_row_and_not_its_neighbour(tiny_moe_model: Model, start: Schedulers) -> None:
    (whole, end), *_ = ask(start(), [Asked(tiny_moe_model, "What?", max_tokens=30)])
    assert end == Finished("length", 30)
    stop = whole[8:11]
    stopped, other = ask(
        start(gather_seconds=1.0, max_batch=2),
        [Asked(tiny_moe_model, "What?", max_tokens=30, stop=("never", stop)), Asked(tiny_moe_model, "What?")],
    )
    assert stopped[0] == whole[: whole.index(stop)].strip()
    assert isinstance(stopped[1], Finished)
    assert stopped[1].reason == "stop"
    assert stopped[1].num_tokens < 30
    assert other[1] == Finished("length", 12)


def test_what_arrives_during_a_batch_waits_for_the_next(
    tiny_moe_model: Model, start: Schedulers, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, go_on = hold_steps(tiny_moe_model, monkeypatch)
    sizes = batch_sizes(tiny_moe_model, monkeypatch)
    scheduler = start(max_waiting=3)
    first, *others = [Asked(tiny_moe_model, text) for text in QUESTIONS]
    scheduler.submit(first.job)
    assert running.wait(10)
    for other in others[:3]:
        scheduler.submit(other.job)
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 3)
    with pytest.raises(QueueFull):
        scheduler.submit(others[3].job)
    go_on.set()
    assert all(isinstance(other.result()[1], Finished) for other in (first, *others[:3]))
    assert sizes == [1, 3]


def hold_steps(model: Model, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Stops the language model before each pass until the second event is set; the first says that it is there."""
    running, go_on = threading.Event(), threading.Event()
    original = model.language_model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        running.set()
        assert go_on.wait(10)
        return original(*args, **kwargs)

    monkeypatch.setattr(model.language_model, "forward", forward)
    return running, go_on


def test_a_cancelled_question_frees_its_place(
    tiny_moe_model: Model, start: Schedulers, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, go_on = hold_steps(tiny_moe_model, monkeypatch)
    sizes = batch_sizes(tiny_moe_model, monkeypatch)
    scheduler = start()
    endless, waiting, last = (Asked(tiny_moe_model, text, max_tokens=400) for text in ("One?", "Two?", "Three?"))
    scheduler.submit(endless.job)
    assert running.wait(10)
    scheduler.submit(waiting.job)
    scheduler.submit(last.job)
    endless.job.cancelled.set()
    waiting.job.cancelled.set()
    go_on.set()
    assert isinstance(last.result()[1], Finished)
    assert endless.events.empty()
    assert waiting.events.empty()
    assert sizes == [1, 1]


@pytest.mark.parametrize(
    ("error", "out_of_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("matrix made of cheese"), False),
    ],
)
def test_one_questions_error_is_not_its_neighbours(
    tiny_moe_model: Model, start: Schedulers, monkeypatch: pytest.MonkeyPatch, error: Exception, out_of_memory: bool
) -> None:
    expected = ask(start(), [Asked(tiny_moe_model, "Fine?")])
    original = tiny_moe_model.language_model.forward
    bad = tiny_moe_model.processor.encode(  # type: ignore[union-attr]
        [Message(role="user", parts=(TextPart(text="BAD"),))], generation_prompt=True
    ).input_ids

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs["inputs_embeds"].shape[1] >= len(bad) and poisoned.is_set():
            raise error
        return original(*args, **kwargs)

    poisoned = threading.Event()
    poisoned.set()
    real_answer = BatchScheduler._answer

    def answer(self: BatchScheduler, rows: list[Row]) -> None:
        poisoned.set() if any(row.job.input_ids == bad for row in rows) else poisoned.clear()
        real_answer(self, rows)

    monkeypatch.setattr(BatchScheduler, "_answer", answer)
    monkeypatch.setattr(tiny_moe_model.language_model, "forward", forward)
    scheduler = start(gather_seconds=1.0, max_batch=2)
    failed, fine = ask(scheduler, [Asked(tiny_moe_model, "BAD"), Asked(tiny_moe_model, "Fine?")])
    assert failed[0] == ""
    assert isinstance(failed[1], Failed)
    assert failed[1].out_of_memory == out_of_memory
    assert len(failed[1].reference) == 8
    assert [fine] == expected
    assert ask(scheduler, [Asked(tiny_moe_model, "Fine?")]) == expected


def test_an_error_after_the_first_words_ends_the_answer_with_an_error(
    tiny_moe_model: Model, start: Schedulers, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tiny_moe_model.language_model.forward
    steps = 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 25:
            raise RuntimeError("late")
        return original(*args, **kwargs)

    monkeypatch.setattr(tiny_moe_model.language_model, "forward", forward)
    ((text, end),) = ask(start(), [Asked(tiny_moe_model, "What?", max_tokens=40)])
    assert text
    assert isinstance(end, Failed)


def test_a_picture_is_encoded_once_while_it_is_remembered(tiny_moe_model: Model, start: Schedulers) -> None:
    seen = 0

    def saw(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal seen
        seen += len(args[0])

    tiny_moe_model.vision_tower.register_forward_pre_hook(saw)
    scheduler = start()
    question = Asked(tiny_moe_model, "What?", num_pictures=2)
    for _ in range(3):
        ask(scheduler, [question])
    assert seen == 2


def test_closing_answers_what_waits_and_takes_no_more(tiny_moe_model: Model, start: Schedulers) -> None:
    scheduler = start(max_batch=2)
    questions = [Asked(tiny_moe_model, text) for text in QUESTIONS]
    for question in questions:
        scheduler.submit(question.job)
    scheduler.close(timeout=30)
    assert all(isinstance(question.result()[1], Finished) for question in questions)
    with pytest.raises(Closed):
        scheduler.submit(questions[0].job)


def test_text_arrives_in_pieces_while_it_is_generated(tiny_moe_model: Model, start: Schedulers) -> None:
    question = Asked(tiny_moe_model, "What?", max_tokens=20)
    start().submit(question.job)
    pieces: list[str] = []
    while isinstance(event := question.events.get(timeout=30), Piece):
        pieces.append(event.text)
    assert len(pieces) > 3
    assert "".join(pieces) == tiny_moe_model.chat("What?", max_new_tokens=20)
