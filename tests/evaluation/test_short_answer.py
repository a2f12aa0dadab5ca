"""The rule for short answers, and how records become questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.data.sample import ImagePart
from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.task import EvaluationItem, get_task, task_names
from symphony_vlm.evaluation.tasks import scenes as scenes_task
from symphony_vlm.evaluation.tasks.short_answer import load_items, normalize, score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("  Yes.  ", "yes"),
        ("YES...", "yes"),
        ("no .", "no"),
        ("two\n  words", "two words"),
        ("two\twords\u00a0here", "two words here"),
        ("3.5", "3.5"),
        ("U.S.", "u.s"),
        (".", ""),
        ("", ""),
        (" \n", ""),
        ("a, b.", "a, b"),
        ("ÄÖ", "äö"),
        ("notice", "notice"),
    ],
)
def test_normalising(text: str, expected: str) -> None:
    assert normalize(text) == expected
    assert normalize(normalize(text)) == normalize(text)


def _item(*answers: str) -> EvaluationItem:
    return EvaluationItem(id="a", question="?", answers=answers)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Red.", ("red",), 1.0),
        ("red", ("Red.",), 1.0),
        ("grey", ("gray", "grey"), 1.0),
        ("reddish", ("red",), 0.0),
        ("red circle", ("red",), 0.0),
        ("notice", ("no",), 0.0),
        ("yes, it is", ("yes",), 0.0),
    ],
)
def test_an_answer_is_right_if_it_equals_an_accepted_one_after_normalising(
    prediction: str, answers: Sequence[str], expected: float
) -> None:
    scored = score(prediction, _item(*answers))
    assert (scored.score, scored.status, scored.parsed) == (expected, "ok", normalize(prediction))


@pytest.mark.parametrize("prediction", ["", "  ", "\n", "."])
def test_an_empty_answer_is_wrong_and_says_that_it_is_empty(prediction: str) -> None:
    scored = score(prediction, _item("yes"))
    assert (scored.score, scored.status) == (0.0, "empty")


def _file(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def _turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def test_every_answer_of_a_conversation_is_a_question_of_its_own_about_the_same_picture(tmp_path: Path) -> None:
    record = {"id": "a", "image": "a.png", "conversations": _turns("<image>\nOne?", "1", "Two?", "2", "Three?", "3")}
    items = load_items(_file(tmp_path, record), None)
    assert [(item.id, item.question, item.answers) for item in items] == [
        ("a#0", "One?", ("1",)),
        ("a#1", "Two?", ("2",)),
        ("a#2", "Three?", ("3",)),
    ]
    assert len({item.image_key for item in items}) == 1
    for item in items:
        parts = item.messages[0].parts
        assert [isinstance(part, ImagePart) for part in parts] == [True, False]
        assert item.messages[0].text == f"\n{item.question}"


def test_a_single_question_keeps_the_records_id_and_a_system_prompt_is_no_question(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "Be brief."}, *_turns("One?", "1")]
    (item,) = load_items(_file(tmp_path, {"id": "a", "conversations": turns}), None)
    assert (item.id, item.question, item.images, item.image_key) == ("a", "One?", (), "id:a")


def test_groups_come_from_the_type_or_the_source_and_several_answers_are_all_accepted(tmp_path: Path) -> None:
    base = {"conversations": _turns("One?", "1")}
    items = load_items(
        _file(
            tmp_path,
            {"id": "a", "type": "count", "source": "x", **base},
            {"id": "b", "source": "x", **base},
            {"id": "c", "answers": ["1", "one"], **base},
        ),
        None,
    )
    assert [item.group for item in items] == ["count", "x", None]
    assert items[2].answers == ("1", "one")


def test_an_id_that_stands_twice_is_refused_with_the_record(tmp_path: Path) -> None:
    record = {"id": "a", "conversations": _turns("One?", "1")}
    with pytest.raises(InputError, match="the id 'a' stands twice") as error:
        load_items(_file(tmp_path, record, record), None)
    assert error.value.where == "data.json: record 1 (id 'a')"


def test_the_built_in_scenes_are_the_quickstarts_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test picture depends on the seed and its number alone, not on how many training pictures there are."""
    promised = load_recipe("quickstart").data.scenes
    assert promised is not None
    assert promised.test == scenes_task.TEST_PICTURES
    monkeypatch.setattr(scenes_task, "TEST_PICTURES", 12)
    settings = promised.model_dump() | {"train": 3, "test": 12}
    drawn = generate_scenes(tmp_path / "quickstart", seed=5, **settings)
    mine = get_task("scenes").load(None, None, tmp_path / "scratch", 5)
    theirs = load_items(drawn.test_json, None)
    assert [(item.id, item.question, item.answers) for item in mine] == [
        (item.id, item.question, item.answers) for item in theirs
    ]
    for a, b in zip(mine, theirs, strict=True):
        assert a.images[0].path is not None and b.images[0].path is not None
        assert a.images[0].path.read_bytes() == b.images[0].path.read_bytes()


def test_scenes_accepts_the_folder_or_its_test_file(tmp_path: Path) -> None:
    drawn = generate_scenes(tmp_path / "s", train=1, test=3)
    task = get_task("scenes")
    assert task.load(tmp_path / "s", None, tmp_path, 0) == task.load(drawn.test_json, None, tmp_path, 0)


def test_tasks_are_found_by_name_and_an_unknown_one_names_the_nearest() -> None:
    assert {"scenes", "short_answer"} <= set(task_names())
    assert all(get_task(name).name == name for name in task_names())
    with pytest.raises(InputError, match=r"no task 'short_answr'; did you mean 'short_answer'\? Tasks: "):
        get_task("short_answr")
