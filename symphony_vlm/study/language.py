"""Studies of language models: every cell trains on one text and is measured on its validation or test part."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.perplexity.lines_file import cell_name, read_line_records
from symphony_vlm.study.configuration import PerplexitySettings, Study
from symphony_vlm.study.jobs import COMMAND, Job
from symphony_vlm.study.scores import ArmScores, CellScores, Floats
from symphony_vlm.study.setting import Part, Unit
from symphony_vlm.study.text_parts import write_parts

__all__ = ["LanguageSetting"]


class LanguageSetting:
    """See `setting.Setting`.

    Args:
        study: with texts.
        output: the study's folder.
    """

    harm = "share of words swapped"
    unit = Unit(name="nats per word", higher_is_better=False, cluster="stretches of text")

    def __init__(self, study: Study, output: Path) -> None:
        assert study.perplexity is not None
        self.study = study
        self.conditions = [cell_name(None), *(cell_name(rate) for rate in study.perplexity.rates)]
        self._perplexity: PerplexitySettings = study.perplexity
        self._output = output

    def data(self) -> Sequence[str]:
        """The texts."""
        return list(self.study.texts)

    def prepare(self) -> None:
        """Checks the recipes and cuts the texts.

        Raises:
            InputError: a recipe, a setting or a text cannot be used.
        """
        for name, arm in self.study.arms.items():
            recipe = load_recipe(self.study.recipe, [*self.study.settings, *arm.settings])
            if not recipe.is_language:
                raise InputError(
                    f"{self.study.recipe!r} has no language stages",
                    where=f"arm {name!r}",
                    remedy="Name a recipe that has.",
                )
        for name, text in self.study.texts.items():
            write_parts(text, self._text_folder(name))

    def jobs(self, part: Part, arms: Collection[str]) -> list[Job]:
        """Seeds outermost, so that a study that is stopped has whole comparisons."""
        chosen = [arm for arm in self.study.arms if arm in arms]
        return [
            job
            for seed in self.study.seeds
            for text in self.study.texts
            for arm in chosen
            for job in self._of_cell(part, text, arm, seed)
        ]

    def clean_of(self, condition: str) -> str:
        """The same lines are scored clean and attacked."""
        return cell_name(None)

    def curve(self, scores: ArmScores, seeds: Sequence[int]) -> list[tuple[float, Floats, Floats]]:
        """See `Setting.curve`."""
        harms = [0.0, *self._perplexity.rates]
        found = zip(harms, self.conditions, strict=True)
        return [(harm, scores.sums(name, seeds), scores.weights(name)) for harm, name in sorted(found)]

    def cells(self, part: Part, data: str, arms: Collection[str]) -> dict[str, list[CellScores]]:
        """See `Setting.cells`."""
        found: dict[str, list[CellScores]] = {}
        for arm in arms:
            for seed in self.study.seeds:
                jobs = self._of_cell(part, data, arm, seed)
                if all(job.is_done() for job in jobs):
                    cell = self._scores(jobs[0], self._measured(part, jobs[-1].folder), seed)
                    found.setdefault(arm, []).append(cell)
        return found

    def _scores(self, trained: Job, measured: Path, seed: int) -> CellScores:
        sums = {}
        for condition, records in read_line_records(measured).items():
            clusters: dict[str, tuple[float, float]] = {}
            for record in records.values():
                nats, words = clusters.get(record["cluster"], (0.0, 0.0))
                clusters[record["cluster"]] = (nats - record["log_probability"], words + record["n_words"])
            sums[condition] = clusters
        return CellScores(
            seed=seed,
            run=trained.folder / "run",
            sums=sums,
            predictions=(measured / "lines.jsonl").read_text(encoding="utf-8"),
            seconds=float((trained.folder / "seconds.txt").read_text()),
        )

    def _of_cell(self, part: Part, text: str, arm: str, seed: int) -> list[Job]:
        """Training with the first measurement, on the development data if the study has any; then that of the test."""
        folder = self._output / "cells" / text / arm / f"seed{seed}"
        name = f"{text}/{arm}/seed{seed}"
        run = folder / "run"
        settings = (
            *self.study.settings,
            *self.study.arms[arm].settings,
            f"seed={seed}",
            f"data.text.train={self._text_folder(text) / 'train.txt'}",
            f"data.text.validation={self._text_folder(text) / 'validation.txt'}",
        )
        train = (*COMMAND, "train", "--config", self.study.recipe, "--output", str(run), *settings)
        first: Part = "test" if self.study.select is None else "development"
        trained = Job(
            name=name, folder=folder, commands={"train": train, "measure": self._measure(first, text, run, folder)}
        )
        if part == first:
            return [trained]
        tested = folder / "test"
        measure = {"measure": self._measure(part, text, run, tested)}
        return [trained, Job(name=f"{name}/test", folder=tested, commands=measure, needs=(trained,))]

    def _measure(self, part: Part, text: str, run: Path, folder: Path) -> tuple[str, ...]:
        measured = self._perplexity
        rates = ",".join(f"{rate:g}" for rate in measured.rates)
        file = "test.txt" if part == "test" else "validation.txt"
        options = {
            "--model": str(run),
            "--text": str(self._text_folder(text) / file),
            "--output": str(self._measured(part, folder)),
            "--context": str(measured.context),
            "--stride": str(measured.stride),
            "--seed": str(measured.attack_seed),
        } | ({"--attack": "word_swap", "--rate": rates} if rates else {})
        return (*COMMAND, "perplexity", *(word for option in options.items() for word in option))

    def _measured(self, part: Part, folder: Path) -> Path:
        return folder / ("perplexity" if part == "test" else "development")

    def _text_folder(self, text: str) -> Path:
        return self._output / "texts" / text
