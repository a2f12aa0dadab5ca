"""Multiple choice benchmarks on small files in their official formats."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from symphony_vlm.data.images import load_image
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.scoring import score_files
from symphony_vlm.evaluation.task import get_task

LETTER = "\nAnswer with the option's letter from the given choices directly."
Records = list[dict[str, Any]]


def write_lines(path: Path, records: Records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def answers(path: Path, texts: dict[str, str]) -> Path:
    """LLaVA's answer lines."""
    return write_lines(path, [{"question_id": key, "prompt": "?", "text": text} for key, text in texts.items()])


def load(task: str, data: Path, folder: Path | None = None) -> list[EvaluationItem]:
    return list(get_task(task).load(data, folder, data.parent, 0))


def picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 40)).save(stream, format="PNG")
    return stream.getvalue()


# MMBench.

COLUMNS = (
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "split",
)


def mmbench(path: Path, rows: list[tuple[str, ...]]) -> Path:
    path.write_text("\n".join("\t".join(row) for row in [COLUMNS, *rows]) + "\n")
    return path


def mmbench_row(index: int, answer: str, *, image: str = "", c: str = "nan", hint: str = "nan") -> tuple[str, ...]:
    category, level = ("colour", "fine") if index % 1_000_000 < 2 else ("count", "coarse")
    return (str(index), "Which?", hint, "red", "blue", c, "", answer, category, image, "x", level, "dev")


def test_mmbench_is_right_only_in_every_rotation(tmp_path: Path) -> None:
    rows = [mmbench_row(i, answer) for i, answer in ((1, "A"), (1_000_001, "B"), (2, "B"), (1_000_002, "A"), (3, "A"))]
    data = mmbench(tmp_path / "mmbench.tsv", rows)
    given = answers(tmp_path / "a.jsonl", {"1": "A", "1000001": "A", "2": "B", "1000002": "A", "3": "It is A."})
    score = score_files(get_task("mmbench"), given, annotations=data)
    assert score.values["circular"] == pytest.approx(1 / 3)
    assert score.values["vanilla"] == pytest.approx(2 / 3)
    assert score.values["circular_lenient"] == pytest.approx(2 / 3)
    assert score.values["vanilla_lenient"] == 1.0
    assert score.values["circular/colour"] == 0 and score.values["vanilla/colour"] == 1
    assert score.values["circular/l2/coarse"] == 0.5
    assert score.n_unparsed == 1 and score.subset


def test_mmbench_a_missing_rotation_spoils_its_question(tmp_path: Path) -> None:
    data = mmbench(tmp_path / "mmbench.tsv", [mmbench_row(1, "A"), mmbench_row(1_000_001, "B")])
    score = score_files(get_task("mmbench"), answers(tmp_path / "a.jsonl", {"1": "A"}), annotations=data)
    assert score.values["circular"] == 0 and score.values["vanilla"] == 1
    assert score.missing == ["1000001"]


def test_mmbench_prompt_options_and_pictures(tmp_path: Path) -> None:
    encoded = base64.b64encode(picture()).decode()
    rows = [mmbench_row(1, "B", image=encoded, c="green", hint="A hint."), mmbench_row(1_000_001, "A", image="1")]
    items = load("mmbench", mmbench(tmp_path / "mmbench.tsv", rows))
    assert items[0].question == "A hint.\nWhich?\nA. red\nB. blue\nC. green" + LETTER
    assert items[1].question == "Which?\nA. red\nB. blue" + LETTER
    assert items[1].choices == ("red", "blue")
    # The copy's image is the number of the row that has it.
    assert items[0].image_key == items[1].image_key
    assert load_image(items[1].images[0]).size == (40, 30)
    chinese = load("mmbench_cn", tmp_path / "mmbench.tsv")
    assert chinese[1].question.endswith("B. blue\n请直接回答选项字母。")


def test_mmbench_refuses_a_split_without_answers(tmp_path: Path) -> None:
    data = mmbench(tmp_path / "mmbench.tsv", [mmbench_row(1, "nan")])
    with pytest.raises(InputError, match=r"mmbench.tsv: row 0: the answer is 'nan'.*dev split"):
        load("mmbench", data)


# ScienceQA.

PROBLEMS = {
    "7": {
        "question": "Which?",
        "choices": ["cat", "dog"],
        "answer": 1,
        "hint": "Look.",
        "image": "image.png",
        "split": "test",
    },
    "8": {"question": "What?", "choices": ["a", "b", "c"], "answer": 0, "hint": "", "image": None, "split": "test"},
    "9": {"question": "Who?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": None, "split": "train"},
}


@pytest.mark.parametrize("with_splits", [True, False])
def test_scienceqa_all_and_with_an_image(tmp_path: Path, with_splits: bool) -> None:
    write_json(tmp_path / "sqa/problems.json", PROBLEMS)
    if with_splits:
        write_json(tmp_path / "sqa/pid_splits.json", {"train": ["9"], "test": ["7", "8"]})
    given = answers(tmp_path / "a.jsonl", {"7": "B. dog", "8": "B"})
    score = score_files(get_task("scienceqa"), given, annotations=tmp_path / "sqa")
    assert len(score.outcomes) == 2 and score.subset
    assert score.values["accuracy"] == 0.5 and score.values["accuracy_image"] == 1.0


def test_scienceqa_prompt(tmp_path: Path) -> None:
    items = load("scienceqa", write_json(tmp_path / "problems.json", PROBLEMS), tmp_path)
    assert items[0].question == "Context: Look.\nWhich?\nA. cat\nB. dog" + LETTER
    assert items[1].question == "What?\nA. a\nB. b\nC. c" + LETTER
    assert items[0].images[0].path == tmp_path / "7/image.png" and not items[1].images


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("B", "B"),
        ("B. dog", "B"),
        ("B.dog", None),
        ("b", None),
        ("I guess. The answer is B.", "B"),
        ("The answer is B", None),  # a character must follow
        ("The answer is B. The answer is A.", None),
        ("C", None),  # beyond the choices
        ("The answer is Z.", None),
        ("(B)", None),
        ("", None),
    ],
)
def test_scienceqa_rule(text: str, parsed: str | None) -> None:
    item = EvaluationItem(id="7", question="?", answers=("B",), choices=("cat", "dog"))
    scored = get_task("scienceqa").score(text, item)
    assert scored.parsed == (parsed or "") and scored.score == (parsed == "B")
    assert scored.status == ("ok" if parsed else "unparsed" if text else "empty")


# MMMU.


def mmmu(number: int, answer: Any, response: str = "", *, subject: str = "Art", **more: Any) -> dict[str, Any]:
    is_open = isinstance(answer, list)
    return {
        "id": f"validation_{subject}_{number}",
        "question_type": "short-answer" if is_open else "multiple-choice",
        "question": "See <image 1>?",
        "answer": answer,
        "response": response,
        **({} if is_open else {"all_choices": ["A", "B"], "index2ans": {"A": "red", "B": "blue"}}),
        **more,
    }


def test_mmmu_result_folders_are_scored_with_and_without_the_guess(tmp_path: Path) -> None:
    write_json(tmp_path / "Math/output.json", [mmmu(1, ["8", "eight"], "so it is 8", subject="Math")])
    write_json(tmp_path / "Art/output.json", [mmmu(1, "B", "(B)"), mmmu(2, "A", ""), mmmu(3, "A", "dunno")])
    # An open question without an answer is never guessed, and takes no draw.
    write_json(tmp_path / "Accounting/output.json", [mmmu(1, ["8"], "", subject="Accounting")])
    score = score_files(get_task("mmmu"), tmp_path)
    assert [one.item.id for one in score.outcomes] == [
        "validation_Accounting_1",
        *(f"validation_Art_{n}" for n in (1, 2, 3)),
        "validation_Math_1",
    ]
    assert score.values["accuracy"] == 2 / 5 and score.n_unparsed == 3
    assert score.values["accuracy/Science"] == 1.0 and score.values["accuracy/Art"] == pytest.approx(1 / 3)
    # random.seed(42); two draws of random.choice(["A", "B"]) give A, A.
    guessed = score_files(get_task("mmmu"), tmp_path, on_unparsed=42)
    assert guessed.values["accuracy"] == 4 / 5
    assert guessed.to_dict()["on_unparsed"] == "random:42" and guessed.n_unparsed == 3


def test_mmmu_parsed_answers_with_the_answer_dictionary(tmp_path: Path) -> None:
    truth = {
        "validation_Art_1": {"question_type": "multiple-choice", "ground_truth": "B"},
        "validation_Art_2": {"question_type": "short-answer", "ground_truth": ["1,000", "thousand"]},
    }
    write_json(tmp_path / "answer_dict_val.json", truth)
    write_json(tmp_path / "parsed.json", {"validation_Art_1": "B", "validation_Art_2": "1000 dollars"})
    score = score_files(get_task("mmmu"), tmp_path / "parsed.json", annotations=tmp_path / "answer_dict_val.json")
    assert score.values["accuracy"] == 1.0


def test_mmmu_prompts_and_pictures(tmp_path: Path) -> None:
    base = {
        "image_1": str(tmp_path / "1.png"),
        "image_2": str(tmp_path / "2.png"),
        "options": "['red', 'it\\'s \"b\"']",
    }
    rows = [
        {**mmmu(1, "B"), "index2ans": None, **base},
        {**mmmu(2, "A"), "index2ans": None, **base, "options": "['<image 1>', '<image 2>']"},
        {**mmmu(3, ["8"]), "answer": "['8', 'eight']", "question_type": "open", "options": "[]", "image_1": None},
    ]
    items = load("mmmu", write_lines(tmp_path / "val.jsonl", rows))
    assert items[0].question == 'See <image 1>?\n(A) red\n(B) it\'s "b"\n' + LETTER
    assert items[0].images[0].path == tmp_path / "1.png" and len(items[0].images) == 1
    assert items[1].images == () and items[1].meta["unsupported"]
    assert items[2].question == "See <image 1>?\nAnswer the question using a single word or phrase."
    assert items[2].answers == ("8", "eight")


def test_mmmu_options_are_parsed_and_never_evaluated(tmp_path: Path) -> None:
    evil = {**mmmu(1, "A"), "index2ans": None, "options": "[__import__('os').getcwd()]"}
    with pytest.raises(InputError, match=r"val.jsonl: line 1: field 'options'"):
        load("mmmu", write_lines(tmp_path / "val.jsonl", [evil]))


# MMStar.


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("B", 1),
        ("b", 1),
        (" B.", 1),
        ("(B) blue", 1),
        ("Option B", 1),
        ("option\nB", 1),  # a newline becomes a space
        ("The answer is B", 1),
        ("Because", 1),  # the trap: any word that begins with the letter
        ("A", 0),
        ("It is B", 0),
        ("the answer is: B", 0),
        ("", 0),
    ],
)
def test_mmstar_rule(text: str, score: int) -> None:
    item = EvaluationItem(id="0", question="?", answers=("B",), choices=("red", "blue", "green", "none"))
    assert get_task("mmstar").score(text, item).score == score


def test_mmstar_file_with_predictions(tmp_path: Path) -> None:
    row = {"question": "Which?\nOptions: A: red, B: blue", "answer": "B", "l2_category": "x", "bench": "y"}
    rows = [
        {"index": 0, "category": "math", "prediction": "Because", **row},
        {"index": 1, "category": "logic", "prediction": "B", **row},
    ]
    data = write_lines(tmp_path / "r.jsonl", rows)
    score = score_files(get_task("mmstar"), data)
    assert score.values["accuracy"] == 1.0 and score.values["accuracy_strict"] == 0.5
    assert score.values["accuracy/math"] == 1.0
    items = load("mmstar", data)
    assert items[0].question == row["question"] + LETTER and items[0].choices == ("red", "blue")


# SEED-Bench.


def seed_question(number: Any, answer: str, kind: int) -> dict[str, Any]:
    choices = {f"choice_{letter}": f"text {letter}" for letter in "abcd"}
    data = {"question_id": number, "question": "Which?", "answer": answer, "question_type_id": kind}
    return {**data, **choices, "data_id": "1_2", "data_type": "image" if kind < 10 else "video"}


def seed_data(path: Path) -> Path:
    questions = [
        seed_question("1", "A", 1),
        seed_question(2, "B", 1),
        seed_question("3", "C", 2),
        seed_question("v", "D", 10),
    ]
    names = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10}
    return write_json(path, {"questions": questions, "question_type": names})


def test_seedbench_is_the_mean_of_all_image_questions(tmp_path: Path) -> None:
    data = seed_data(tmp_path / "SEED-Bench.json")
    # Ids as numbers or strings; the video's answer is no error and does not count.
    lines = [(1, "A"), ("2", "B"), (3, "C. text c"), ("v", "D")]
    given = write_lines(tmp_path / "a.jsonl", [{"question_id": i, "prompt": "?", "text": t} for i, t in lines])
    score = score_files(get_task("seedbench"), given, annotations=data)
    assert len(score.outcomes) == 3
    assert score.values["accuracy"] == pytest.approx(2 / 3) and score.values["accuracy_lenient"] == 1.0
    assert score.values["accuracy/Scene Understanding"] == 1.0 and score.values["accuracy/Instance Identity"] == 0.0
    assert load("seedbench", data)[0].question == "Which?\nA. text a\nB. text b\nC. text c\nD. text d" + LETTER


def test_seedbench_results_with_the_truth_are_scored_line_by_line(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    rows = [("1", "A", "A"), ("1", "A", "A"), ("2", "B", "C")]
    results.write_text(
        "".join(json.dumps({"question_id": i, "prediction": p, "gt_answer": g}) + ",\n" for i, p, g in rows)
    )
    score = score_files(get_task("seedbench"), results)
    assert len(score.outcomes) == 3 and score.values["accuracy"] == pytest.approx(2 / 3)


# AI2D.


def ai2d(path: Path, **more: Any) -> Path:
    row = {"question": "Which?", "options": ["1", "2"], "answer": "1", "image": "x.png", **more}
    return write_lines(path, [row])


def test_ai2d_answers_are_indices_and_the_mask_is_part_of_the_name(tmp_path: Path) -> None:
    data = ai2d(tmp_path / "ai2d.jsonl")
    items = load("ai2d", data)
    assert items[0].answers == ("B",) and items[0].question == "Which?\nA. 1\nB. 2" + LETTER
    given = write_lines(tmp_path / "a.jsonl", [{"question_id": 0, "text": "B. It is A"}])
    values = score_files(get_task("ai2d"), given, annotations=data).values
    assert values == {"accuracy": 0.0, "accuracy_lenient": 1.0}
    with pytest.raises(InputError, match="ai2d_no_mask"):
        get_task("ai2d").load(Path("lmms-lab/ai2d-no-mask"), None, tmp_path, 0)
    with pytest.raises(InputError, match="'mask' is False"):
        load("ai2d", ai2d(tmp_path / "other.jsonl", mask=False))


# RealWorldQA.


def test_realworldqa_letters_leniently_and_the_rest_exactly(tmp_path: Path) -> None:
    question = "Where?\n\nA. Left\nB. Right\nPlease answer directly with only the letter of the correct option."
    rows = [
        {"question": question, "answer": "B", "image": "1.png"},
        {"question": question, "answer": "B", "image": "2.png"},
        {"question": "How many?", "answer": "Two", "image": "3.png"},
        {"question": "How many?", "answer": "Two", "image": "4.png"},
    ]
    data = write_lines(tmp_path / "rwqa.jsonl", rows)
    given = answers(tmp_path / "a.jsonl", {"0": "The answer is B.", "1": "to the right", "2": "two..", "3": "two cars"})
    score = score_files(get_task("realworldqa"), given, annotations=data)
    assert [one.scored.score for one in score.outcomes] == [1, 1, 1, 0]
    assert load("realworldqa", data)[0].question == question


# Generic multiple choice.


@pytest.mark.parametrize(
    ("fields", "expected", "choices"),
    [
        ({"choices": ["red", "blue"], "answer": "B"}, "B", ("red", "blue")),
        ({"options": ["red", "blue"], "answer": "blue"}, "B", ("red", "blue")),
        ({"choices": ["red", "blue"], "answer": 1}, "B", ("red", "blue")),
        ({"A": "red", "B": "blue", "C": None, "answer": "A"}, "A", ("red", "blue")),
        ({"choices": ["2", "1"], "answer": "1"}, "B", ("2", "1")),  # a text before an index
    ],
)
def test_multiple_choice_records(
    tmp_path: Path, fields: dict[str, Any], expected: str, choices: tuple[str, ...]
) -> None:
    data = write_lines(tmp_path / "d.jsonl", [{"id": "x", "question": "Which?", "image": "1.png", **fields}])
    item = load("multiple_choice", data)[0]
    assert item.answers == (expected,) and item.choices == choices
    assert item.question == f"Which?\nA. {choices[0]}\nB. {choices[1]}" + LETTER


def test_multiple_choice_in_llava_form_keeps_its_own_instruction(tmp_path: Path) -> None:
    text = "Which?\nA. red\nB. blue\nAnswer by letter."
    turns = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "B"}]
    data = write_json(tmp_path / "d.json", [{"id": "x", "image": "1.png", "conversations": turns}])
    item = load("multiple_choice", data)[0]
    assert item.question == text and item.choices == ("red", "blue") and item.answers == ("B",)
    score = score_files(get_task("multiple_choice"), answers(tmp_path / "a.jsonl", {"x": "(B)"}), annotations=data)
    assert score.values == {"accuracy": 0.0, "accuracy_lenient": 1.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": "B"}, "has no options"),
        ({"choices": ["red", "blue"], "answer": "C"}, "the answer is 'C'"),
        ({"choices": "red", "answer": "A"}, "the options are 'red'"),
    ],
)
def test_multiple_choice_records_that_cannot_be_used(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    data = write_lines(tmp_path / "d.jsonl", [{"id": "x", "question": "Which?", **fields}])
    with pytest.raises(InputError, match=f"line 1.*{message}"):
        load("multiple_choice", data)


def test_parquet_as_on_the_hub(tmp_path: Path) -> None:
    """A folder of parquet files of the wanted split, pictures inside."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "index": 5,
            "question": "Which?\nOptions: A: x, B: y",
            "answer": "B",
            "category": "math",
            "l2_category": "z",
            "image": {"bytes": picture(), "path": None},
        }
    ]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data/val-00000-of-00001.parquet")
    items = load("mmstar", tmp_path)
    assert items[0].id == "5" and load_image(items[0].images[0]).size == (40, 30)
    assert items[0].image_key.startswith("sha256:")
