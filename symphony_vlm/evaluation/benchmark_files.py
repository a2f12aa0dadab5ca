"""Where a benchmark's parts lie: the file in a folder, the picture of a row, the item that an answer line means."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

from symphony_vlm.data.images import image_key
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.rows import Row
from symphony_vlm.evaluation.rules.yes_no import SHORT_INSTRUCTION

__all__ = ["SAID", "asked_question", "find_file", "join_by_key", "picture", "short_prompt"]

SAID = ("text", "prediction", "response", "pred")
"""Where an answer line has the answer, for benchmarks whose own records call the truth ``answer``: their annotations,
given as predictions, must not score 100 %."""

_INSTRUCTION = "\nAnswer the question "
_OCR_LINE = "\nReference OCR token:"


def find_file(folder: Path, *patterns: str) -> Path | None:
    """The file in a folder that fits the first pattern any file fits.

    Raises:
        InputError: Several do.
    """
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise InputError(f"holds several files {pattern} ({names})", where=str(folder), remedy="Give one of them.")
        if found:
            return found[0]
    return None


def picture(
    row: Row, data: Path, image_folder: Path | None, *fields: str, name: str | None = None
) -> tuple[tuple[ImageRef, ...], str]:
    """The picture of a row, not opened, and what items about the same one share.

    Args:
        row: The record.
        data: The annotations; the pictures are looked for beside them unless there is an ``image_folder``.
        image_folder: What file names are relative to.
        fields: Where the row may hold the picture or its path.
        name: The picture's file name, where the row has no such field; the key too.
    """
    folder = image_folder or (data if data.is_dir() else data.parent)
    images = row.images(*fields, folder=folder)
    if not images and name is not None:
        images = (ImageRef(path=folder / name, name=name),)
    return images, name or (image_key(images[0]) if images else row.where)


def short_prompt(question: str) -> str:
    """LLaVA's prompt for a short answer."""
    return f"{question}{SHORT_INSTRUCTION}"


def asked_question(prompt: str) -> str:
    """The question in a prompt that LLaVA wrote: without marks, OCR tokens and instruction, in lower case."""
    text = prompt.replace("<image>", "").strip()
    return text.partition(_OCR_LINE)[0].partition(_INSTRUCTION)[0].strip().lower()


def join_by_key(
    answers: Iterable[tuple[Row, Hashable, str | None]], item_ids: Mapping[Hashable, Sequence[str]]
) -> dict[str, str]:
    """Answers to items by a key that is no id, such as picture and question.

    Where a benchmark asks the same question about the same picture twice, each answer goes to one of the items.

    Args:
        answers: Row (for messages), key, text; None where an item failed.
        item_ids: Key -> ids of the items with this key.

    Raises:
        InputError: A key of no item, or more answers than items.
    """
    found: dict[str, str] = {}
    answered: set[str] = set()
    for row, key, text in answers:
        if key not in item_ids:
            raise row.error(
                f"{_shown(key)} is no question of the benchmark",
                remedy="Check that predictions and annotations belong together.",
            )
        # An item may have several keys, so what counts is whether the item has its answer.
        item_id = next((item_id for item_id in item_ids[key] if item_id not in answered), None)
        if item_id is None:
            raise row.error(f"a second answer to {_shown(key)}", remedy="Keep one answer per question.")
        answered.add(item_id)
        if text is not None:
            found[item_id] = text
    return found


def _shown(key: Hashable) -> str:
    return ", ".join(map(repr, key)) if isinstance(key, tuple) else repr(key)
