"""The report's sections about training: losses, expert load, expert graphs. Read from training.json, all optional."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from symphony_vlm.evaluation.report_data import ReportData
from symphony_vlm.evaluation.report_figures import (
    Series,
    adjacency_panel,
    coefficient_panel,
    graph_panel,
    legend,
    line_panel,
    load_panel,
)

__all__ = ["expert_graphs", "expert_load", "loss_curves"]

_MAX_LAYERS = 8
"""Layers drawn; of deeper models an even selection."""


def loss_curves(data: ReportData) -> str:
    """Loss over steps, a panel per stage, and the balance loss where there is one."""
    logs = [
        (i, m.label, [e for e in _list(m.training, "log") if _number(e.get("step"))]) for i, m in enumerate(data.models)
    ]
    stages = list(dict.fromkeys(str(e.get("stage", "training")) for _, _, log in logs for e in log))
    panels: list[str] = []
    for field, name in (("loss", "loss"), ("balance", "balance loss")):
        for stage in stages:
            series = []
            for style, label, log in logs:
                rows = [e for e in log if str(e.get("stage", "training")) == stage and _number(e.get(field))]
                if rows:
                    x, y = [float(e["step"]) for e in rows], [float(e[field]) for e in rows]
                    series.append(Series(label=label, style=style, x=x, y=y))
            if series:
                panels.append(line_panel(title=f"{stage}: {name}", series=series, xlabel="step", ylabel=name))
    return _grid(
        panels,
        legend([m.label for m in data.models]),
        "Every logged value; logs of more than 240 entries as means of equal blocks.",
    )


def expert_load(data: ReportData) -> str:
    """Share of the selected slots per expert at the end of training, and its variation over the steps."""
    last = [(i, m.label, _last_layers(m.training)) for i, m in enumerate(data.models)]
    layers = _selected(sorted({layer for _, _, found in last for layer in found}, key=_layer_number))
    bars = []
    top = max((x for _, _, found in last for layer in found.values() for x in layer.get("load") or []), default=1.0)
    for layer in layers:
        loads = [
            (label, style, found[layer]["load"]) for style, label, found in last if found.get(layer, {}).get("load")
        ]
        if loads:
            bars.append(load_panel(title=f"layer {layer}", loads=loads, top=1.05 * top))
    curves = []
    for style, model in enumerate(data.models):
        routing = _list(model.training, "routing")
        for stage in dict.fromkeys(str(entry.get("stage", "training")) for entry in routing):
            lines: dict[str, tuple[list[float], list[float]]] = {}
            for entry in (e for e in routing if str(e.get("stage", "training")) == stage):
                for layer, values in (entry.get("layers") or {}).items():
                    if _number(values.get("load_cv")) and _number(entry.get("step")):
                        x, y = lines.setdefault(str(layer), ([], []))
                        x.append(float(entry["step"]))
                        y.append(float(values["load_cv"]))
            if lines:
                ordered = {layer: lines[layer] for layer in sorted(lines, key=_layer_number)}
                title = f"{model.label}: {stage}"
                curves.append(coefficient_panel(title=title, style=style, layers=ordered, top=1.05 * _top_cv(data)))
    note = _selection_note(layers, last)
    body = _grid(bars, legend([m.label for m in data.models]), f"Last recorded step. {note}")
    if curves:
        caption = "Standard deviation of the load over its mean; 0 is an even load. Thin: layers. Thick: their mean."
        body += "<h3>Coefficient of variation over training</h3>" + _grid(curves, "", caption)
    return body


def expert_graphs(data: ReportData) -> str:
    """The last recorded graph of every model that has one: a picture and the adjacency."""
    blocks: list[str] = []
    for model in data.models:
        routing = [entry for entry in _list(model.training, "routing") if entry.get("graphs")]
        graphs = routing[-1]["graphs"] if routing else {}
        names = {_graph_layer(name): name for name in graphs}
        chosen = _selected(sorted(names, key=_layer_number))
        panels: list[str] = []
        facts: list[str] = []
        for layer in chosen:
            graph = graphs[names[layer]]
            if not graph.get("adjacency") or len(graph["adjacency"]) < 2:
                continue
            panels.append(graph_panel(title=f"layer {layer}", adjacency=graph["adjacency"]))
            panels.append(adjacency_panel(title=f"layer {layer}: adjacency", adjacency=graph["adjacency"]))
            facts.append(_graph_facts(layer, graph))
        if panels:
            step = routing[-1].get("step")
            caption = (
                f"Step {step}. Edges are as thick as their weight, relative to the layer's heaviest (at most 60, "
                "those above 4 % of it); the ring of a node is its self weight. Row i of the adjacency is what expert "
                "i's score takes from each expert."
            )
            title = f"<h3>{html.escape(model.label)}</h3>"
            blocks.append(title + _grid(panels, "", caption, wide=True) + f'<ul class="caption">{"".join(facts)}</ul>')
    return "".join(blocks)


def _top_cv(data: ReportData) -> float:
    routing = [entry for model in data.models for entry in _list(model.training, "routing")]
    values = [layer.get("load_cv") for entry in routing for layer in (entry.get("layers") or {}).values()]
    return max((float(value) for value in values if _number(value)), default=1.0) or 1.0


def _graph_facts(layer: str, graph: Mapping[str, Any]) -> str:
    edges = [edge for edge in graph.get("top_edges") or [] if isinstance(edge, list) and len(edge) == 3]
    parts = [
        f"{name.replace('_', ' ')} {graph[name]:.3g}"
        for name in ("self_weight", "spectral_gap")
        if _number(graph.get(name))
    ]
    parts += [f"{graph['num_updates']} updates"] if graph.get("num_updates") is not None else []
    parts += ["heaviest edges " + ", ".join(f"{b} to {a} ({w:.3g})" for a, b, w in edges)] if edges else []
    return f"<li>Layer {html.escape(layer)}: {html.escape('; '.join(parts))}</li>"


def _graph_layer(name: str) -> str:
    numbers = [part for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else name


def _layer_number(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdigit() else (10**9, name)


def _last_layers(training: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    routing = [entry for entry in _list(training, "routing") if entry.get("layers")]
    return {str(layer): values for layer, values in routing[-1]["layers"].items()} if routing else {}


def _selected(layers: Sequence[str]) -> list[str]:
    if len(layers) <= _MAX_LAYERS:
        return list(layers)
    return [layers[round(i * (len(layers) - 1) / (_MAX_LAYERS - 1))] for i in range(_MAX_LAYERS)]


def _selection_note(layers: Sequence[str], last: Sequence[tuple[int, str, Mapping[str, Any]]]) -> str:
    total = len({layer for _, _, found in last for layer in found})
    return f"{len(layers)} of {total} layers, evenly chosen." if total > len(layers) else ""


def _list(training: Mapping[str, Any] | None, key: str) -> list[dict[str, Any]]:
    found = (training or {}).get(key) or []
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _grid(panels: Sequence[str], above: str, caption: str, *, wide: bool = False) -> str:
    if not panels:
        return ""
    kind = "panels two" if len(panels) in (2, 4) or wide else "panels"
    return f'{above}<div class="{kind}">{"".join(panels)}</div><p class="caption">{html.escape(caption)}</p>'
