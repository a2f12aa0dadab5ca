"""``symphony-vlm data check`` as programs and people use it: exit codes, the last line, the files it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from PIL import Image

from symphony_vlm.cli import main
from symphony_vlm.config.loading import load_recipe

REPOSITORY = Path(__file__).parents[3]


def _call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, list[str]]:
    """Exit code, standard output and the lines of standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", *map(str, arguments)])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err.splitlines()


@pytest.fixture(scope="module")
def broken(clean: Path, injector: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Scenes with twelve faults."""
    return injector.inject(clean, clean.parent, tmp_path_factory.mktemp("broken") / "data", n_faults=12, seed=2)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Records whose texts, ids and names try to become markup or to reach the terminal."""
    Image.new("RGB", (8, 8)).save(tmp_path / "<b>'\".png")
    attack = "</span></style><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m[bold]&amp;"
    records = [
        {
            "id": f"{number}{attack}",
            "image": name,
            "conversations": [{"from": "human", "value": f"<image>{attack}"}, {"from": "gpt", "value": attack}],
        }
        for number, name in enumerate(["<b>'\".png", attack])
    ]
    records.append({"id": "half \ud83d", "conversations": [{"from": "human", "value": "a"}]})
    records.append({"id": attack, "conversations": [{"from": attack, "value": "a"}]})
    (tmp_path / "train.json").write_text(json.dumps(records))
    return tmp_path / "train.json"


def test_clean_data_exits_with_0_and_the_last_line_is_the_summary(
    clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = _call(capsys, "--data", clean, "--json")
    assert code == 0
    (line,) = out.splitlines()
    summary = json.loads(line)
    n = len(json.loads(clean.read_text()))
    assert (summary["records"], summary["images"], summary["faults"], summary["n_faults"]) == (n, n, [], 0)
    assert summary["supervised_tokens_share"] is None


def test_faults_exit_with_1_and_are_all_listed_in_the_last_line_and_in_the_files(
    broken: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--data", broken.data, "--image-folder", broken.image_folder, "--output", tmp_path / "out"]
    code, out, _ = _call(capsys, *arguments, "--json", "--show", 1)
    assert code == 1
    summary = json.loads(out.splitlines()[-1])
    expected = [(fault.index, fault.id, fault.kind) for fault in broken.faults]
    assert [(f["index"], f["id"], f["kind"]) for f in summary["faults"]] == expected
    assert all(f["reason"] and f["file"] == broken.data.name for f in summary["faults"])
    assert summary["n_faults"] == summary["n_faulty_records"] == 12
    lines = (tmp_path / "out" / "faults.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == summary.pop("faults")
    assert json.loads((tmp_path / "out" / "check.json").read_text()) == summary


def test_people_get_counts_kinds_examples_and_a_verdict(broken: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _call(capsys, "--data", broken.data, "--image-folder", broken.image_folder)
    assert code == 1
    for fault in broken.faults:
        assert fault.kind in out
        assert f"record {fault.index}" in " ".join(out.split())
    assert out.rstrip().splitlines()[-1].startswith("12 faults in 12 of 100 records; 88 are clean.")
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "data check: give either a recipe or data files. Add --config NAME, or --data FILE."),
        (["--data", "no.json"], "no.json: does not exist"),
        (["--data", "a.json", "--config", "tiny"], "give either a recipe or data files, not both"),
        (["--data", "a.json", "--max-length", "5"], "--max-length: 5 has no effect without a tokenizer"),
        (["--data", "a.json", "--model", "x", "--tokenizer", "y"], "--model and --tokenizer: give one of them"),
        (["--data", "a.json", "--tokenizer", "./no"], "./no: no such folder"),
        (["--data", "a.json", "--model", "./no"], "./no: no such model folder"),
        (["--config", "tiny"], "data.train: the recipe names no data file; its scenes are drawn when it runs"),
        (["--config", "tinny"], "did you mean 'tiny'?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, lines = _call(capsys, *arguments)
    assert (code, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("error: ") and complaint in lines[0]


def test_a_setting_of_a_recipe_without_a_recipe_is_refused(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, lines = _call(capsys, "--data", clean, "seed=1")
    assert code == 2 and "'seed=1' is a setting of a recipe" in lines[0]


def test_a_recipes_data_is_checked_file_by_file(
    clean: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    values = load_recipe("instruct_small").model_dump(mode="json")
    second = tmp_path / "second.json"
    second.write_text(json.dumps(json.loads(clean.read_text())[:5]))
    values["data"] |= {"train": [str(clean), str(second)], "captions": str(clean), "image_folder": str(clean.parent)}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    code, out, _ = _call(capsys, "--config", recipe, "--json")
    summary = json.loads(out)
    assert code == 0
    assert [(f["name"], f["records"]) for f in summary["files"]] == [(clean.name, 100), ("second.json", 5)]
    assert (summary["records"], summary["images"]) == (105, 100)
    code, out, _ = _call(capsys, "--config", recipe, f"data.train={second}", "--json")
    assert [f["name"] for f in json.loads(out)["files"]] == ["second.json", clean.name]


def test_a_model_adds_tokens_and_samples_show_them(
    clean: Path, capsys: pytest.CaptureFixture[str], tiny_model_folder: Path
) -> None:
    code, out, _ = _call(capsys, "--data", clean, "--model", tiny_model_folder, "--show", 2, "--ids", "--json")
    assert code == 0
    summary = json.loads(out.splitlines()[-1])
    assert 0 < summary["supervised_tokens_share"] < 1
    tokens = summary["tokens"]
    assert (tokens["template"], tokens["num_image_tokens"], tokens["records"]) == ("compact", 16, 100)
    assert tokens["image_tokens"] == 1600
    assert round(tokens["supervised_tokens"] / tokens["tokens"], 6) == summary["supervised_tokens_share"]
    assert out.count("[image x 16](") == 2
    assert "<|user|>(" in out


def test_a_tokenizer_alone_is_enough_and_takes_the_template_whose_markers_it_has(
    clean: Path, capsys: pytest.CaptureFixture[str], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = ["--data", clean, "--tokenizer", tmp_path / "tokenizer", "--image-tokens", 3, "--max-length", 20]
    code, out, _ = _call(capsys, *arguments, "--json")
    tokens = json.loads(out.splitlines()[-1])["tokens"]
    assert code in (0, 1)
    assert (tokens["template"], tokens["num_image_tokens"], tokens["max_length"]) == ("compact", 3, 20)
    code, out, _ = _call(capsys, *arguments, "--template", "plain", "--json")
    assert json.loads(out.splitlines()[-1])["tokens"]["template"] == "plain"
    code, _, err = _call(capsys, *arguments, "--template", "chatml", "--json")
    assert code == 2 and "<|im_start|>" in err[0]


def test_a_tokenizers_own_chat_template_makes_the_tokens(
    clean: Path, capsys: pytest.CaptureFixture[str], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    found = {}
    for more in ([], ["--template", "compact"]):
        _, out, _ = _call(capsys, "--data", clean, "--tokenizer", tmp_path / "tokenizer", "--json", *more)
        tokens = json.loads(out.splitlines()[-1])["tokens"]
        found[tokens.pop("template")] = tokens
    assert list(found) == ["tokenizer", "compact"]
    assert found["tokenizer"] == found["compact"]


def test_tiles_are_counted_by_the_size_of_each_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model_factory: Any
) -> None:
    model = tiny_model_factory(resize_mode="anyres")
    model.save_pretrained(tmp_path / "model")
    model.processor.save_pretrained(tmp_path / "model")
    expected = 0
    records = []
    for number, size in enumerate([(30, 30), (90, 20), (20, 90)]):
        Image.new("RGB", size, "red").save(tmp_path / f"{number}.png")
        expected += model.processor.count_image_tokens([size[::-1]])[0]
        turns = [{"from": "human", "value": f"<image>{number}?"}, {"from": "gpt", "value": "yes"}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "train.json").write_text(json.dumps(records))
    code, out, _ = _call(
        capsys, "--data", tmp_path / "train.json", "--model", tmp_path / "model", "--show", 3, "--json"
    )
    assert code == 0
    assert json.loads(out.splitlines()[-1])["tokens"]["image_tokens"] == expected
    counts = [model.processor.count_image_tokens([size])[0] for size in [(30, 30), (20, 90), (90, 20)]]
    assert all(f"[image x {count}]" in out for count in counts)


def test_the_structural_check_imports_no_torch(clean: Path) -> None:
    code = (
        "import sys\nfrom symphony_vlm.cli import main\n"
        "try: main(['data', 'check', '--data', sys.argv[1], '--json', '--show', '1'])\n"
        "except SystemExit as stop: print(stop.code, [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(clean)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert result.stdout.splitlines()[-1] == "0 []"


class _Tags(HTMLParser):
    """The tags of a page, and what they would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_shows_the_data_as_text(
    hostile: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, _, _ = _call(capsys, "--data", hostile, "--output", out, "--show", 3)
    assert code == 1
    page = _Tags()
    page.feed((out / "check.html").read_text(encoding="utf-8"))
    assert not {"script", "iframe", "link", "object"} & set(page.tags)
    assert page.tags.count("img") == 1
    assert len(page.loads) == 1 and page.loads[0].startswith("data:image/jpeg;base64,")
    assert "<script>alert(1)</script>" in page.text
    assert "<b>'\".png" in page.text
    assert [json.loads(line)["kind"] for line in (out / "faults.jsonl").read_text().splitlines()] == [
        "image_missing",
        "surrogate",
        "unknown_role",
    ]


def test_the_datas_control_characters_do_not_reach_the_terminal(
    hostile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = _call(capsys, "--data", hostile, "--show", 2)
    assert code == 1
    assert "\x1b" not in out
    assert "\\x1b[31m[bold]" in out
