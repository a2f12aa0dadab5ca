"""The cells of a study: one arm, one seed, one text; what runs in each, and when it is done."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from symphony_vlm.files import write_json
from symphony_vlm.study.configuration import Study

__all__ = ["StudyCell", "study_cells"]


@dataclass(frozen=True, kw_only=True)
class StudyCell:
    """What an arm trains and how it is measured, as two commands."""

    arm: str
    seed: int
    text: str
    folder: Path
    train: tuple[str, ...]
    measure: tuple[str, ...]

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.text}/{self.arm}/seed{self.seed}"

    @property
    def measured(self) -> Path:
        """Folder with results.json and lines.jsonl."""
        return self.folder / "perplexity"

    def is_done(self) -> bool:
        """Whether exactly these commands have run to their end."""
        record = self.folder / "cell.json"
        return record.is_file() and json.loads(record.read_text(encoding="utf-8")) == self._record()

    def forget(self) -> None:
        """Removes what other commands left, for a cell cannot go on with other settings."""
        record = self.folder / "begun.json"
        if self.folder.exists() and not (
            record.is_file() and json.loads(record.read_text(encoding="utf-8")) == self._record()
        ):
            shutil.rmtree(self.folder)
        write_json(record, self._record())

    def finish(self) -> None:
        """Notes that it is done, and removes the checkpoints, which nothing needs any more."""
        for checkpoint in (self.folder / "run").glob("*/checkpoint-*"):
            shutil.rmtree(checkpoint)
        write_json(self.folder / "cell.json", self._record())

    def _record(self) -> dict[str, object]:
        # Not the interpreter, which may lie elsewhere next time.
        return {"train": list(self.train[1:]), "measure": list(self.measure[1:])}


def study_cells(study: Study, output: Path, parts: Mapping[str, Mapping[str, Path]]) -> list[StudyCell]:
    """All cells; seeds outermost, so that a study that is stopped has whole comparisons.

    Args:
        study: what to do.
        output: the study's folder.
        parts: files of training, validation and test part by text.
    """
    return [
        _cell(study, output, parts[text], arm, seed, text)
        for seed in study.seeds
        for text in study.texts
        for arm in study.arms
    ]


def _cell(study: Study, output: Path, parts: Mapping[str, Path], arm: str, seed: int, text: str) -> StudyCell:
    folder = output / "cells" / text / arm / f"seed{seed}"
    command = (sys.executable, "-m", "symphony_vlm.cli")
    settings = (
        *study.settings,
        *study.arms[arm].settings,
        f"seed={seed}",
        f"data.text.train={parts['train']}",
        f"data.text.validation={parts['validation']}",
    )
    measured = study.perplexity
    rates = ",".join(f"{rate:g}" for rate in measured.rates)
    options = {
        "--model": str(folder / "run"),
        "--text": str(parts["test"]),
        "--output": str(folder / "perplexity"),
        "--context": str(measured.context),
        "--stride": str(measured.stride),
        "--seed": str(measured.attack_seed),
    } | ({"--attack": "word_swap", "--rate": rates} if rates else {})
    return StudyCell(
        arm=arm,
        seed=seed,
        text=text,
        folder=folder,
        train=(*command, "train", "--config", study.recipe, "--output", str(folder / "run"), *settings),
        measure=(*command, "perplexity", *(word for option in options.items() for word in option)),
    )
