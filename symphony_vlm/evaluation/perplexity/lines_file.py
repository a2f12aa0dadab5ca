"""``lines.jsonl``: what each line cost, clean and attacked; the input of every paired test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.perplexity.tokens import LineCounts
from symphony_vlm.files import write_text

__all__ = ["cell_name", "line_nats", "line_records", "read_line_records", "write_line_records"]


def cell_name(rate: float | None) -> str:
    """``clean``, or ``word_swap@0.015``."""
    return "clean" if rate is None else f"word_swap@{rate:g}"


def line_records(
    name: str, counts: LineCounts, clusters: Sequence[str], swapped_by_line: Sequence[int]
) -> list[dict[str, Any]]:
    """One record a line that has scored tokens."""
    return [
        {
            "cell": name,
            "line": index,
            "cluster": clusters[index],
            "n_words": int(counts.words[index]),
            "n_tokens": int(counts.tokens[index]),
            "n_swapped": swapped_by_line[index],
            "log_probability": -float(counts.nll[index]),
            "n_tokens_kept": int(counts.kept_tokens[index]),
            "log_probability_kept": -float(counts.kept_nll[index]),
        }
        for index in range(len(counts.tokens))
        if counts.tokens[index]
    ]


def write_line_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """All or nothing; floats with every digit, so that sums can be formed again."""
    write_text(path, "".join(f"{json.dumps(record)}\n" for record in records))


def read_line_records(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Records by cell and line, of a folder that `symphony-vlm perplexity` wrote.

    Raises:
        InputError: there is none, or a line of it is broken.
    """
    path = folder / "lines.jsonl"
    if not path.is_file():
        raise InputError(
            "no lines.jsonl", where=str(folder), remedy="Give a folder written by symphony-vlm perplexity --output."
        )
    cells: dict[str, dict[int, dict[str, Any]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            cells.setdefault(record["cell"], {})[int(record["line"])] = record
            float(record["log_probability"]), int(record["n_words"]), str(record["cluster"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"line {number} is no record of a line ({error!r})", where=str(path)) from error
    return cells


def line_nats(
    first: dict[int, dict[str, Any]], second: dict[int, dict[str, Any]], where: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], list[str]]:
    """Nats of the same lines in two cells, words, clusters; lines whose words are not scored in both are left out.

    Raises:
        InputError: the two are of different texts.
    """
    if set(first) != set(second):
        raise InputError(
            f"{len(set(first) ^ set(second))} lines are scored in one and not in the other",
            where=where,
            remedy="Compare evaluations of the same text, context and stride.",
        )
    shared = [line for line in sorted(first) if first[line]["n_words"] == second[line]["n_words"]]
    if len(shared) < 0.99 * len(first):
        raise InputError(
            f"only {len(shared)} of {len(first)} lines have the same number of words in both",
            where=where,
            remedy="Compare evaluations of the same text.",
        )
    nats = [np.asarray([-cell[line]["log_probability"] for line in shared]) for cell in (first, second)]
    words = np.asarray([first[line]["n_words"] for line in shared], dtype=np.float64)
    return nats[0], nats[1], words, [str(first[line]["cluster"]) for line in shared]
