"""Which part of an evaluation: a task under one corruption and one attack."""

from __future__ import annotations

from dataclasses import dataclass

from symphony_vlm.evaluation.task import Task

__all__ = ["Cell"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Which task, corruption and severity; severity 0 is clean."""

    task: Task
    corruption: str
    severity: int
    seed: int
    corrupt_at: str = "native"
    """Where the corruption is applied: ``native``, ``long_side:N`` or ``model_input``."""
    attack: str = "none"
    """Name and budget of the attack."""

    @property
    def file_name(self) -> str:
        """Name of the cell's predictions file."""
        attack = "" if self.attack == "none" else "." + self.attack.replace("/", "-").replace(":", "_")
        return f"{self.task.name}.{self.corruption}.{self.severity}{attack}.jsonl"

    @property
    def is_clean(self) -> bool:
        """Whether nothing is done to its pictures and questions."""
        return self.severity == 0 and self.attack == "none"
