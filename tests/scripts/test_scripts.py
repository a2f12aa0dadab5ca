"""The entry points beside the command line, and what an installation contains."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file

from symphony_vlm.cli import app
from symphony_vlm.config.loading import load_recipe

REPOSITORY = Path(__file__).parents[2]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TWINS = {
    "train.pretrain": "train",
    "train.instruct": "train",
    "train.language_model": "train",
    "eval.benchmark": "eval",
    "eval.perplexity": "perplexity",
    "eval.report": "report",
}


def _call(
    module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit code and output of ``python -m module arguments``, in this process."""
    monkeypatch.syspath_prepend(str(REPOSITORY))
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    capsys.readouterr()
    code = 0
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


# The module twins.


@pytest.mark.parametrize(("module", "command"), TWINS.items())
def test_a_twin_calls_the_same_function_with_the_same_words(
    module: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("symphony_vlm.cli.main", seen.append)
    _call(module, ["--config", "tiny", "seed=1"], monkeypatch, capsys)
    assert seen == [[command, "--config", "tiny", "seed=1"]]


@pytest.mark.parametrize("module", [name for name, command in TWINS.items() if command == "train"])
def test_a_training_twin_resolves_to_the_same_recipe_and_folder(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from symphony_vlm.training.run import TrainResult

    seen: list[tuple[Any, Path]] = []

    def train(recipe: Any, output: Path, **_: Any) -> TrainResult:
        seen.append((recipe, output))
        return TrainResult(run=output, stage="a", step=1, loss=0.0)

    monkeypatch.setattr("symphony_vlm.training.run.train", train)
    arguments = ["--config", "tiny", "--output", str(tmp_path), "seed=1", "stages.instruct.epochs=2"]
    code, _, _ = _call(module, arguments, monkeypatch, capsys)
    assert code == 0
    assert seen == [(load_recipe("tiny", ["seed=1", "stages.instruct.epochs=2"]), tmp_path)]


@pytest.mark.parametrize(
    ("given", "expected"), [([], "common"), (["--corruption", "fog"], "fog"), (["--corruption=fog"], "fog")]
)
def test_robustness_is_eval_on_the_common_corruptions_unless_others_are_given(
    given: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("symphony_vlm.cli.main", seen.append)
    _call("eval.robustness", ["--model", "a", "--output", "b", *given], monkeypatch, capsys)
    (words,) = seen
    assert words[0] == "eval"
    context = COMMANDS["eval"].make_context("eval", words[1:])
    assert (context.params["corruption"], context.params["model"]) == (expected, ["a"])


def test_a_twin_started_by_the_interpreter_explains_a_mistake_like_the_command_line() -> None:
    said = []
    for words in (["train.pretrain"], ["symphony_vlm.cli", "train"]):
        command = [sys.executable, "-m", *words, "--config", "tinny"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
        assert result.returncode == 2
        said.append(result.stderr)
    assert said[0] == said[1]
    assert said[0].startswith("error: tinny: no recipe of that name; did you mean 'tiny'?")


@pytest.mark.parametrize(("module", "command"), {**TWINS, "eval.robustness": "eval"}.items())
def test_every_script_says_how_it_is_called_with_options_that_exist(module: str, command: str) -> None:
    spec = importlib.util.spec_from_file_location(module, REPOSITORY / f"{module.replace('.', '/')}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    found = re.search(rf"``(?:python|torchrun)[^`]*-m {re.escape(module)} ([^`]*)``", loaded.__doc__ or "")
    assert found
    options = {option for parameter in COMMANDS[command].params for option in parameter.opts}
    assert {word for word in shlex.split(found.group(1)) if word.startswith("--")} <= options


# The wheel.


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, without a network."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed, and nothing may be downloaded")
    source = tmp_path_factory.mktemp("source") / "repository"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "runs")
    folders = ("symphony_vlm", "configs", "train", "eval", "demo", "benchmarks", "docs")
    for name in folders:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, source / name, ignore=ignored)
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").touch()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    built = tmp_path_factory.mktemp("dist")
    if importlib.util.find_spec("build") is not None:
        command = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(built), str(source)]
    else:
        command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(built), str(source)]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (file,) = built.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """Paths inside the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_installs_one_package_and_nothing_beside_it(names: set[str]) -> None:
    """Folders such as ``train`` or ``tests`` at the top level would shadow other people's modules."""
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"symphony_vlm"}
    assert len(top) == 2


def test_the_wheel_holds_every_file_of_the_package_and_every_recipe(names: set[str]) -> None:
    package = [
        path for path in (REPOSITORY / "symphony_vlm").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    expected = {str(path.relative_to(REPOSITORY)) for path in package if path.suffix != ".pyc"}
    configs = [path for path in (REPOSITORY / "configs").rglob("*") if path.suffix in (".yaml", ".json")]
    expected |= {f"symphony_vlm/_configs/{path.relative_to(REPOSITORY / 'configs')}" for path in configs}
    assert expected - names == set()


def test_an_installed_package_finds_its_own_recipes_whatever_lies_beside_it(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    # Somebody else's package of a common name.
    (installed / "configs" / "recipes").mkdir(parents=True)
    (installed / "configs" / "recipes" / "alien.yaml").touch()
    environment = os.environ | {"PYTHONPATH": str(installed)}
    code = "import symphony_vlm; print(symphony_vlm.__file__)"
    run = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    where = subprocess.run([sys.executable, "-c", code], **run)  # type: ignore[call-overload]
    assert Path(where.stdout.strip()).is_relative_to(installed), where.stderr
    command = [sys.executable, "-m", "symphony_vlm.cli", "config", "list", "--json"]
    listed = subprocess.run(command, **run)  # type: ignore[call-overload]
    assert listed.returncode == 0, listed.stderr
    ours = {
        kind: sorted(path.stem for path in (REPOSITORY / "configs" / kind).glob("*.yaml"))
        for kind in ("recipes", "data")
    }
    assert json.loads(listed.stdout) == ours


# Several processes.


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _torchrun(config: Path, output: Path) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(_free_port())]
    command = [sys.executable, *launcher, "-m", "train.instruct", "--config", str(config), "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=REPOSITORY, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo on the loopback interface is tried on Linux only")
def test_two_processes_train_the_model_and_the_graphs_of_one(tmp_path: Path) -> None:
    """Two processes with batches of 4 take the same samples in a step as one process with a batch of 8.

    The balance loss is no mean over samples, so it is switched off for the comparison.
    """
    values = load_recipe("tiny").model_dump(mode="json")
    values["model"]["moe"] |= {"balance_loss_weight": 0.0, "z_loss_weight": 0.0}
    values["stages"] = [stage for stage in values["stages"] if stage["kind"] == "multimodal"]
    for stage in values["stages"]:
        stage |= {"max_steps": 4, "log_steps": 1}
    runs = {}
    for name, batch_size in (("one", 8), ("two", 4)):
        for stage in values["stages"]:
            stage["batch_size"] = batch_size
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(values))
        runs[name] = tmp_path / name
        if name == "two":
            result = _torchrun(config, runs[name])
            assert result.returncode == 0, result.stderr
            assert len([line for line in result.stdout.splitlines() if line.startswith("{")]) == 1
            assert "every stage is done" in _torchrun(config, runs[name]).stderr
        else:
            arguments = ["train", "--config", str(config), "--output", str(runs[name])]
            subprocess.run([sys.executable, "-m", "symphony_vlm.cli", *arguments], check=True, capture_output=True)
    logs = {
        name: [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for name, run in runs.items()
    }
    for key in ("loss", "cross_entropy"):
        one, two = ([entry[key] for entry in logs[name] if "loss" in entry] for name in ("one", "two"))
        assert len(one) == 8
        # Sums of fp32 in another order, over a few steps of Adam.
        np.testing.assert_allclose(two, one, rtol=2e-5)
    weights = {name: load_file(run / "instruct" / "model" / "model.safetensors") for name, run in runs.items()}
    graphs = [key for key in weights["one"] if key.endswith("expert_graph.adjacency_EE")]
    assert len(graphs) == 2
    for key in graphs:
        # One flipped choice among some thousand tokens, times (1 - momentum).
        torch.testing.assert_close(weights["two"][key], weights["one"][key], rtol=0, atol=2e-5)
        updates = key.replace("adjacency_EE", "num_updates")
        assert int(weights["two"][updates]) == int(weights["one"][updates]) == 4
