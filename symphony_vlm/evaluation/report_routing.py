"""The report's section about the routers: how corruption moves them, by corruption, severity, layer and patch."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from symphony_vlm.corruptions import CORRUPTIONS
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.report_data import Evaluation, ReportData
from symphony_vlm.evaluation.report_figures import Series, legend, severity_panel
from symphony_vlm.evaluation.report_routing_figures import layer_map, patch_card
from symphony_vlm.evaluation.report_tables import Entry, Table, entry, to_html
from symphony_vlm.evaluation.routing.prompts import MODALITIES

__all__ = ["merged_blocks", "routing_section", "routing_tables"]

Json = Mapping[str, Any]
Columns = Sequence[tuple[str, str, float, bool, int]]

_NARROW_MAP = 6
"""Corruptions of a map of which two fit side by side."""
_DRIFT_WORDS = "Kappa: overlap beyond chance. JS: Jensen-Shannon divergence, of a token's gate and of the load."
_GRAPH_WORDS = (
    "The same hidden states routed with the trained graph and without it. A flip is a token whose set of experts "
    "differs from the clean one: prevented, if only without the graph; caused, if only with it. A graph flattens the "
    "gate, so that its divergence is smaller by itself."
)
_CERTAINTY_WORDS = (
    "Entropy of a token's gate, its share of rank K minus that of rank K + 1 (margin), and the coefficient of "
    "variation of the load: clean, and corrupted minus clean."
)
_BY_LAYER = (
    ("fluctuation", "experts changed, %", 100.0, False, 1),
    ("kappa", "kappa", 1.0, False, 2),
    ("top1_change", "first expert changed, %", 100.0, False, 1),
    ("js_gate", "JS gate, millibits", 1000.0, False, 1),
    ("js_load", "JS load, millibits", 1000.0, False, 1),
    ("tv_weights", "weights moved, %", 100.0, False, 1),
)
"""Figure, heading, scale, signed, digits."""
_CERTAINTY = (
    ("entropy_clean", "entropy, nats", 1.0, False, 3),
    ("entropy_change", "change, millinats", 1000.0, True, 1),
    ("margin_clean", "margin, %", 100.0, False, 2),
    ("margin_change", "change, points", 100.0, True, 2),
    ("load_cv_clean", "load CV", 1.0, False, 2),
    ("load_cv_change", "change", 1.0, True, 2),
    ("dead_corrupted", "dead experts, corrupted", 1.0, False, 1),
)
_GRAPH = (
    ("fluctuation_plain", "experts changed without the graph, %", 100.0, False, 1),
    ("fluctuation", "with the graph, %", 100.0, False, 1),
    ("flips_prevented", "flips prevented, %", 100.0, False, 1),
    ("flips_caused", "flips caused, %", 100.0, False, 1),
    ("js_gate_plain", "JS gate without the graph, millibits", 1000.0, False, 1),
    ("js_gate", "JS gate with it, millibits", 1000.0, False, 1),
)


def merged_blocks(data: ReportData) -> list[dict[str, Any]]:
    """The blocks of all evaluations, each with its model's label, for a merged results.json."""
    return [{**block, "label": label} for label, _, block in _blocks(data)]


def routing_tables(data: ReportData) -> list[Table]:
    """Tables with key ``routing``; none where no routing was recorded."""
    tables: list[Table] = []
    for label, _, block in _blocks(data):
        about = f"{label}, {block['task']}"
        if block["mean"] is not None:
            seen = [kind for kind in MODALITIES if block["mean"]["all"][kind]["fluctuation"]["value"] is not None]
            for kind in seen:
                title = f"Drift by layer, {kind} positions: {about}"
                tables.append(_layer_table(block, title, kind, _BY_LAYER, _DRIFT_WORDS))
            for kind in seen if block["expert_graph"] else []:
                title = f"The expert graph's part, {kind} positions: {about}"
                tables.append(_layer_table(block, title, kind, _GRAPH, _GRAPH_WORDS))
            for kind in seen:
                title = f"Certainty and load, {kind} positions: {about}"
                tables.append(_layer_table(block, title, kind, _CERTAINTY, _CERTAINTY_WORDS))
        tables.append(_cell_table(block, about))
        tables.append(_association_table(block, about))
        tables += _attack_tables(block, about)
    return tables


def routing_section(data: ReportData, tables: Sequence[Table]) -> str:
    """The section's HTML; empty where no routing was recorded."""
    blocks = list(_blocks(data))
    if not blocks:
        return ""
    own = [table for table in tables if table.key == "routing"]
    far = [table for table in own if table.title.startswith(("Drift by layer", "The expert graph"))]
    rest = "".join(to_html(table) for table in own if table not in far)
    return (
        f'<p class="caption">{html.escape(_words(blocks))}</p>'
        f"{_curves(data, blocks)}{_layer_maps(blocks)}{''.join(to_html(table) for table in far)}"
        "<details><summary>Certainty and load, corruption by severity, and whether flips follow the drift</summary>"
        f"{rest}</details>"
        f"{_patches(blocks)}"
    )


def _blocks(data: ReportData) -> Iterator[tuple[str, Evaluation, dict[str, Any]]]:
    """Label, evaluation and block of each model and task."""
    for model in data.models:
        for evaluation in model.evaluations:
            found = (evaluation.document.get("robustness") or {}).get("routing_drift") or []
            if not isinstance(found, list) or not all(isinstance(block, dict) and "cells" in block for block in found):
                where = str(evaluation.folder / "results.json")
                raise InputError("'routing_drift' is not a list of blocks with 'cells'", where=where)
            for block in found:
                if (block["model"], block["router"]) == (model.model, model.router):
                    yield model.label, evaluation, block


def _words(blocks: Sequence[tuple[str, Evaluation, Json]]) -> str:
    lost = sum(cell["n_not_comparable"] for _, _, block in blocks for cell in block["cells"])
    left_out = f" {lost} prompts could not be compared with their clean ones and are left out." if lost else ""
    return (
        "What the routers decide while the prompt is read, token by token against the clean picture with the same "
        "question. Experts changed: the share of a token's selected experts that differ. Image and text positions "
        "apart; text changes only through what attention has carried over from the picture. 95 % intervals over "
        f"images.{left_out}"
    )


def _curves(data: ReportData, blocks: Sequence[tuple[str, Evaluation, Json]]) -> str:
    styles = {model.label: style for style, model in enumerate(data.models)}
    tasks = list(dict.fromkeys(block["task"] for _, _, block in blocks))
    parts = []
    for task in tasks:
        own = [(label, block) for label, _, block in blocks if block["task"] == task]
        names = _names(block for _, block in own)
        series = {
            name: [one for label, block in own if (one := _series(block, name, label, styles[label])) is not None]
            for name in names
        }
        highs = [y for listed in series.values() for one in listed for y in one.high or () if y is not None]
        top = 1.05 * max(highs, default=1.0) or 1.0
        panels = "".join(
            severity_panel(title=name.replace("_", " "), series=listed, limits=(0, top), ylabel="experts changed, %")
            for name, listed in series.items()
            if listed
        )
        heading = f"Experts changed at image positions{f': {task}' if len(tasks) > 1 else ''}"
        parts.append(
            f'<h3>{html.escape(heading)}</h3>{legend([m.label for m in data.models])}<div class="panels">{panels}</div>'
            '<p class="caption">Mean over layers. Bands: 95 % intervals.</p>'
        )
    return "".join(parts)


def _names(blocks: Iterator[Json]) -> list[str]:
    """Corruptions in the catalogue's order."""
    found = {cell["corruption"] for block in blocks for cell in block["cells"] if cell["layers"] is not None}
    order = {name: index for index, name in enumerate(CORRUPTIONS)}
    return sorted(found, key=lambda name: (order.get(name, len(order)), name))


def _series(block: Json, name: str, label: str, style: int) -> Series | None:
    cells = sorted(_cells(block, name), key=lambda cell: int(cell["severity"]))
    points = [cell["layers"]["all"]["image"]["fluctuation"] for cell in cells]
    if not points or points[0]["value"] is None:
        return None
    # Severity 0 is the clean cell, which is compared with itself.
    value, low, high = ([0.0, *(_percent(p[key]) for p in points)] for key in ("value", "ci_low", "ci_high"))
    return Series(label=label, style=style, x=[0, *(c["severity"] for c in cells)], y=value, low=low, high=high)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _cells(block: Json, name: str) -> list[Json]:
    return [
        cell
        for cell in block["cells"]
        if cell["corruption"] == name and cell["layers"] is not None and cell["attack"] == "none"
    ]


def _layer_maps(blocks: Sequence[tuple[str, Evaluation, Json]]) -> str:
    """For each model a map of layers and corruptions, all on one scale."""
    maps: list[tuple[str, list[str], list[str], list[list[float | None]]]] = []
    for label, _, block in blocks:
        names = _names(iter([block]))
        values = [[_mean_of_layer(block, name, layer) for name in names] for layer in block["layers"]]
        if names and any(value is not None for row in values for value in row):
            maps.append((f"{label}, {block['task']}", list(block["layers"]), names, values))
    if not maps:
        return ""
    top = max(value for _, _, _, rows in maps for row in rows for value in row if value is not None) or 1.0
    drawn = "".join(
        layer_map(title=title, layers=layers, columns=names, values=rows, top=top)
        for title, layers, names, rows in maps
    )
    # Side by side, a map of many corruptions would be too small to read.
    wide = max(len(names) for _, _, names, _ in maps) > _NARROW_MAP
    box = 'class="scroll" tabindex="0" role="region" aria-label="By layer"' if wide else 'class="panels two"'
    return (
        f"<h3>Experts changed at image positions, by layer</h3><div {box}>{drawn}</div>"
        '<p class="caption">Percent, mean over severities; all maps on one scale. The intervals are in the table of '
        "layers, for the mean over corruptions.</p>"
    )


def _mean_of_layer(block: Json, name: str, layer: str) -> float | None:
    values = [cell["layers"][layer]["image"]["fluctuation"]["value"] for cell in _cells(block, name)]
    known = [value for value in values if value is not None]
    return 100 * sum(known) / len(known) if known else None


def _layer_table(block: Json, title: str, kind: str, columns: Columns, words: str) -> Table:
    rows = [
        (
            Entry(main="mean over layers" if layer == "all" else f"layer {layer}"),
            *(
                entry(block["mean"][layer][kind][name], scale=scale, signed=signed, digits=digits)
                for name, _, scale, signed, digits in columns
            ),
        )
        for layer in ("all", *block["layers"])
    ]
    caption = f"{words} Unweighted mean over the cells of common corruptions, with 95 % intervals over images."
    header = ("layer", *(heading for _, heading, *_ in columns))
    return Table(key="routing", title=title, caption=caption, header=header, rows=tuple(rows))


def _cell_table(block: Json, about: str) -> Table:
    values = [c["layers"]["all"]["image"]["fluctuation"]["value"] or 0 for c in block["cells"] if c["layers"]]
    top = max(values, default=0) or 1.0

    def one(cell: Json) -> Entry:
        number = cell["layers"]["all"]["image"]["fluctuation"]
        return entry(number, tint=0.0 if number["value"] is None else -number["value"] / top)

    caption = "Percent, mean over layers, with 95 % intervals; the stronger the colour, the more changed."
    return _grid(block, f"Experts changed at image positions: {about}", caption, one)


def _association_table(block: Json, about: str) -> Table:
    def one(cell: Json) -> Entry:
        found = next(a for a in cell["association"] if (a["drift"], a["modality"]) == ("js_gate", "image"))
        counts = f"{found['n_flips']} flips, {found['n_kept']} kept"
        return entry({**found, "reason": counts}, scale=1.0, digits=2)

    caption = (
        "ROC area of an item's JS gate divergence at image positions for its answer going from right to wrong, among "
        "the items that were right: 0.5 is no association. 95 % intervals over images, unadjusted; rough where few "
        "answers flip."
    )
    return _grid(block, f"Does drift tell which answers flip: {about}", caption, one)


def _attack_tables(block: Json, about: str) -> list[Table]:
    """A row for each attack, if there are any."""
    cells = [cell for cell in block["cells"] if cell["attack"] != "none"]
    if not cells:
        return []
    rows = []
    for cell in cells:
        name = str(cell["attack"]) + (f", {cell['corruption']} {cell['severity']}" if cell["severity"] else "")
        figures = cell["layers"] and [cell["layers"]["all"][kind]["fluctuation"] for kind in MODALITIES]
        drift = [entry(number) for number in figures] if figures else [Entry(main="–", note="not compared")] * 2
        counts = (Entry(main=str(cell[key])) for key in ("n_items", "n_not_comparable"))
        rows.append((Entry(main=name), *drift, *counts))
    return [
        Table(
            key="routing",
            title=f"Experts changed by attacks: {about}",
            caption="Percent, mean over layers, with 95 % intervals over images.",
            header=("attack", "image positions", "text positions", "items compared", "not comparable"),
            rows=tuple(rows),
        )
    ]


def _grid(block: Json, title: str, caption: str, one: Any) -> Table:
    cells = {(cell["corruption"], cell["severity"]): cell for cell in block["cells"] if cell["attack"] == "none"}
    severities = sorted({severity for _, severity in cells})
    lines = []
    for name in _names(iter([block])):
        found = (cells.get((name, severity)) for severity in severities)
        entries = (one(cell) if cell and cell["layers"] else Entry(main="–", note="not compared") for cell in found)
        lines.append((Entry(main=name.replace("_", " ")), *entries))
    header = ("corruption", *(f"severity {severity}" for severity in severities))
    return Table(key="routing", title=title, caption=caption, header=header, rows=tuple(lines))


def _patches(blocks: Sequence[tuple[str, Evaluation, Json]]) -> str:
    parts = []
    for label, evaluation, block in blocks:
        path = evaluation.folder / "routing" / "samples.json"
        samples = json.loads(path.read_text(encoding="utf-8")).get(block["task"], []) if path.is_file() else []
        cards = "".join(patch_card(sample) for sample in samples)
        if cards:
            parts.append(
                f'<h3>{html.escape(label)}, {html.escape(block["task"])}</h3><div class="samples">{cards}</div>'
            )
    if not parts:
        return ""
    return (
        f"<h3>Patches that changed their experts</h3>{''.join(parts)}"
        '<p class="caption">The pictures as the model sees them, clean and corrupted. Orange: the share of a patch\'s '
        "experts, over all layers, that differ from the clean ones. One item for each of up to four corruptions, by "
        "the hash of its name; answers that flip to wrong first.</p>"
    )
