"""The command line: quick help, examples that parse, one line for a mistake, and the exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from symphony_vlm import cli
from symphony_vlm.cli import entry
from symphony_vlm.errors import InputError

REPOSITORY = Path(__file__).parents[1]


def _commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that call it."""
    command = command or typer.main.get_command(cli.app)
    if hasattr(command, "commands"):
        for name, child in command.commands.items():
            yield from _commands(child, (*path, name))
    else:
        yield path, command


COMMANDS = dict(_commands())
NAMES = [" ".join(path) for path in COMMANDS]


def _run(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "symphony_vlm.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=REPOSITORY)


def _call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, list[str]]:
    """Exit code, standard output and the lines of standard error, in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err.splitlines()


# Code of one's own.

ROUTER = "docs/examples/soft_cap_router.py"


def test_every_command_knows_what_a_plugin_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the file's path or the module's name."""
    settings = ("config", "show", "tiny", "model.moe.router=soft_cap")
    unknown = _run(*settings)
    assert unknown.returncode == 2 and "SYMPHONY_VLM_PLUGINS=FILE.py" in unknown.stderr
    monkeypatch.setenv("SYMPHONY_VLM_PLUGINS", f" {ROUTER},")
    assert "router: soft_cap" in _run(*settings).stdout
    monkeypatch.setenv("SYMPHONY_VLM_PLUGINS", "soft_cap_router,json")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / Path(ROUTER).parent))
    assert "router: soft_cap" in _run(*settings).stdout


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "FileNotFoundError"),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        (
            "from symphony_vlm.moe.router import register_router\nregister_router('smoe')\n",
            "is a router of this package",
        ),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_message(
    content: str | None,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "broken_plugin.py"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("SYMPHONY_VLM_PLUGINS", str(file))
    code, _, said = _call(capsys, "config", "list")
    assert code == 2 and len(said) == 1
    assert said[0].startswith("error: SYMPHONY_VLM_PLUGINS: ") and expected in said[0] and str(file) in said[0]
    assert "broken_plugin" not in sys.modules


# Help.


def test_help_answers_at_once_and_lists_every_command() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = _run("--help")
        seconds.append(time.perf_counter() - start)
        assert result.returncode == 0
    for path in COMMANDS:
        assert path[0] in result.stdout
    # 0.3 s on an idle core; the best of three, as other tests may run beside this one.
    assert min(seconds) < 1.5


def test_the_command_line_is_read_without_any_heavy_library() -> None:
    code = "import sys, symphony_vlm.cli; print([m for m in ('torch', 'transformers', 'gradio') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help_for_itself_and_each_of_its_options(name: str) -> None:
    command = COMMANDS[tuple(name.split())]
    assert command.help and len(command.help.split("\n")[0]) > 10
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{name}: {parameter.name}"


@pytest.mark.parametrize("name", NAMES)
def test_every_command_shows_an_example_that_parses(name: str) -> None:
    path = tuple(name.split())
    found = re.search(r"Example: (.+)", COMMANDS[path].help or "")
    assert found, "the docstring ends with 'Example: symphony-vlm ...'"
    words = shlex.split(found.group(1))
    assert words[: 1 + len(path)] == ["symphony-vlm", *path]
    # Builds the context, which parses and checks every option, and runs nothing.
    COMMANDS[path].make_context(name, words[1 + len(path) :])


@pytest.mark.parametrize("name", NAMES)
def test_every_command_prints_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _call(capsys, *name.split(), "--help")
    assert code == 0
    assert "Example:" in out


# Exit codes.


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train"], "Missing option '--config'"),
        (["train", "--config", "tiny", "--ouput", "x"], "No such option: --ouput"),
        (["data", "scenes", "--output", "x", "--train", "many"], "Usage: symphony-vlm data scenes"),
        (["eval", "--model", "a", "--task", "scenes", "--output", "b", "--limit", "0"], "'--limit'"),
        (
            ["eval", "--model", "a", "--task", "scenes", "--output", "b", "--corrupted-limit", "8", "--budget", "2"],
            "the budget chooses the limit",
        ),
    ],
)
def test_a_wrong_command_line_is_explained_without_a_traceback(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, lines = _call(capsys, *arguments)
    assert code == 2
    text = " ".join(" ".join(lines).replace("│", " ").split())
    assert complaint in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["train", "--config", "tinny"], "error: tinny: no recipe of that name; did you mean 'tiny'? Recipes: "),
        (["train", "--config", "tiny", "sed=1"], "unknown key 'sed'; did you mean 'seed'? Keys: "),
        (["config", "show", "tiny", "stages.instruct.epoch=1"], "unknown key 'stages.3.epoch'; did you mean 'epochs'?"),
        (["quickstart", "--router", "smo"], "'smo' is not a router preset; did you mean 'smoe'?"),
        (["chat", "--model", "./nothing", "--prompt", "a"], "error: ./nothing: no such model folder"),
        (["corrupt", "no.png", "--corruption", "fog", "--severity", "1", "--output", "x.png"], "does not exist"),
        (["report", "./nothing", "--output", "x"], "nothing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, lines = _call(capsys, *arguments)
    assert code == 2
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert lines[-1] == errors[0]
    assert complaint in errors[0]


def test_debug_anywhere_on_the_line_shows_the_traceback() -> None:
    for arguments in (["--debug", "config", "show", "tinny"], ["config", "show", "tinny", "--debug"]):
        result = _run(*arguments)
        assert result.returncode not in (0, 2)
        assert "Traceback" in result.stderr
        assert "InputError: tinny: no recipe of that name" in result.stderr


def test_a_fault_of_ours_is_exit_code_1_and_says_how_to_see_more(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of cheese")

    monkeypatch.setattr("symphony_vlm.config.loading.list_recipes", broken)
    code, _, lines = _call(capsys, "config", "list")
    assert code == 1
    assert lines == ["failed: RuntimeError: out of cheese", "add --debug for the traceback"]
    with pytest.raises(RuntimeError):
        cli.main(["config", "list", "--debug"])


def test_an_interruption_from_the_keyboard_is_exit_code_130(tmp_path: Path) -> None:
    arguments = ["data", "scenes", "--output", str(tmp_path / "s"), "--train", "1000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "symphony_vlm.cli", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # A shell without job control starts its background jobs with the signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    give_up = time.monotonic() + 60
    while not list((tmp_path / "s").glob("images/train/*.png")):
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.strip().splitlines()[-1] == "stopped; run the same command again to continue"
    assert "Traceback" not in said


def test_an_interruption_inside_training_or_evaluation_is_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("symphony_vlm.training.run.train", interrupted)
    monkeypatch.setattr("symphony_vlm.evaluation.runner.evaluate", interrupted)
    for arguments in (["train", "--config", "tiny"], ["eval", "--model", "a", "--task", "scenes"]):
        code, _, _ = _call(capsys, *arguments, "--output", str(tmp_path / "x"))
        assert code == 130


# Single commands.


def test_the_console_script_and_the_module_are_the_same_program() -> None:
    script = Path(sys.executable).with_name("symphony-vlm")
    if not script.is_file():
        pytest.skip("the package is not installed")
    result = subprocess.run([str(script), "config", "list", "--json"], capture_output=True, text=True, check=True)
    assert result.stdout == _run("config", "list", "--json").stdout


def test_config_list_and_show_print_what_a_run_would_use(capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    from symphony_vlm.config.loading import list_recipes, load_recipe
    from symphony_vlm.config.prepared import PreparedData, list_prepared, load_prepared
    from symphony_vlm.config.recipe import Recipe

    code, out, _ = _call(capsys, "config", "list", "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1]) == {"recipes": list_recipes(), "data": list_prepared()}
    code, out, _ = _call(capsys, "config", "list")
    assert all(f"  {name} " in out for name in [*list_recipes(), *list_prepared()])
    code, out, _ = _call(capsys, "config", "show", "llava_mix665k")
    assert code == 0
    assert PreparedData.model_validate(yaml.safe_load(out)) == load_prepared("llava_mix665k")
    code, out, _ = _call(capsys, "config", "show", "quickstart", "seed=3", "stages.instruct.epochs=2")
    assert code == 0
    assert Recipe.model_validate(yaml.safe_load(out)) == load_recipe(
        "quickstart", ["seed=3", "stages.instruct.epochs=2"]
    )


def test_train_with_a_default_output_goes_to_runs_and_the_recipes_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from symphony_vlm.training.run import TrainResult

    seen: list[tuple[Any, Path]] = []

    def train(recipe: Any, output: Path, **_: Any) -> TrainResult:
        seen.append((recipe, output))
        return TrainResult(run=output, stage="instruct", step=7, loss=1.5)

    monkeypatch.setattr("symphony_vlm.training.run.train", train)
    code, out, _ = _call(capsys, "train", "--config", "tiny", "seed=4", "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1]) == {
        "run": str(Path("runs") / "tiny"),
        "stage": "instruct",
        "step": 7,
        "loss": 1.5,
    }
    assert (seen[0][0].name, seen[0][0].seed, seen[0][1]) == ("tiny", 4, Path("runs/tiny"))


def test_scenes_can_be_made_and_the_summary_counts_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    summaries = []
    for name in "ab":
        arguments = ["--output", str(tmp_path / name), "--train", "3", "--test", "2", "--seed", "1", "--json"]
        code, out, _ = _call(capsys, "data", "scenes", *arguments)
        assert code == 0
        summaries.append(json.loads(out.splitlines()[-1]))
    assert (summaries[0]["train"], summaries[0]["test"]) == (3, 2)
    assert summaries[0]["sha256"] == summaries[1]["sha256"]


def test_one_picture_can_be_corrupted_and_equal_seeds_give_equal_pixels(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(picture)
    found = {}
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        target = tmp_path / f"out_{name}.png"
        arguments = ["--corruption", "gaussian_noise", "--severity", "3", "--seed", seed, "--output", str(target)]
        code, _, _ = _call(capsys, "corrupt", str(picture), *arguments)
        assert code == 0
        found[name] = np.asarray(Image.open(target))
    assert found["a"].shape == (40, 50, 3)
    assert np.array_equal(found["a"], found["b"])
    assert not np.array_equal(found["a"], found["c"])


def test_the_environment_of_the_caller_wins_over_our_quiet_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    entry._quiet_libraries()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug"


# The wording of errors.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"problem": "is bad"}, "is bad"),
        ({"problem": "is bad", "where": "a.json"}, "a.json: is bad"),
        ({"problem": "is bad", "where": "a.json", "remedy": "Fix it."}, "a.json: is bad. Fix it."),
        ({"problem": "is bad.", "remedy": "Fix it."}, "is bad. Fix it."),
        ({"problem": "no 'a'; did you mean 'b'?", "remedy": "Use b."}, "no 'a'; did you mean 'b'? Use b."),
    ],
)
def test_an_error_says_where_what_and_how_to_go_on(arguments: dict[str, Any], expected: str) -> None:
    assert str(InputError(**arguments)) == expected
