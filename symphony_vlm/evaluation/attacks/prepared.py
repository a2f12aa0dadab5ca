"""The attacks of an evaluation: prepared for its tasks, refused where they cannot be, summarised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.attacks.attack import Attack
from symphony_vlm.evaluation.attacks.letter_bias import letter_bias
from symphony_vlm.evaluation.attacks.option_permutation import OptionPermutation
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.opening import OpenedModel
from symphony_vlm.evaluation.records import read_records

__all__ = ["PreparedAttacks", "attack_summary", "require_gradients"]


@dataclass(frozen=True)
class PreparedAttacks:
    """Each attack as prepared for each task."""

    by_task: Mapping[tuple[str, str], Attack]
    """By task and spec."""

    @classmethod
    def of_tasks(cls, attacks: Sequence[Attack], items: Mapping[str, Sequence[EvaluationItem]]) -> PreparedAttacks:
        """Prepares attacks.

        Args:
            attacks: what was asked for.
            items: of each task, all of them.

        Raises:
            InputError: a task has no item that an attack applies to.
        """
        prepared: dict[tuple[str, str], Attack] = {}
        for attack in attacks:
            for task, listed in items.items():
                ready = attack.prepared(listed)
                if not any(map(ready.applies_to, listed)):
                    raise InputError(
                        f"none of its {len(listed)} items can be attacked by {attack.name}",
                        where=f"--task {task}",
                        remedy="Leave the attack out, or evaluate the task by itself.",
                    )
                prepared[task, attack.spec] = ready
        return cls(prepared)

    def of(self, cell: Cell) -> Attack | None:
        """The cell's attack; None for ``none``."""
        return self.by_task.get((cell.task.name, cell.attack))

    def items(self, cell: Cell, items: Sequence[EvaluationItem]) -> list[EvaluationItem]:
        """Those that the cell's attack applies to."""
        attack = self.of(cell)
        return list(items) if attack is None else [item for item in items if attack.applies_to(item)]


def require_gradients(attacks: Sequence[Attack], model: OpenedModel) -> None:
    """Refuses attacks that need the gradient of a model that gives none.

    Raises:
        InputError: the model is of another package, or works on tiles.
    """
    needy = [attack.name for attack in attacks if attack.needs_gradient]
    if not needy:
        return
    if model.is_stock:
        raise InputError(
            f"needs the gradient at the pixels, which only models trained here give; this is a {model.router} of "
            "transformers",
            where=f"--attack {needy[0]}",
            remedy="Leave it out; the other attacks work.",
        )
    images = getattr(model.processor, "image_processor", None)
    if images is None:
        raise InputError("the model sees no pictures", where=f"--attack {needy[0]}", remedy="Leave it out.")
    if images.tile_grid is not None:
        raise InputError(
            "the model cuts pictures into overlapping tiles (resize_mode: anyres), where an attack on the pixels that "
            "the encoder sees is none on the picture",
            where=f"--attack {needy[0]}",
            remedy="Leave it out; the other attacks work.",
        )


def attack_summary(cells: Sequence[Cell], folder: Path) -> list[dict[str, Any]]:
    """What of an attack is no figure with an interval: the letter bias of each cell with permuted options.

    Args:
        cells: of the evaluation.
        folder: of their predictions.
    """
    return [
        {
            "task": cell.task.name,
            "corruption": cell.corruption,
            "severity": cell.severity,
            "attack": cell.attack,
            "letter_bias": letter_bias(read_records(folder / cell.file_name)),
        }
        for cell in cells
        if cell.attack.partition(":")[0] == OptionPermutation.name
    ]
