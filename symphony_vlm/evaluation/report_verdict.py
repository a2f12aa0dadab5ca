"""The result in a sentence: what was shown, or honestly that nothing was."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from symphony_vlm.evaluation.report_entries import figure_of, p_text

__all__ = ["verdict", "verdicts"]

Json = Mapping[str, Any]


def verdicts(robustness: Json) -> list[str]:
    """The result in one sentence per pair of models and task (one per model where there is no pair).

    Where routers have several training runs, what those say comes first.
    """
    over_runs = [_seeds_verdict(block) for block in robustness["seeds"] if "difference_in_differences" in block]
    if robustness["comparisons"]:
        return over_runs + [_pair_verdict(comparison) for comparison in robustness["comparisons"]]
    return [_single_verdict(model) for model in robustness["models"]]


def _seeds_verdict(block: Json) -> str:
    found, runs = block["difference_in_differences"], f"over {len(block['runs'])} training runs"
    if found["value"] is None:
        return f"On {block['task']}, {block['router']} and {block['baseline']} {runs}: {found['reason']}."
    text = f"{_interval(found, signed=True)} points"
    if not (found["ci_low"] > 0 or found["ci_high"] < 0):
        return (
            f"On {block['task']}, {runs} no difference in robustness shown between {block['router']} and "
            f"{block['baseline']}: the difference of their mean losses is {text}, an interval over runs."
        )
    word = "less" if found["value"] > 0 else "more"
    return (
        f"On {block['task']}, {runs} {block['router']} loses {figure_of(abs(found['value']))} points {word} than "
        f"{block['baseline']} under corruption: {text}, an interval over runs."
    )


def _pair_verdict(comparison: Json) -> str:
    primary, clean = comparison["primary"], comparison["clean_difference"]
    better, other = comparison["model"], comparison["baseline"]
    beside = f"on clean images {better} minus {other} is {_interval(clean, signed=True)} points"
    if primary["value"] is None:
        if not _significant(clean):
            return f"On {comparison['task']}, no difference shown: {beside}; no robustness was measured."
        return f"On {comparison['task']}, {beside}; no robustness was measured."
    text = f"{_interval(primary, signed=True)} points, p {_p(primary['p'])}, {comparison['n_images']} images"
    if not _significant(primary):
        return (
            f"On {comparison['task']}, no difference in robustness shown between {better} and {other}: the "
            f"difference of their losses under corruption is {text}{_near_miss(primary)}; {beside}."
        )
    word = "less" if primary["value"] > 0 else "more"
    return (
        f"On {comparison['task']}, {better} loses {figure_of(abs(primary['value']))} points {word} than {other} under "
        f"corruption: the difference of the losses is {text}; {beside}."
    )


def _significant(number: Json) -> bool:
    """Both the interval and the test must say so: near the border they can disagree."""
    if number["ci_low"] is None or number["p"] is None:
        return False
    return bool((number["ci_low"] > 0 or number["ci_high"] < 0) and number["p"] < 0.05)


def _near_miss(number: Json) -> str:
    if number["ci_low"] is not None and (number["ci_low"] > 0 or number["ci_high"] < 0):
        return " (the interval leaves out 0, the test does not reject)"
    return " (the test rejects, the interval holds 0)" if number["p"] is not None and number["p"] < 0.05 else ""


def _single_verdict(model: Json) -> str:
    scale = 100.0 if (model["clean"]["value"] or 0) <= 1 else 1.0
    clean = (
        f"{_interval(model['clean'], scale=scale)}{' %' if scale == 100.0 else ''}"
        f"{' of the best' if model['best'] != 1 else ''} {model['metric']} on clean images"
    )
    if model["retention"]["value"] is None:
        return f"On {model['task']}, {model['label']} reaches {clean}; retention: {model['retention']['reason']}."
    keeps = f"keeps {_interval(model['retention'])} % of it under corruption"
    return f"On {model['task']}, {model['label']} reaches {clean} and {keeps}."


def _interval(number: Json, *, scale: float = 100.0, signed: bool = False) -> str:
    main = figure_of(number["value"], scale=scale, signed=signed)
    if number["ci_low"] is None:
        return f"{main} (no interval: {number.get('reason', 'no item scores')})"
    low, high = (figure_of(number[key], scale=scale, signed=signed) for key in ("ci_low", "ci_high"))
    return f"{main} [{low}, {high}]"


def _p(p: float | None) -> str:
    return "not available" if p is None else p_text(p) if p < 0.001 else f"= {p_text(p)}"


def verdict(robustness: Json) -> str:
    """The verdict as HTML, with what its intervals do not say."""
    lines = "".join(f'<p class="verdict">{html.escape(text)}</p>' for text in verdicts(robustness))
    note = "Brackets are 95 % intervals over images. They say nothing about another training seed"
    if not robustness["comparisons"]:
        return f'{lines}<p class="caption">{note}.</p>'
    open_ = ""
    if not all(_significant(comparison["primary"]) for comparison in robustness["comparisons"]):
        open_ = " No difference shown is not no difference: every value in the brackets fits these answers."
    several = "a difference between two single runs is a statement about these two runs."
    return f'{lines}<p class="caption">{note}: {several}{open_}</p>'
