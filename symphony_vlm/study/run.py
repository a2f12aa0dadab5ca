"""A study from its data to its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from symphony_vlm.errors import InputError
from symphony_vlm.study.configuration import Study
from symphony_vlm.study.jobs import Job
from symphony_vlm.study.language import LanguageSetting
from symphony_vlm.study.pictures import PictureSetting
from symphony_vlm.study.results import write_results
from symphony_vlm.study.runner import run_jobs, visible_gpus
from symphony_vlm.study.scores import ArmScores
from symphony_vlm.study.selection import Chosen, arms_to_test, choose
from symphony_vlm.study.setting import Part, Setting
from symphony_vlm.study.tables import scores_of
from symphony_vlm.training.provenance import provenance

__all__ = ["StudyResult", "run_study", "setting_of"]


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """Where the tables are, and what failed."""

    results: Path
    page: Path
    n_jobs: int
    failures: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The summary of ``--json``."""
        return {
            "results": str(self.results),
            "tables": str(self.page),
            "n_jobs": self.n_jobs,
            "n_failed": len(self.failures),
        }


def setting_of(study: Study, output: Path) -> Setting:
    """The kind of study that it is."""
    return LanguageSetting(study, output) if study.is_language else PictureSetting(study, output)


def run_study(
    study: Study,
    output: Path,
    *,
    at_once: int,
    threads: int,
    command: str = "",
    console: Console,
) -> StudyResult:
    """Runs the jobs that are not done and writes the tables of all.

    Args:
        study: what to do.
        output: its folder: data, ``cells/``, ``results.json``, ``results.md``, figures.
        at_once: jobs at a time.
        threads: of each.
        command: that runs it again, for the page.
        console: where progress goes.

    Raises:
        InputError: a recipe, a setting or the data cannot be used, every cell failed, or a choice lacks cells.
    """
    output = output.resolve()
    setting = setting_of(study, output)
    setting.prepare()
    run = _Run(setting=setting, at_once=at_once, threads=threads, console=console)
    scores: dict[Part, dict[str, dict[str, ArmScores]]] = {}
    chosen: list[Chosen] = []
    arms = list(study.arms)
    if study.select is not None:
        scores["development"] = run.scores("development", arms)
        if not run.failures:
            [of_arms] = scores["development"].values()
            chosen = choose(setting, study.select, of_arms)
            scores["test"] = run.scores("test", arms_to_test(arms, chosen))
    else:
        scores["test"] = run.scores("test", arms)
    if not any(scores.values()) and run.failures:
        name, said = next(iter(run.failures.items()))
        raise InputError(f"every cell failed; {name} said: {said}", where=study.name)
    n_done = sum(job.is_done() for job in run.jobs.values())
    page = write_results(
        setting,
        scores,
        chosen,
        output,
        command=command,
        n_jobs=(n_done, len(run.jobs)),
        provenance=provenance(study=study.name, at_once=at_once, threads=threads),
    )
    return StudyResult(results=output / "results.json", page=page, n_jobs=len(run.jobs), failures=run.failures)


@dataclass(kw_only=True)
class _Run:
    """What has been run so far."""

    setting: Setting
    at_once: int
    threads: int
    console: Console
    jobs: dict[str, Job] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def scores(self, part: Part, arms: Sequence[str]) -> dict[str, dict[str, ArmScores]]:
        """Runs what is not done of these arms on that part of the data, and reads what is."""
        jobs = self.setting.jobs(part, arms)
        self.jobs |= {job.name: job for job in jobs}
        self.failures |= run_jobs(
            jobs, at_once=self.at_once, threads=self.threads, console=self.console, gpus=visible_gpus()
        )
        return scores_of(self.setting, part, arms)
