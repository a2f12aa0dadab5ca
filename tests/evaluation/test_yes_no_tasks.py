"""POPE, MME and HallusionBench on small files in their official formats."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.rules.yes_no import SHORT_INSTRUCTION
from symphony_vlm.evaluation.scoring import Score, score_files
from symphony_vlm.evaluation.task import get_task
from symphony_vlm.evaluation.tasks.mme import COGNITION, PERCEPTION

Records = Sequence[Mapping[str, Any]]


def write_lines(path: Path, records: Records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# POPE.


def pope_label(number: int, label: str, image: str = "COCO_val2014_000000000001.jpg") -> dict[str, Any]:
    return {"question_id": number, "image": image, "text": f"Is there a thing{number} in the image?", "label": label}


POPE = [pope_label(1, "yes"), pope_label(2, "no"), pope_label(3, "yes"), pope_label(4, "no"), pope_label(5, "yes")]
POPE_ANSWERS = ["Yes", "No", "No", "Yes", "NO"]


def pope_answers(path: Path, texts: list[str] = POPE_ANSWERS, shift: int = 0) -> Path:
    return write_lines(
        path,
        [
            {"question_id": n + shift, "prompt": POPE[n - 1]["text"] + SHORT_INSTRUCTION, "text": text}
            for n, text in enumerate(texts, start=1)
        ],
    )


def test_pope_counts_by_the_official_rule(tmp_path: Path) -> None:
    labels = write_lines(tmp_path / "coco_pope_random.json", POPE)
    score = score_files(get_task("pope"), pope_answers(tmp_path / "answers.jsonl"), annotations=labels)
    # Right yes 2 (NO is a yes), wrong yes 1, missed 1, right no 1.
    values = score.values
    assert values["accuracy"] == 3 / 5
    assert values["precision"] == values["recall"] == pytest.approx(2 / 3)
    assert values["f1"] == pytest.approx(2 / 3)
    assert values["yes_ratio"] == 3 / 5
    assert values["accuracy_lenient"] == 2 / 5  # leniently, NO is a no
    assert score.subset and score.n_unparsed == 1


def test_pope_without_a_yes_has_no_precision(tmp_path: Path) -> None:
    labels = write_lines(tmp_path / "labels.json", POPE)
    score = score_files(get_task("pope"), pope_answers(tmp_path / "a.jsonl", ["no"] * 5), annotations=labels)
    assert score.values["precision"] is None and score.values["recall"] == 0 and score.values["f1"] == 0
    assert any("precision" in warning for warning in score.warnings)


def test_pope_is_joined_by_key_not_by_position(tmp_path: Path) -> None:
    labels = write_lines(tmp_path / "coco_pope_random.json", POPE)
    answers = pope_answers(tmp_path / "answers.jsonl")
    lines = answers.read_text().splitlines()
    answers.write_text("\n".join(lines[::-1]) + "\n")
    assert score_files(get_task("pope"), answers, annotations=labels).values["accuracy"] == 3 / 5


def three_splits(folder: Path) -> Path:
    """Every split has its own truth for question_id 1; ids start again in each."""
    for split, label in (("random", "yes"), ("popular", "no"), ("adversarial", "no")):
        write_lines(folder / f"coco_pope_{split}.json", [pope_label(1, label), pope_label(2, "yes")])
    return folder


def test_pope_splits_pooled_and_apart_by_way_of_the_question_file(tmp_path: Path) -> None:
    folder = three_splits(tmp_path / "pope")
    questions, answers = [], []
    for start, split in ((0, "adversarial"), (100, "popular"), (200, "random")):
        for number in (1, 2):
            text = pope_label(number, "")["text"] + SHORT_INSTRUCTION
            asked = {"question_id": start + number, "image": POPE[0]["image"], "text": text, "category": split}
            questions.append(asked)
            answers.append({"question_id": start + number, "prompt": text, "text": "Yes"})
    score = score_files(
        get_task("pope"),
        write_lines(tmp_path / "answers.jsonl", answers),
        annotations=folder,
        questions=write_lines(tmp_path / "questions.jsonl", questions),
    )
    assert score.values["accuracy"] == pytest.approx(4 / 6)
    assert score.values["accuracy/random"] == 1.0 and score.values["accuracy/popular"] == 0.5
    assert score.values["f1"] == pytest.approx(8 / 10)
    # Not the pooled one: (1 + 2/3 + 2/3) / 3.
    assert score.values["f1_mean_of_splits"] == pytest.approx(7 / 9)
    # One split's annotations, all splits' answers: the others are passed over, since they say where they belong.
    alone = score_files(
        get_task("pope"),
        tmp_path / "answers.jsonl",
        annotations=folder / "coco_pope_random.json",
        questions=tmp_path / "questions.jsonl",
    )
    assert alone.values["accuracy"] == 1.0 and len(alone.outcomes) == 2


def test_pope_says_when_answers_cannot_be_told_apart(tmp_path: Path) -> None:
    folder = three_splits(tmp_path / "pope")
    answers = pope_answers(tmp_path / "answers.jsonl", ["Yes", "Yes"])
    with pytest.raises(InputError, match=r"answers.jsonl: line 1: belongs to any of the splits .*--questions"):
        score_files(get_task("pope"), answers, annotations=folder)


def test_pope_of_another_version_is_refused(tmp_path: Path) -> None:
    """The two versions of the random split have the same ids for other questions."""
    labels = write_lines(tmp_path / "coco_pope_random.json", POPE)
    answers = write_lines(
        tmp_path / "a.jsonl", [{"question_id": 1, "prompt": "Is there a fork in the image?", "text": "yes"}]
    )
    with pytest.raises(InputError, match="different versions of POPE"):
        score_files(get_task("pope"), answers, annotations=labels)


def test_pope_answers_need_no_prompt_and_may_have_another_instruction(tmp_path: Path) -> None:
    labels = write_lines(tmp_path / "coco_pope_random.json", POPE[:2])
    lines = [
        {"question_id": 1, "text": "Yes"},
        {"question_id": 2, "prompt": "<image>\n" + POPE[1]["text"] + "\nAnswer yes or no.", "text": "No"},
    ]
    score = score_files(get_task("pope"), write_lines(tmp_path / "a.jsonl", lines), annotations=labels)
    assert score.values["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("text", "status"),
    [("Yes", "ok"), ("There is not.", "ok"), ("NO", "ambiguous"), ("unknown", "unparsed"), (" ", "empty")],
)
def test_pope_says_where_the_rule_only_guessed(text: str, status: str, tmp_path: Path) -> None:
    item = get_task("pope").load(write_lines(tmp_path / "pope.json", POPE[:1]), None, tmp_path, 0)[0]
    assert get_task("pope").score(text, item).status == status


def test_pope_missing_counts_wrong_and_is_reported(tmp_path: Path) -> None:
    labels = write_lines(tmp_path / "coco_pope_random.json", POPE)
    score = score_files(get_task("pope"), pope_answers(tmp_path / "a.jsonl", ["Yes", "No", "Yes"]), annotations=labels)
    assert score.values["accuracy"] == 3 / 5
    # The missing no counts as a wrong yes, the missing yes as a missed one.
    assert score.values["precision"] == pytest.approx(2 / 3) and score.values["recall"] == pytest.approx(2 / 3)
    assert len(score.missing) == 2 and score.to_dict()["missing"] == 2


def test_pope_prompt_and_our_own_records(tmp_path: Path) -> None:
    labels = write_lines(tmp_path / "coco_pope_random.json", POPE[:2])
    items = get_task("pope").load(labels, tmp_path, tmp_path, 0)
    assert items[0].question == "Is there a thing1 in the image?\nAnswer the question using a single word or phrase."
    assert items[0].images[0].path == tmp_path / POPE[0]["image"]
    assert items[0].image_key == items[1].image_key
    records = [
        {"item_id": items[0].id, "prediction": "Yes", "answer": "yes"},
        {"item_id": items[1].id, "prediction": None, "answer": "no", "error": {"type": "X", "message": "x"}},
    ]
    score = score_files(get_task("pope"), write_lines(tmp_path / "r.jsonl", records), annotations=labels)
    # The truth in our records' field "answer" is never taken for the prediction of an item that failed.
    assert score.values["accuracy"] == 0.5 and score.missing == [items[1].id]


# MME.


def mme_folder(folder: Path, lines: Mapping[str, Sequence[tuple[str, ...]]]) -> Path:
    folder.mkdir()
    for subtask, rows in lines.items():
        (folder / f"{subtask}.txt").write_text("".join("\t".join(row) + "\n" for row in rows))
    return folder


QUESTION = "Is there a dog in this image? Please answer yes or no."
OTHER = "Is there a cat  in this image? Please answer yes or no."
"""With two spaces, as in places of the official files; LLaVA's prompts have one."""


def test_mme_adds_accuracy_and_accuracy_plus(tmp_path: Path) -> None:
    rows = [
        ("1.jpg", QUESTION, "Yes", "Yes, there is"),
        ("2.jpg", QUESTION, "Yes", "Not sure"),
        ("1.jpg", OTHER, "No", "no"),  # the two lines of a picture need not be neighbours
        ("2.jpg", OTHER, "No", "No"),
    ]
    score = score_files(
        get_task("mme"), mme_folder(tmp_path / "r", {"existence": rows, "code_reasoning": rows[1:2] + rows[3:]})
    )
    assert score.values["existence"] == 75 + 50
    assert score.values["perception"] == 125 and score.values["cognition"] == 50
    assert score.subset and "mean_of_28" not in score.values


def test_mme_of_all_subtasks_has_their_mean(tmp_path: Path) -> None:
    rows = [("1.jpg", QUESTION, "Yes", "yes"), ("1.jpg", OTHER, "No", "other")]
    score = score_files(get_task("mme"), mme_folder(tmp_path / "r", dict.fromkeys(PERCEPTION + COGNITION, rows)))
    assert score.values["perception"] == 500 and score.values["cognition"] == 200
    assert score.values["mean_of_28"] == 25
    assert score.n_unparsed == 14


def test_mme_llava_answers_name_items_by_file_and_prompt(tmp_path: Path) -> None:
    truth = mme_folder(tmp_path / "truth", {"OCR": [("0001.png", QUESTION, "Yes"), ("0001.png", OTHER, "No")]})
    prompt = QUESTION.replace(" Please answer yes or no.", SHORT_INSTRUCTION)
    answers = write_lines(
        tmp_path / "a.jsonl",
        [
            {
                "question_id": "OCR/images/0001.jpg",
                "prompt": prompt.replace("dog", "cat"),
                "text": "No",
            },
            {"question_id": "OCR/images/0001.jpg", "prompt": prompt, "text": "No"},
        ],
    )
    score = score_files(get_task("mme"), answers, annotations=truth)
    assert score.values["OCR"] == 50
    assert not score.missing


def test_mme_data_as_released(tmp_path: Path) -> None:
    for subtask, text, images in (
        ("count", "count", "count"),
        ("posters", "posters/questions_answers_YN", "posters/images"),
    ):
        (tmp_path / text).mkdir(parents=True)
        (tmp_path / images).mkdir(parents=True, exist_ok=True)
        (tmp_path / text / "7.txt").write_text(f"{QUESTION}\tYes\nAre there two? Please answer yes or no.\tNo\n")
        (tmp_path / images / "7.jpg").write_bytes(b"x")
        assert subtask
    items = get_task("mme").load(tmp_path, None, tmp_path, 0)
    assert [item.group for item in items] == ["count", "count", "posters", "posters"]
    assert items[0].question == "Is there a dog in this image?\nAnswer the question using a single word or phrase."
    assert items[2].images[0].path == tmp_path / "posters/images/7.jpg"
    assert items[0].image_key == items[1].image_key != items[2].image_key


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("1.jpg", QUESTION)], "has 2 columns"),
        ([("1.jpg", QUESTION, "maybe", "x")], "the answer is 'maybe'"),
        ([("1.jpg", QUESTION, "Yes", "x")], r"count/1 has 1 question\(s\)"),
        ([("1.jpg", QUESTION, "Yes", "x")] * 2, "stands twice"),
    ],
)
def test_mme_files_that_cannot_be_scored(tmp_path: Path, rows: list[tuple[str, ...]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_files(get_task("mme"), mme_folder(tmp_path / "r", {"count": rows}))


# HallusionBench.


def hallusion(category: str, figure: str, question: str, truth: str, said: str, **more: Any) -> dict[str, Any]:
    return {
        "category": category,
        "subcategory": "illusion",
        "visual_input": "0" if category == "VS" and figure == "0" else "2" if figure == "2" else "1",
        "set_id": "0",
        "figure_id": figure,
        "question_id": question,
        "question": "Is it so?",
        "gt_answer": truth,
        "gt_answer_details": "",
        "filename": f"./hallusion_bench/{category}/{figure}.png",
        "model_prediction": said,
        **more,
    }


HALLUSION = [
    hallusion("VD", "1", "0", "1", "Yes, it is."),
    hallusion("VD", "1", "1", "0", "Yes."),
    hallusion("VD", "2", "0", "0", "No"),
    hallusion("VS", "0", "0", "1", "I cannot tell."),  # right: there is no picture
    hallusion("VS", "1", "0", "1", "I cannot tell."),  # wrong
]


def test_hallusionbench_offline(tmp_path: Path) -> None:
    score = score_files(get_task("hallusionbench"), write_json_list(tmp_path / "r.json", HALLUSION))
    values = score.values
    assert values["aAcc"] == 3 / 5
    # Groups: VD question 0 (right), VD question 1 (wrong), VS question 0 (one of two wrong).
    assert values["qAcc"] == pytest.approx(1 / 3)
    # Figures: VD 1 wrong, VD 2 right, VS 1 wrong; VS 0 is no figure.
    assert values["fAcc"] == pytest.approx(1 / 3)
    assert values["hard"] == 1.0 and values["easy"] == pytest.approx(1 / 3)
    # Predicted yes: right yes (1, 4) and wrong no (2); true yes 3 of 5.
    assert values["yes_bias"] == pytest.approx(3 / 5 - 3 / 5)
    assert values["no_share_of_errors"] == 0.5
    assert score.n_unparsed == 2


def write_json_list(path: Path, records: Records) -> Path:
    path.write_text(json.dumps(records))
    return path


def test_hallusionbench_imports_judgements(tmp_path: Path) -> None:
    judged = [{**record, "gpt4v_output_gpt_check": label} for record, label in zip(HALLUSION, "10201", strict=True)]
    score = score_files(get_task("hallusionbench"), write_json_list(tmp_path / "r.json", judged))
    # The label wins over the text; 2 is right only without a picture, and the last is right by its label.
    assert [one.scored.score for one in score.outcomes] == [1, 0, 0, 0, 1]
    with pytest.raises(InputError, match="'gpt4v_output_gpt_check' is '3'"):
        score_files(
            get_task("hallusionbench"),
            write_json_list(tmp_path / "s.json", [{**HALLUSION[0], "gpt4v_output_gpt_check": "3"}]),
        )


def test_hallusionbench_asks_without_the_picture_where_there_is_none(tmp_path: Path) -> None:
    items = get_task("hallusionbench").load(
        write_json_list(tmp_path / "HallusionBench.json", HALLUSION), None, tmp_path, 0
    )
    assert [len(item.images) for item in items] == [1, 1, 1, 0, 1]
    assert len({item.cluster for item in items}) == 2
    answers = write_lines(tmp_path / "a.jsonl", [{**HALLUSION[0], "model_prediction": "No"}])
    failed = write_lines(tmp_path / "f.jsonl", [{"item_id": items[0].id, "prediction": None, "answer": "yes"}])
    assert (
        len(score_files(get_task("hallusionbench"), failed, annotations=tmp_path / "HallusionBench.json").missing) == 5
    )
    score: Score = score_files(get_task("hallusionbench"), answers, annotations=tmp_path / "HallusionBench.json")
    assert score.values["aAcc"] == 0 and len(score.missing) == 4
