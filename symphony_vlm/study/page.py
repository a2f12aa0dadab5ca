"""A study's tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from symphony_vlm.evaluation.perplexity.lines_file import cell_name
from symphony_vlm.study.configuration import Study

__all__ = ["conditions", "page_text"]


def conditions(study: Study) -> list[str]:
    """Names of the clean text and the attacked ones."""
    return [cell_name(None), *(cell_name(rate) for rate in study.perplexity.rates)]


def page_text(study: Study, document: dict[str, Any]) -> str:
    """The tables of a study's ``results.json``.

    Args:
        study: what was done.
        document: see `tables.write_results`.
    """
    names = conditions(study)
    lines = [
        f"# {study.name}",
        "",
        study.description,
        "",
        f"{document['n_cells_done']} of {document['n_cells']} cells are done.",
        "Perplexity per word (line ends are words), from the mean over seeds of nats per word, with 95 % intervals of",
        "a bootstrap of seeds and stretches of text. An expert is dead if it got less than a tenth of an equal share",
        "of the tokens since training's last record.",
        "",
    ]
    for text in study.texts:
        arms = [arm for arm in document["arms"] if arm["text"] == text]
        if not arms:
            continue
        lines += [f"## {text}", "", f"| arm | seeds | {' | '.join(names)} | dead experts | minutes a run |"]
        lines += ["|---" * (len(names) + 4) + "|"]
        for arm in arms:
            shown = " | ".join(_with_interval(arm["values"][name]) for name in names)
            dead, minutes = f"{arm['dead_experts']:.1f} of {arm['experts']}", arm["seconds"] / 60
            lines.append(f"| {arm['arm']} | {len(arm['seeds'])} | {shown} | {dead} | {minutes:.1f} |")
        lines += ["", *_comparison_table([row for row in document["comparisons"] if row["text"] == text]), ""]
    return "\n".join(lines)


def _comparison_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "Nats per word against the baseline, paired by seed and line; below 0 the arm is better. p (seeds): paired",
        "t-test over seeds, beside it with Holm's correction over this table; p (text): sign flips of stretches of",
        "text, for these trained models alone.",
        "",
        "| arm | against | on | difference | p (seeds) | Holm | p (text) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        nats = row["nats_per_word"]
        difference = f"{nats['value']:+.4f} [{nats['low']:+.4f}, {nats['high']:+.4f}]"
        chances = " | ".join("-" if row[key] is None else f"{row[key]:.3g}" for key in ("p_seeds", "p_holm", "p_text"))
        lines.append(f"| {row['arm']} | {row['baseline']} | {row['condition']} | {difference} | {chances} |")
    return lines


def _with_interval(value: dict[str, Any]) -> str:
    return f"{value['value']:.2f} [{value['ci_low']:.2f}, {value['ci_high']:.2f}]"
