"""MMMU's rule for multiple choice answers (its ``eval_utils.py``), without the random guess."""

from __future__ import annotations

from collections.abc import Sequence

from symphony_vlm.evaluation.rules.letters import letters

__all__ = ["mmmu_letter"]


def mmmu_letter(response: str, choices: Sequence[str]) -> str | None:
    """The letter that an answer gives; None where the official script would guess.

    Candidates are letters as ``(X)``; if there are none, letters between spaces; if there are none and the answer has
    more than five words, options whose text occurs, without case. Of several the one that occurs last, the first on a
    tie.
    """
    for mark in ",.!?;:'":
        response = response.strip(mark)
    response = f" {response} "
    lowered = response.lower()
    names = letters(len(choices))
    places = {name: response.rfind(f"({name})") for name in names}
    if max(places.values(), default=-1) < 0:
        places = {name: response.rfind(f" {name} ") for name in names}
    if max(places.values(), default=-1) < 0 and len(response.split()) > 5:
        places = {name: lowered.rfind(choice.lower()) for name, choice in zip(names, choices, strict=True)}
    found = [name for name in names if places[name] >= 0]
    return max(found, key=places.__getitem__) if found else None
