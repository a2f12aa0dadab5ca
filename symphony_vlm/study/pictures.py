"""Studies of vision-language models: what all arms share is trained once a seed, and the pictures are shared too."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from symphony_vlm.config.recipe import Recipe
from symphony_vlm.corruptions import find_frost_textures, parse_corruptions
from symphony_vlm.corruptions.catalogue import COMMON
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.sweep import model_labels
from symphony_vlm.evaluation.task import get_task
from symphony_vlm.study.configuration import EvaluationSettings, Study, StudyPictures
from symphony_vlm.study.drift import read_drift
from symphony_vlm.study.jobs import COMMAND, Job
from symphony_vlm.study.picture_recipes import arm_recipe, recipe_text, start_recipe, with_pictures
from symphony_vlm.study.scores import ArmScores, CellScores, Floats
from symphony_vlm.study.setting import Part, Unit

__all__ = ["CLEAN", "CORRUPTED", "PictureSetting"]

DATA = "pictures"
CLEAN, CORRUPTED = "clean", "corrupted"
CLEAN_SHARED = "clean, the corrupted pictures"
SCENES, DEVELOPMENT = "scenes", "development"
DEVELOPMENT_SEED = 1


class PictureSetting:
    """See `setting.Setting`.

    The corrupted score is the mean over all common corrupted cells, unweighted; every cell's own score is there too,
    as ``fog/3``.

    Args:
        study: with pictures.
        output: the study's folder.
    """

    harm = "severity (0 = clean)"
    unit = Unit(name="accuracy", higher_is_better=True, cluster="pictures")
    conditions: Sequence[str] = (CLEAN, CORRUPTED)

    def __init__(self, study: Study, output: Path) -> None:
        assert study.pictures is not None and study.evaluation is not None
        self.study = study
        self._pictures: StudyPictures = study.pictures
        self._evaluation: EvaluationSettings = study.evaluation
        self._corruptions = parse_corruptions(",".join(self._evaluation.corruptions))
        self._output = output

    def data(self) -> Sequence[str]:
        """The pictures are one data set."""
        return [DATA]

    def prepare(self) -> None:
        """Checks the recipes, the files and the task.

        Raises:
            InputError: one of them cannot be used.
        """
        get_task(self._pictures.task)
        if not any(name in COMMON for name in self._corruptions):
            raise InputError(
                "none is one of the 15 common ones, over which the mean is taken", where="evaluation.corruptions"
            )
        if "frost" in self._corruptions:
            find_frost_textures()
        for part in ("train", "test", "development", "image_folder"):
            path = getattr(self._pictures, part)
            if path is not None and not Path(path).expanduser().exists():
                raise InputError("does not exist", where=f"pictures.{part}: {path}")
        for arm in self.study.arms:
            self._trained(arm, self.study.seeds[0])

    def jobs(self, part: Part, arms: Collection[str]) -> list[Job]:
        """Seeds outermost, each with its measurement of all arms together."""
        ordered = self._ordered(arms)
        found = list(self._drawn())
        for seed in self.study.seeds:
            found += [*self._start(seed), *(self._trained(arm, seed) for arm in ordered)]
            found.append(self._measured(part, seed, ordered))
        return found

    def clean_of(self, condition: str) -> str:
        """Corrupted cells have fewer questions."""
        return CLEAN_SHARED if condition == CORRUPTED else CLEAN

    def curve(self, scores: ArmScores, seeds: Sequence[int]) -> list[tuple[float, Floats, Floats]]:
        """See `Setting.curve`; the mean over the common corruptions, on the same pictures throughout."""
        weights = scores.weights(CLEAN_SHARED)
        found = [(0.0, scores.sums(CLEAN_SHARED, seeds), weights)]
        for severity in sorted(self._evaluation.severities):
            cells = [scores.sums(f"{name}/{severity}", seeds) for name in self._corruptions if name in COMMON]
            found.append((float(severity), np.mean(cells, axis=0), weights))
        return found

    def cells(self, part: Part, data: str, arms: Collection[str]) -> dict[str, list[CellScores]]:
        """See `Setting.cells`."""
        ordered = self._ordered(arms)
        found: dict[str, list[CellScores]] = {}
        for seed in self.study.seeds:
            measured = self._measured(part, seed, ordered)
            if not measured.is_done():
                continue
            trained = [self._trained(arm, seed) for arm in ordered]
            labels = model_labels([str(job.folder / "run") for job in trained])
            for arm, job, label in zip(ordered, trained, labels, strict=True):
                results = measured.folder / "results"
                folder = results if len(ordered) == 1 else results / label
                found.setdefault(arm, []).append(self._scores(folder / "predictions", job, seed))
        return found

    def _scores(self, folder: Path, trained: Job, seed: int) -> CellScores:
        grid = [(name, severity) for name in self._corruptions for severity in self._evaluation.severities]
        records = {
            f"{name}/{severity}" if severity else CLEAN: _read(
                folder / f"{self._pictures.task}.{name}.{severity}.jsonl"
            )
            for name, severity in [("none", 0), *grid]
        }
        sums = {condition: _by_picture(found) for condition, found in records.items()}
        common = [sums[f"{name}/{severity}"] for name, severity in grid if name in COMMON]
        sums[CORRUPTED] = {
            picture: (mean(cell[picture][0] for cell in common), weight) for picture, (_, weight) in common[0].items()
        }
        sums[CLEAN_SHARED] = {picture: sums[CLEAN][picture] for picture in common[0]}
        said = [[condition, r["item_id"], r["prediction"]] for condition, found in records.items() for r in found]
        return CellScores(
            seed=seed,
            run=trained.folder / "run",
            sums=sums,
            predictions="".join(f"{json.dumps(line)}\n" for line in said),
            seconds=float((trained.folder / "seconds.txt").read_text()),
            drift=read_drift(folder.parent / "results.json") if self._evaluation.routing else {},
        )

    def _ordered(self, arms: Collection[str]) -> list[str]:
        return [arm for arm in self.study.arms if arm in arms]

    # Jobs.

    def _drawn(self) -> list[Job]:
        """The scenes; those for the choice of settings share no picture with the others."""
        scenes = self._pictures.scenes
        if scenes is None:
            return []
        found = []
        parts = [(SCENES, scenes.train, 0), *([(DEVELOPMENT, 1, DEVELOPMENT_SEED)] if self.study.select else [])]
        for name, train, seed in parts:
            numbers = {"train": train, "test": scenes.test, "seed": seed, "image-size": scenes.image_size}
            options = [word for key, value in numbers.items() for word in (f"--{key}", str(value))]
            folder = self._output / name
            draw = (*COMMAND, "data", "scenes", "--output", str(folder / "data"), *options)
            found.append(Job(name=name, folder=folder, commands={"draw": draw}))
        return found

    def _start(self, seed: int) -> list[Job]:
        """The stages that all arms share, if there are any."""
        recipe = start_recipe(self.study, seed)
        return [] if recipe is None else [self._training(self._output / "start" / f"seed{seed}", recipe, seed, [])]

    def _trained(self, arm: str, seed: int) -> Job:
        start = self._start(seed)
        model = None
        if start:
            first = start_recipe(self.study, seed)
            assert first is not None
            model = str(start[0].folder / "run" / first.stages[-1].name / "model")
        recipe = arm_recipe(self.study, arm, seed, model)
        return self._training(self._output / "cells" / DATA / arm / f"seed{seed}", recipe, seed, start)

    def _training(self, folder: Path, recipe: Recipe, seed: int, start: Sequence[Job]) -> Job:
        scenes = self._output / SCENES / "data"
        train, captions = (
            (str(self._pictures.train), None)
            if self._pictures.scenes is None
            else (str(scenes / "train.json"), str(scenes / "captions_train.json"))
        )
        # The vision tower is frozen in what the arms train themselves: one encodes a picture for all.
        cache = str(self._output / "features" / f"seed{seed}")
        files = with_pictures(
            recipe,
            train=train,
            captions=captions,
            image_folder=self._pictures.image_folder,
            feature_cache=cache,
            checked=bool(start),
        )
        run = ("--config", str(folder / "recipe.yaml"), "--output", str(folder / "run"))
        return Job(
            name=str(folder.relative_to(self._output)),
            folder=folder,
            files={"recipe.yaml": recipe_text(files)},
            commands={"train": (*COMMAND, "train", *run)},
            needs=(*self._drawn()[:1], *start),
        )

    def _measured(self, part: Part, seed: int, arms: Sequence[str]) -> Job:
        """All arms in one process, which opens, corrupts and (where the towers are equal) encodes each picture once."""
        folder = self._output / "evaluation" / part / f"seed{seed}"
        trained = [self._trained(arm, seed) for arm in arms]
        evaluation = self._evaluation
        options = {
            "--task": self._pictures.task,
            "--data": self._data_file(part),
            "--corruption": ",".join(self._corruptions),
            "--severity": ",".join(map(str, evaluation.severities)),
            "--batch-size": str(evaluation.batch_size),
            "--max-new-tokens": str(evaluation.max_new_tokens),
            "--seed": str(evaluation.seed),
            "--output": str(folder / "results"),
        }
        models = [("--model", str(job.folder / "run")) for job in trained]
        words = [word for pair in (*models, *options.items()) for word in pair]
        for name, limit in (("--limit", evaluation.limit), ("--corrupted-limit", evaluation.corrupted_limit)):
            words += [] if limit is None else [name, str(limit)]
        words += [] if self._pictures.image_folder is None else ["--image-folder", self._pictures.image_folder]
        words += ["--routing"] if evaluation.routing else []
        return Job(
            name=str(folder.relative_to(self._output)),
            folder=folder,
            commands={"evaluate": (*COMMAND, "eval", *words)},
            needs=(*self._drawn(), *trained),
        )

    def _data_file(self, part: Part) -> str:
        if self._pictures.scenes is not None:
            return str(self._output / (SCENES if part == "test" else DEVELOPMENT) / "data" / "test.json")
        return str(getattr(self._pictures, part))


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _by_picture(records: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    for record in records:
        right, asked = found.get(record["image_key"], (0.0, 0.0))
        found[record["image_key"]] = (right + record["score"], asked + 1.0)
    return found
