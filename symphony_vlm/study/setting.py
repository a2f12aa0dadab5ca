"""What a study of language models and one of vision-language models have in common."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from symphony_vlm.study.configuration import Study
from symphony_vlm.study.jobs import Job
from symphony_vlm.study.scores import ArmScores, CellScores, Floats

__all__ = ["Part", "Setting", "Unit"]

Part = Literal["development", "test"]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """How figures are read."""

    name: str
    """Of means and differences: ``nats per word``, ``accuracy``."""
    higher_is_better: bool
    cluster: str
    """What is drawn again beside the seeds, in the plural."""


class Setting(Protocol):
    """Jobs of a study, and what they found."""

    @property
    def study(self) -> Study:
        """What is done."""
        ...

    @property
    def unit(self) -> Unit:
        """How figures are read."""
        ...

    @property
    def conditions(self) -> Sequence[str]:
        """Clean first, then those that are compared with it."""
        ...

    @property
    def harm(self) -> str:
        """What `curve` is drawn over."""
        ...

    def data(self) -> Sequence[str]:
        """Names of the data sets, one table each."""
        ...

    def prepare(self) -> None:
        """Checks what can be checked before hours of work, and makes what all jobs read."""
        ...

    def jobs(self, part: Part, arms: Collection[str]) -> list[Job]:
        """All that has to be done before `cells` has these arms on that part, what others need first."""
        ...

    def clean_of(self, condition: str) -> str:
        """The clean condition over the same questions."""
        ...

    def cells(self, part: Part, data: str, arms: Collection[str]) -> dict[str, list[CellScores]]:
        """Of the arms that `jobs` was asked for the seeds that are done; arms without any are left out."""
        ...

    def curve(self, scores: ArmScores, seeds: Sequence[int]) -> list[tuple[float, Floats, Floats]]:
        """Sums ``[S, G]`` of these seeds and weights ``[G]`` by the harm done to the data, none (0) first."""
        ...
