"""Any multiple choice data: LLaVA JSON or JSONL, or parquet with question, answer and options.

Options stand in ``choices`` or ``options`` (a list), in columns A, B, C ..., or inside the question as ``A. text``.
The answer is a letter, the text of an option or, if it is neither, the index of an option, from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from symphony_vlm.data.datasets import open_samples
from symphony_vlm.data.fields import shortened
from symphony_vlm.data.sample import Sample
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.loading import key_of, needed, unique, whole_number
from symphony_vlm.evaluation.rules.letters import (
    LETTER_INSTRUCTION,
    letters,
    options_block,
    score_letter,
    split_options,
)
from symphony_vlm.evaluation.task import Task

__all__ = ["TASK"]


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    data = needed(data, "LLaVA JSON, JSONL or parquet with question, answer and choices")
    return unique((_item(sample) for sample in open_samples(data, image_folder=image_folder)), data)


def _item(sample: Sample) -> EvaluationItem:
    asked = [message for message in sample.messages if message.role == "user"]
    answered = [message for message in sample.messages if message.role == "assistant"]
    if len(asked) != 1 or len(answered) != 1:
        raise InputError(f"has {len(asked)} questions; a multiple choice record has one", where=sample.origin)
    text = asked[0].text.strip("\n")
    listed = _listed(sample)
    choices = listed or split_options(text)
    if not choices:
        raise InputError(
            "has no options",
            where=sample.origin,
            remedy="Give them as a list in 'choices', in columns A, B, ..., or in the question, a line 'A. text' each.",
        )
    if listed and options_block(listed) not in text:
        text = f"{text}\n{options_block(listed)}{LETTER_INSTRUCTION}"
    group = sample.meta.get("type") or sample.meta.get("category") or sample.meta.get("source")
    return EvaluationItem(
        id=sample.id,
        question=text,
        answers=(_letter(answered[0].text, choices, sample.origin),),
        images=sample.images,
        image_key=key_of(sample.images, sample.id),
        group=str(group) if group is not None else None,
        choices=choices,
    )


def _listed(sample: Sample) -> tuple[str, ...]:
    """The options that a record has in fields of their own."""
    options: Any = sample.meta.get("choices") or sample.meta.get("options")
    if options is None:
        options = []
        for name in letters(26):
            value = sample.meta.get(name)
            # Tables write an option that is missing as null, nothing or nan.
            if value is None or str(value).strip().lower() in ("", "nan"):
                break
            options.append(value)
    if not isinstance(options, list) or len(options) > 26:
        raise InputError(f"the options are {shortened(options)}; they must be a list of texts", where=sample.origin)
    return tuple(map(str, options))


def _letter(answer: str, choices: Sequence[str], origin: str) -> str:
    answer, names = answer.strip(), letters(len(choices))
    if len(answer) == 1 and answer in names:
        return answer
    if list(choices).count(answer) == 1:
        return names[list(choices).index(answer)]
    index = whole_number(answer)
    if index is not None and index < len(choices):
        return names[index]
    raise InputError(
        f"the answer is {shortened(answer)}; it must be a letter of {names}, the text of an option, or its index",
        where=origin,
    )


TASK = Task(name="multiple_choice", split="data", load=_load, score=score_letter, max_new_tokens=128)
