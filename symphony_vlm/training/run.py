"""Runs a recipe from its first stage to its last. Running it again continues where it stopped."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from symphony_vlm.cards.facts import hub_id
from symphony_vlm.cards.writing import write_model_card
from symphony_vlm.config.models import list_known_models, load_known_model
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.files import replacing_folder, write_json
from symphony_vlm.training.provenance import provenance
from symphony_vlm.training.run_data import open_run_data
from symphony_vlm.training.run_state import RunState

if TYPE_CHECKING:
    from symphony_vlm.training.fitting import RunContext

__all__ = ["TrainResult", "train"]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where a finished run is and how it ended."""

    run: Path
    stage: str
    step: int
    loss: float

    def to_dict(self) -> dict[str, Any]:
        """The summary of ``--json``."""
        return {"run": str(self.run), "stage": self.stage, "step": self.step, "loss": self.loss}


def train(
    recipe: Recipe,
    output: Path,
    *,
    console: Console | None = None,
    local_rank: int | None = None,
    profile_steps: int = 0,
) -> TrainResult:
    """Runs every stage that is not done yet.

    Args:
        recipe: what to do.
        output: the run's folder, see ``RUN/`` in the README.
        console: where progress goes; default: standard error.
        local_rank: what the deepspeed launcher has put on the command line.
        profile_steps: how many steps of each stage are profiled, see `profiling`.

    Raises:
        InputError: the data or the settings cannot be used, the folder holds another recipe's run, or the processes
            of a launcher are not one run.
        SavingError: a stage's model could not be saved.
        Stopped: SIGTERM or SIGINT came while a stage trained; a checkpoint is saved.
    """
    console = console or Console(stderr=True)
    import torch

    from symphony_vlm.training.engine import check_engines
    from symphony_vlm.training.launch import join_processes
    from symphony_vlm.training.stages import run_stage

    cpu = not torch.cuda.is_available()
    if cpu:
        # Accelerate imports DeepSpeed, if it is there, at the first save; untold it would warn that it finds no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    processes = join_processes(cpu=cpu, local_rank=local_rank)
    check_engines(recipe)
    if not processes.is_main_process:
        console = Console(quiet=True)
    # Files are made by the first process; the others find them.
    with processes.main_process_first():
        state = RunState(output, recipe, read_only=not processes.is_main_process)
        if all(state.is_done(stage.name) for stage in recipe.stages):
            console.print(f"{output}: every stage is done", markup=False)
            return _result(recipe, output, state)
        context = replace(open_run(recipe, output, state, console), profile_steps=profile_steps)
    for stage in recipe.stages:
        if not state.is_done(stage.name):
            run_stage(stage, context)
            if processes.is_main_process:
                _write_training_record(recipe, output, stage.name)
                write_model_card(context.model_folder(stage.name))
            state.set(stage.name, status="done")
    if processes.is_main_process:
        _link_model(output, recipe.stages[-1].name)
    return _result(recipe, output, state)


def open_run(recipe: Recipe, output: Path, state: RunState, console: Console) -> RunContext:
    """Checks the recipe, opens the data and the tokenizer, and records where the result comes from."""
    from symphony_vlm.training.fitting import RunContext
    from symphony_vlm.training.parts import check_architectures, check_templates, new_augmentation, open_tokenizer
    from symphony_vlm.training.reporting import check_reporters
    from symphony_vlm.training.text_data import open_text_tokenizer

    check_reporters(recipe.monitor)
    check_architectures(recipe.model)
    new_augmentation(recipe)  # refuses what it cannot do
    # Names and records may hold [/INST] and the like, which the console would take for markup.
    data = open_run_data(recipe, output, partial(console.print, markup=False))
    templates = {stage.template for stage in recipe.stages if stage.template is not None}
    state.check_data(data.fingerprints)
    tokenizer = _tokenizer_of(recipe.model.start)
    if tokenizer is None and data.text is not None:
        tokenizer = open_text_tokenizer(recipe.model, output / "tokenizer", data.text)
    elif tokenizer is None:
        tokenizer = open_tokenizer(recipe.model, output / "tokenizer", data.train.values(), sorted(templates))
    if data.text is None:
        # A saved model brings its own template with it.
        own = {recipe.model.template} if recipe.model.start is None else set()
        check_templates(sorted(templates | own), tokenizer)
    write_json(
        output / "provenance.json",
        provenance(
            recipe=recipe.name,
            recipe_sha256=state.values["recipe_sha256"],
            seed=recipe.seed,
            data_sha256=data.fingerprints,
            counts=data.counts,
        ),
    )
    return RunContext(recipe=recipe, folder=output, data=data, tokenizer=tokenizer, state=state, console=console)


def _tokenizer_of(start: str | None) -> Any:
    """The tokenizer of the model that the run starts from."""
    if start is None:
        return None
    from transformers import AutoTokenizer

    from symphony_vlm.model.loading import resolve_model_folder

    return AutoTokenizer.from_pretrained(resolve_model_folder(start))


def _result(recipe: Recipe, output: Path, state: RunState) -> TrainResult:
    last = state.get(recipe.stages[-1].name)
    return TrainResult(run=output, stage=recipe.stages[-1].name, step=last["step"], loss=last["loss"])


def _write_training_record(recipe: Recipe, output: Path, stage: str) -> None:
    """Losses and routing of the run so far beside the stage's model, so that a report can draw them anywhere."""
    names = [each.name for each in recipe.stages]
    log = _json_lines(output / "log.jsonl")
    routing = [{"stage": stage, **entry} for entry in _json_lines(output / stage / "routing.jsonl")]
    record = {
        "recipe": json.loads((output / "state.json").read_text())["recipe"],
        "log": log,
        "routing": routing,
        "provenance": json.loads((output / "provenance.json").read_text()),
        "stages": [
            {"name": each.name, "kind": each.kind, "rates": each.train or {"all": each.learning_rate}}
            for each in recipe.stages[: names.index(stage) + 1]
        ],
        "parts": _pretrained_parts(recipe),
    }
    write_json(output / stage / "model" / "training.json", record)


def _pretrained_parts(recipe: Recipe) -> list[dict[str, str | None]]:
    """Which published models the run began with, and under what licences; what lies in local folders has no name."""
    model = recipe.model
    vision = model.vision
    tower = vision.name if vision and vision.backend == "transformers" else None
    named = {"start": model.start, "vision tower": tower, "language model": model.language.name}
    if model.random_weights:
        return []
    licences = {known.hub_id: known.licence for known in map(load_known_model, list_known_models())}
    found = {part: hub_id(name) for part, name in named.items() if name is not None}
    if vision and vision.pretrained and vision.name:
        found["vision tower"] = hub_id(vision.name)
    return [
        {"part": part, "name": name, "licence": licences.get(name)} for part, name in found.items() if name is not None
    ]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _link_model(output: Path, last_stage: str) -> None:
    """``RUN/model`` stands for the last stage's model."""
    link = output / "model"
    if link.is_symlink() or link.exists():
        return
    try:
        link.symlink_to(Path(last_stage) / "model", target_is_directory=True)
    except OSError:  # file systems without links
        with replacing_folder(link) as temporary:
            shutil.copytree(output / last_stage / "model", temporary)
