"""What the page's clicks do: asking again, taking back, two models, corruption, routing; without a browser."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from symphony_vlm.corruptions import corrupt, corruption_rng, image_key
from symphony_vlm.errors import InputError
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration as Model
from symphony_vlm.serving import corruption_panel
from symphony_vlm.serving.chat import ChatSession
from symphony_vlm.serving.events import PageEvents
from symphony_vlm.serving.examples import Example
from symphony_vlm.serving.page_settings import Sampling
from symphony_vlm.serving.visitor import Visitor

SETTINGS = (8, 0.0, 1.0, -1)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


def make_events(models: list[Model], folder: Path, picture: Path) -> PageEvents:
    import gradio

    examples = [Example(picture=picture, question="Which example?")]
    return PageEvents(gradio, models, ["first", "second"][: len(models)], examples, folder)


@pytest.fixture
def events(tiny_moe_model: Model, tmp_path: Path, picture: Path) -> PageEvents:
    return make_events([tiny_moe_model], tmp_path, picture)


@pytest.fixture
def both(tiny_model: Model, tiny_moe_model: Model, tmp_path: Path, picture: Path) -> PageEvents:
    return make_events([tiny_model, tiny_moe_model], tmp_path, picture)


def ask(events: PageEvents, visitor: Visitor, text: str, *files: Path, settings: tuple[Any, ...] = SETTINGS) -> Any:
    """The last update of the page."""
    return list(events.ask({"text": text, "files": [str(file) for file in files]}, *settings, visitor))[-1]


def texts(shown: list[dict[str, Any]]) -> list[str]:
    return ["".join(part["text"] for part in message["content"] if "text" in part) for message in shown]


def clicked(index: Any) -> Any:
    return SimpleNamespace(index=index)


def test_retry_asks_the_same_again_with_its_pictures_and_forgets_the_rest(events: PageEvents, picture: Path) -> None:
    visitor = Visitor(1)
    ask(events, visitor, "One?", picture)
    first = texts(visitor.shown(0))
    ask(events, visitor, "Two?")
    ask(events, visitor, "Three?")
    # gradio names the question; any message of the exchange will do.
    for index in (1, 0):
        *_, last = events.retry(0)(*SETTINGS, visitor, clicked(index))
        assert texts(last[0]) == first == texts(visitor.shown(0))
        assert [part["alt_text"] for part in last[0][0]["content"] if "path" in part] == ["Uploaded picture"]
    session = visitor.sessions[0]
    assert session is not None
    assert len(session.history) == 2
    assert len(session.image_features) == 1


def test_retry_after_a_failed_question_keeps_the_answers_before(
    events: PageEvents, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visitor = Visitor(1)
    ask(events, visitor, "One?", picture)
    original = ChatSession.stream
    with monkeypatch.context() as patch:
        patch.setattr(ChatSession, "stream", failing)
        ask(events, visitor, "Two?")
    assert ChatSession.stream is original
    assert [exchange.answered for exchange in visitor.exchanges] == [[True], [False]]
    before = visitor.shown(0)[:2]
    list(events.retry(0)(*SETTINGS, visitor, clicked(2)))
    assert visitor.shown(0)[:2] == before
    assert [exchange.answered for exchange in visitor.exchanges] == [[True], [True]]
    session = visitor.sessions[0]
    assert session is not None
    assert [message.text for message in session.history][2] == "Two?"


def failing(self: ChatSession, text: str, **settings: Any) -> Iterator[str]:
    raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
    yield ""


def test_lack_of_memory_is_reported_and_the_next_question_works(
    events: PageEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    visitor = Visitor(1)
    with monkeypatch.context() as patch:
        patch.setattr(ChatSession, "stream", failing)
        ask(events, visitor, "What?")
    assert texts(visitor.shown(0))[1].startswith(
        "The model ran out of memory. Ask with fewer words or smaller pictures"
    )
    ask(events, visitor, "And now?")
    assert "metadata" not in visitor.shown(0)[-1]


def test_undo_takes_words_and_pictures_back_into_the_box(events: PageEvents, picture: Path) -> None:
    visitor = Visitor(1)
    ask(events, visitor, "One?")
    before = visitor.shown(0)
    ask(events, visitor, "Two <b>?", picture, picture)
    asked = visitor.shown(0)
    ask(events, visitor, "Three?")
    shown, box = events.undo(0)(visitor, clicked(2))
    assert shown == before
    assert box["value"]["text"] == "Two <b>?"
    session = visitor.sessions[0]
    assert session is not None
    assert len(session.history) == 2
    assert session.image_features == ()
    files = [Path(file) for file in box["value"]["files"]]
    assert [file.name for file in files] == [picture.name] * 2
    assert [file.read_bytes() for file in files] == [picture.read_bytes()] * 2
    # Asked again, it is the same question.
    shown, _ = ask(events, visitor, "Two <b>?", *files)
    assert texts(shown) == texts(asked)


@pytest.mark.parametrize("index", [99, -1, "x", None, [], 1.5])
def test_a_message_that_does_not_exist_changes_nothing(events: PageEvents, index: Any) -> None:
    visitor = Visitor(1)
    ask(events, visitor, "One?")
    before = visitor.shown(0)
    list(events.retry(0)(*SETTINGS, visitor, clicked(index)))
    events.undo(0)(visitor, clicked(index))
    assert visitor.shown(0) == before


def test_two_models_answer_for_themselves_and_both_stream(both: PageEvents, picture: Path) -> None:
    visitor = Visitor(2)
    updates = list(both.ask({"text": "What?", "files": [str(picture)]}, 12, 0.0, 1.0, -1, visitor))
    # First update: both show the question; then the first model's answer grows, then the second's.
    assert [texts(chat) for chat in updates[0][:2]] == [["What?"], ["What?"]]
    grown = [0 if isinstance(update[0], list) else 1 for update in updates[1:-1]]
    assert grown == sorted(grown)
    assert set(grown) == {0, 1}
    for number, model in enumerate(both._models):
        session = ChatSession(model)
        session.add_image(picture)
        assert session.ask("What?", max_new_tokens=12) == updates[-1][number][-1]["content"][0]["text"].replace(
            "&lt;", "<"
        ).replace("&gt;", ">").replace("&amp;", "&")


def test_one_models_fault_leaves_the_other_and_counts_apart(both: PageEvents, monkeypatch: pytest.MonkeyPatch) -> None:
    visitor = Visitor(2)
    original = ChatSession.stream
    broken = both._models[0]

    def stream(self: ChatSession, text: str, **settings: Any) -> Iterator[str]:
        if self.model is broken:
            raise RuntimeError("broken")
        return original(self, text, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(ChatSession, "stream", stream)
        ask(both, visitor, "One?")
    assert visitor.exchanges[0].answered == [False, True]
    assert visitor.shown(0)[-1]["metadata"]["title"].endswith("Not answered")
    assert "metadata" not in visitor.shown(1)[-1]
    ask(both, visitor, "Two?")
    list(both.retry(1)(*SETTINGS, visitor, clicked(2)))
    assert [len(session.history) for session in visitor.sessions if session] == [2, 4]


def test_stopping_spares_the_second_model(both: PageEvents, monkeypatch: pytest.MonkeyPatch) -> None:
    visitor = Visitor(2)
    turn = both.ask({"text": "What?", "files": []}, *SETTINGS, visitor)
    next(turn)
    next(turn)
    both.stop(visitor)
    list(turn)
    assert visitor.shown(1)[-1]["metadata"]["title"] == "Stopped"
    assert visitor.idle.is_set()


def test_a_new_chat_during_an_answer_leaves_nothing_behind(both: PageEvents) -> None:
    visitor = Visitor(2)
    turn = both.ask({"text": "What?", "files": []}, *SETTINGS, visitor)
    next(turn)
    next(turn)
    cleared: list[Any] = []
    thread = threading.Thread(target=lambda: cleared.append(both.start_over(visitor)))
    thread.start()
    list(turn)
    thread.join(20)
    assert cleared[0][:2] == ([], [])
    assert visitor.exchanges == []


def test_limits_of_a_question(events: PageEvents, picture: Path) -> None:
    visitor = Visitor(1)
    ask(events, visitor, "What?", *[picture] * 9)
    ask(events, visitor, "x" * 20_001)
    ask(events, visitor, "What?", *[picture] * 8)
    shown = texts(visitor.shown(0))
    assert shown[1] == "9 pictures; the limit is 8. Attach fewer."
    assert shown[3] == "The question has 20,001 letters; the limit is 20,000. Write a shorter one."
    assert len(visitor.shown(0)[4]["content"]) == 9
    session = visitor.sessions[0]
    assert session is not None
    assert len(session.image_features) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0, 0, 1, -1), "Longest answer: 0 is not a number from 1 to 512."),
        ((8, -1, 1, -1), "Temperature: -1 is not a number from 0 to 2."),
        ((8, float("nan"), 1, -1), "Temperature: nan is not"),
        ((8, 1, float("inf"), -1), "Top-p: inf is not"),
        ((8, 1, 0, -1), "Top-p: 0 must be above 0."),
        ((8, 1, 1, 2**40), "Seed: 1099511627776 is not a number from -1 to 4,294,967,295."),
        ((None, 1, 1, -1), "Longest answer: None is not"),
        (("x" * 100, 1, 1, -1), "Longest answer: 'xxxx"),
    ],
)
def test_settings_that_are_none(events: PageEvents, settings: tuple[Any, ...], message: str) -> None:
    visitor = Visitor(1)
    _, box = ask(events, visitor, "What?", settings=settings)
    assert texts(visitor.shown(0))[1].startswith(message)
    assert box["value"]["text"] == "What?"


def test_a_seed_repeats_a_drawn_answer(tiny_moe_model: Model) -> None:
    def draw(seed: int, top_p: float = 1.0) -> str:
        session = ChatSession(tiny_moe_model)
        return session.ask("What?", **Sampling.read(20, 2.0, top_p, seed).arguments())

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    # So narrow a choice leaves the likeliest token alone.
    assert draw(1, top_p=1e-6) == ChatSession(tiny_moe_model).ask("What?", max_new_tokens=20)
    assert Sampling.read(8, 0.5, 1, -1).seed is Sampling.read(8, 0.5, 1, None).seed is None


def test_corruption_asks_the_same_of_the_corrupted_picture(both: PageEvents, picture: Path) -> None:
    visitor = Visitor(2)
    assert "No picture yet" in both.show_corruption(visitor)[2]
    ask(both, visitor, "What <b>?", picture)
    ask(both, visitor, "And now?")
    controls, columns, asked, clean, *_ = both.show_corruption(visitor)
    assert controls["visible"] is columns["visible"] is True
    assert "What &lt;b&gt;?" in asked
    assert Path(clean).is_file()
    *_, last = corruption_panel.ask_both(both._models, visitor.exchanges[0], "fog", 5, Sampling(max_new_tokens=8))
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    expected = corrupt(pixels, "fog", 5, corruption_rng(image_key(pixels), "fog", 5, seed=0))
    assert last.corrupted is not None
    assert np.array_equal(np.asarray(last.corrupted), expected)
    for number, model in enumerate(both._models):
        for is_corrupted, image in ((False, pixels), (True, expected)):
            session = ChatSession(model)
            session.add_image(Image.fromarray(image))
            assert last.answers[number, is_corrupted] == session.ask("What <b>?", max_new_tokens=8)
    updates = list(both.compare("fog", 5, *SETTINGS, visitor))
    assert updates[0][0]["interactive"] is False
    assert updates[-1][0]["interactive"] is True
    assert "first" in updates[-1][2]
    assert "second" in updates[-1][4]


@pytest.mark.parametrize(
    ("name", "severity", "message"),
    [
        ("no_such", 3, "is not one of"),
        ("fog", 9, "9 is not one of"),
        ("fog", float("nan"), "is not one of"),
        (None, 3, "not"),
    ],
)
def test_a_corruption_that_is_none(events: PageEvents, picture: Path, name: Any, severity: Any, message: str) -> None:
    visitor = Visitor(1)
    ask(events, visitor, "What?", picture)
    last = list(events.compare(name, severity, *SETTINGS, visitor))[-1]
    assert last[0]["interactive"] is True
    assert message in last[4]
    assert "Traceback" not in last[4]


def test_large_pictures_are_made_smaller_before_they_are_corrupted(events: PageEvents, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    Image.new("RGB", (3000, 1500)).save(large)
    visitor = Visitor(1)
    ask(events, visitor, "What?", large)
    assert corruption_panel.picture_of(visitor.exchanges[0]).size == (1024, 512)


def test_frost_is_offered_only_with_its_textures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SYMPHONY_VLM_FROST_DIR", str(tmp_path))
    without = corruption_panel.corruption_choices()
    assert len(without) == 19
    assert "frost" not in without
    assert without[-1] == "frost_procedural"
    monkeypatch.setattr(corruption_panel, "find_frost_textures", lambda: ())
    assert len(corruption_panel.corruption_choices()) == 20


def test_routing_of_the_conversation_by_layer_and_model(
    both: PageEvents, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visitor = Visitor(2)
    assert "dense" in both.show_routing(0, 1, visitor)
    assert "Nothing to show yet" in both.show_routing(1, 1, visitor)
    ask(both, visitor, "What <b>?", picture)
    passes: list[int] = []
    both._models[1].register_forward_pre_hook(lambda *_: passes.append(1))
    # Another layer is drawn again only from what is known.
    assert both.redraw_routing(1, 0, visitor) == both._gr.skip()
    page = both.show_routing(1, 1, visitor)
    assert page.count('class="patches"') == 1
    assert page.count("<rect") > 4
    assert "&lt;b&gt;?" in page
    assert "Experts of layer 1" in page
    assert "has not moved it from the identity" in page
    assert "Experts of layer 0" in both.redraw_routing(1, 0, visitor)
    assert len(passes) == 1
    assert "Layer 7 of this model is dense" in both.show_routing(1, 7, visitor)
    ask(both, visitor, "Again?")
    assert "Again?" in both.show_routing(1, 1, visitor)
    monkeypatch.setattr(torch.nn.Module, "__call__", failing_call)
    ask_again = Visitor(2)
    ask_again.sessions, ask_again.exchanges = visitor.sessions, visitor.exchanges
    assert "matrix made of cheese" in both.show_routing(1, 1, ask_again)


def failing_call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("matrix made of cheese")


def test_examples_wrap_around_whatever_the_browser_says(events: PageEvents) -> None:
    visitor = Visitor(1)
    list(events.ask_example(*SETTINGS, visitor, clicked(17)))
    assert texts(visitor.shown(0))[0] == "Which example?"


def test_rewinding_while_an_answer_is_written_is_refused(events: PageEvents) -> None:
    visitor = Visitor(1)
    turn = events.ask({"text": "What?", "files": []}, 40, 0.0, 1.0, -1, visitor)
    for _ in range(3):
        next(turn)
    with pytest.raises(InputError, match="still being generated"):
        visitor.rewind(0)
    list(turn)
