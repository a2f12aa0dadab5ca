"""A study's tables in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from symphony_vlm.study.setting import Setting, Unit

__all__ = ["page_text"]

_ROUTING = {
    "load_cv": ("load CV", ".2f"),
    "off_diagonal_mass": ("off-diagonal", ".2f"),
    "concentration": ("concentration", ".2f"),
}


def page_text(setting: Setting, document: dict[str, Any], figures: Sequence[str]) -> str:
    """The tables of a study's ``results.json``.

    Args:
        setting: what was done.
        document: see `results.write_results`.
        figures: files beside the page.
    """
    study = setting.study
    lines = [f"# {study.name}", "", study.description.strip(), "", "```", document["command"], "```", ""]
    lines += [f"{document['n_jobs_done']} of {document['n_jobs']} jobs are done. {_surroundings(document)}", ""]
    lines += [*_explanation(setting.unit), ""]
    lines += _choices(document["choices"])
    parts = dict.fromkeys((row["part"], row["data"]) for row in document["arms"])
    for part, data in parts:
        arms = [row for row in document["arms"] if (row["part"], row["data"]) == (part, data)]
        compared, with_controls = (
            [row for row in document[table] if (row["part"], row["data"]) == (part, data)]
            for table in ("comparisons", "against_controls")
        )
        lines += [f"## {data}, {part} data", "", *_arm_table(setting, arms), ""]
        lines += _comparison_table(setting.unit, compared, "the baseline")
        lines += _comparison_table(setting.unit, with_controls, "negative controls")
        controls = {row["arm"] for row in arms if row["control"]}
        drift = [row for row in document["drift"] if (row["part"], row["data"]) == (part, data)]
        lines += _drift_table(drift, controls)
    lines += [line for name in figures for line in (f"![{name.partition('.')[0]}]({name})", "")]
    return "\n".join([*lines, *_evidence(document["arms"])])


def _surroundings(document: dict[str, Any]) -> str:
    found = document["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
    commit = (found.get("git") or {}).get("commit", "unknown")
    hardware = found.get("hardware", {})
    device = f"{hardware['device']}, {hardware['cores']} cores" if hardware else "unknown"
    seeds = ", ".join(map(str, document["study"]["seeds"]))
    return f"Seeds {seeds}; commit {commit}; {device}; {versions or 'versions unknown'}."


def _explanation(unit: Unit) -> list[str]:
    means = ["Perplexity per word (line ends are words), from the mean over seeds of nats per word."]
    if unit.higher_is_better:
        means = [
            "Accuracy in percent, the mean over seeds; corrupted: over all common corrupted cells; retention:",
            "corrupted over clean on the same pictures.",
        ]
    return [
        *means,
        f"Brackets are 95 % intervals of a bootstrap of seeds and {unit.cluster}. Controls are negative: their graph",
        "says nothing of the experts. An expert is dead if it got less than a tenth of an equal share of the tokens",
        "since training's last record but one; load CV: coefficient of variation of the experts' shares; off-diagonal:",
        "what an expert takes from the others in the graph; concentration: 0 if all edges weigh the same, 1 for a",
        "single edge.",
    ]


def _choices(choices: Sequence[dict[str, Any]]) -> list[str]:
    if not choices:
        return []
    lines = ["## Chosen by the development data", "", "| choice | tried | chosen |", "|---|---|---|"]
    lines += [f"| {choice['name']} | {len(choice['tried'])} | {choice['arm']} |" for choice in choices]
    lines += ["", "The test data was asked about the chosen arms and their baselines, once.", ""]
    return lines


def _arm_table(setting: Setting, rows: Sequence[dict[str, Any]]) -> list[str]:
    unit, scale = setting.unit, _scale(setting.unit)
    retained = [f"retention, {name}" for name in setting.conditions[1:]] if unit.higher_is_better else []
    head = ["arm", "seeds", *setting.conditions, *retained, "dead experts", *(name for name, _ in _ROUTING.values())]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        name = f"{row['arm']} (control)" if row["control"] else row["arm"]
        values = [_with_interval(row["values"][condition], scale) for condition in setting.conditions]
        values += [
            _with_interval(row["retention"][condition], scale) for condition in setting.conditions[1:] if retained
        ]
        facts = row["routing"]
        dead = "-" if facts["experts"] is None else f"{facts['dead_experts']:.1f} of {facts['experts']:.0f}"
        shown = ["-" if facts[key] is None else f"{facts[key]:{form}}" for key, (_, form) in _ROUTING.items()]
        lines.append(f"| {' | '.join([name, str(len(row['seeds'])), *values, dead, *shown])} |")
    return lines


def _comparison_table(unit: Unit, rows: Sequence[dict[str, Any]], against: str) -> list[str]:
    if not rows:
        return []
    better, what = ("above", "Points of accuracy") if unit.higher_is_better else ("below", "Nats per word")
    lines = [
        f"{what} against {against}, paired by seed and {unit.cluster}; {better} 0 the arm is better, or loses less",
        "(change by ...). p (seeds): paired t-test over seeds, beside it with Holm's correction over this table; p",
        f"(data): sign flips of {unit.cluster}, for these trained models alone.",
        "",
        "| arm | against | on | difference | p (seeds) | Holm | p (data) |",
        "|---|---|---|---|---|---|---|",
    ]
    scale, digits = _scale(unit), 2 if unit.higher_is_better else 4
    for row in rows:
        found = row["difference"]
        value, low, high = (f"{scale * found[key]:+.{digits}f}" for key in ("value", "low", "high"))
        chances = " | ".join("-" if row[key] is None else f"{row[key]:.3g}" for key in ("p_seeds", "p_holm", "p_data"))
        name = f"{row['arm']} (control)" if row["control"] else row["arm"]
        lines.append(f"| {name} | {row['baseline']} | {row['condition']} | {value} [{low}, {high}] | {chances} |")
    return [*lines, ""]


def _drift_table(rows: Sequence[dict[str, Any]], controls: Collection[str]) -> list[str]:
    """What the routers did with corrupted pictures."""
    if not rows:
        return []
    head = [
        "arm", "tokens of", "experts changed", "without the graph", "κ", "flips prevented", "caused", "margin",
        "answers lost", "AUC", "against", "experts changed, difference", "p (seeds)", "Holm",
    ]  # fmt: skip
    lines = [
        "**Routing of corrupted pictures against that of clean ones**, means over seeds, layers and common corrupted",
        "cells. Experts changed: the share of a token's experts that are others, with the graph and as if it were not",
        "there; κ: agreement beyond chance; flips: tokens whose experts change without the graph and not with it",
        "(prevented), or the reverse (caused); margin: between the last expert chosen and the next, in shares of the",
        "gate; answers lost: of those that were right; AUC: whether they are the items whose experts changed most",
        "(50: no association). Differences with Student's intervals over seeds, Holm's correction over this table.",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for row in rows:
        found = row["figures"]
        names = ["fluctuation", "fluctuation_plain", "kappa", "flips_prevented", "flips_caused"]
        values = [_shown(found[name], *(1, ".2f") if name == "kappa" else (100, ".1f")) for name in names]
        values.append(_shown(found["margin_clean"], 1, ".3f"))
        values += [_shown(found[name], 100, ".1f") for name in ("answers_lost", "association")]
        difference = row["difference"]
        against = ["-"] * 4
        if difference is not None:
            value, low, high = (f"{100 * difference[key]:+.2f}" for key in ("value", "low", "high"))
            against = [row["baseline"], f"{value} [{low}, {high}]"]
            against += ["-" if row[key] is None else f"{row[key]:.3g}" for key in ("p_seeds", "p_holm")]
        name = f"{row['arm']} (control)" if row["arm"] in controls else row["arm"]
        lines.append(f"| {' | '.join([name, row['modality'], *values, *against])} |")
    return [*lines, ""]


def _shown(value: float | None, scale: float, form: str) -> str:
    return "-" if value is None else f"{scale * value:{form}}"


def _evidence(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a repetition is compared by, and what a cell cost."""
    lines = ["## Predictions and cost", "", "sha256 of every item's prediction, over all seeds.", ""]
    lines += ["| data | arm | sha256 | minutes a run |", "|---|---|---|---|"]
    for row in rows:
        minutes = "-" if row["seconds"] is None else f"{row['seconds'] / 60:.1f}"
        digest = row["predictions_sha256"][:16]
        lines.append(f"| {row['data']}, {row['part']} | {row['arm']} | {digest} | {minutes} |")
    return [*lines, ""]


def _scale(unit: Unit) -> float:
    return 100.0 if unit.higher_is_better else 1.0


def _with_interval(value: dict[str, Any] | None, scale: float) -> str:
    if value is None:
        return "-"
    return f"{scale * value['value']:.2f} [{scale * value['ci_low']:.2f}, {scale * value['ci_high']:.2f}]"
