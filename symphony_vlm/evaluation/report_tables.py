"""Tables of the report, built once from the merged results and written as HTML, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from symphony_vlm.evaluation.report_data import Baseline, ReportData
from symphony_vlm.evaluation.report_entries import Entry, Table, entry, figure_of, p_text
from symphony_vlm.evaluation.report_maps import did_map, difference_map, retention_maps
from symphony_vlm.evaluation.report_seeds import seed_table

__all__ = [
    "Entry",
    "Table",
    "build_tables",
    "cells_csv",
    "entry",
    "figure_of",
    "p_text",
    "to_html",
    "to_latex",
    "to_markdown",
]

Json = Mapping[str, Any]

_FLIPS = (
    ("flip_rate", "Flip rate (right to wrong or back)"),
    ("right_to_wrong", "– right to wrong"),
    ("wrong_to_right", "– wrong to right"),
    ("lost_of_clean_right", "Lost among clean-right"),
    ("answer_change_rate", "Answer changes, right or not"),
)
_FORMAT = (
    ("unparsed_clean", "Unparsed answers, clean, %"),
    ("unparsed_rate", "Unparsed answers, corrupted, %"),
    ("format_loss", "Format loss (official drop minus lenient drop), points"),
)


def build_tables(data: ReportData, robustness: Json) -> list[Table]:
    """All tables, task by task."""
    tables: list[Table] = []
    for task in dict.fromkeys(scores.task for scores in data.scores):
        models = [block for block in robustness["models"] if block["task"] == task]
        metric = models[0]["metric"]
        name = task.split("/")[0]
        rows = [row for row in data.rows if _task_of(row, task) and row["corruption"] == "none"]
        scale = _scale([row for row in rows if row["metric"] == metric])
        unit = f"{metric}, %" if scale == 100.0 else metric
        baselines = [b for b in data.baselines if b.task == name and b.metric == metric]
        tables.append(_clean_table(task, unit, scale, metric, rows, data, baselines))
        shares = 100.0 if all(0 <= (m["clean"]["value"] or 0) <= 1 for m in models) else 1.0
        if shares != scale:
            unit = f"{metric}, % of the best"
        groups = _groups_table(task, metric, scale, rows, data)
        tables.extend([groups] if groups else [])
        if any(block["cells"] for block in models):
            tables.append(_robustness_table(task, unit, shares, models))
        for comparison in robustness["comparisons"]:
            if comparison["task"] == task:
                tables.append(_summary_table(comparison, shares))
                if comparison["cells"]:
                    tables.extend([did_map(comparison, shares), difference_map(comparison, shares)])
        tables.extend(retention_maps(models))
        seeds = seed_table(robustness, task, shares)
        tables.extend([seeds] if seeds else [])
    return tables


def _task_of(row: Json, task: str) -> bool:
    return task in (row["task"], f"{row['task']}/{row.get('split')}")


def _scale(rows: Sequence[Json]) -> float:
    return 100.0 if all(0 <= (row["value"] or 0) <= 1 for row in rows) else 1.0


def _row_of(rows: Sequence[Json], data: ReportData, label: str, metric: str) -> Json | None:
    model = next(m for m in data.models if m.label == label)
    own = (r for r in rows if (r["model"], r["router"] or "none") == (model.model, model.router))
    return next((row for row in own if row["metric"] == metric), None)


def _clean_table(
    task: str,
    unit: str,
    scale: float,
    metric: str,
    rows: Sequence[Json],
    data: ReportData,
    baselines: Sequence[Baseline],
) -> Table:
    lines: list[tuple[Entry, ...]] = []
    for model in data.models:
        row = _row_of(rows, data, model.label, metric)
        if row:
            counts = (row.get(name) for name in ("n_items", "n_images", "n_errors", "n_unparsed"))
            lines.append((Entry(main=model.label), entry(row, scale=scale), *(_plain(count) for count in counts)))
    for b in baselines:
        name = b.name if b.label == "every model" or len(data.models) == 1 else f"{b.name} ({b.label})"
        number = {"value": b.value, "ci_low": b.ci_low, "ci_high": b.ci_high}
        empty = (Entry(main=""),) * 3
        lines.append((Entry(main=f"baseline: {name}"), entry(number, scale=scale), _plain(b.n_items), *empty))
    return Table(
        key="clean",
        title=f"Clean images: {task}",
        caption="95 % intervals. Baselines answer without looking at the picture.",
        header=("model", unit, "items", "images", "errors", "unparsed"),
        rows=tuple(lines),
    )


def _groups_table(task: str, metric: str, scale: float, rows: Sequence[Json], data: ReportData) -> Table | None:
    names = sorted({r["metric"].split("/", 1)[1] for r in rows if r["metric"].startswith(f"{metric}/")})
    if not names:
        return None
    lines: list[tuple[Entry, ...]] = []
    for name in names:
        found = [_row_of(rows, data, model.label, f"{metric}/{name}") for model in data.models]
        count = next((row.get("n_items") for row in found if row), None)
        cells = (entry(row, scale=scale) if row else Entry(main="–") for row in found)
        lines.append((Entry(main=name), _plain(count), *cells))
    return Table(
        key="groups",
        title=f"By question type: {task}",
        caption=f"Clean images, {metric}{' in %' if scale == 100.0 else ''} with 95 % intervals.",
        header=("question type", "items", *(model.label for model in data.models)),
        rows=tuple(lines),
    )


def _robustness_table(task: str, unit: str, scale: float, models: Sequence[Json]) -> Table:
    same = ", on the same items" if any(m["n_items"] != m["n_clean_items"] for m in models) else ""

    def line(name: str, numbers: Sequence[Json], factor: float) -> tuple[Entry, ...]:
        return (Entry(main=name), *(entry(number, scale=factor) for number in numbers))

    lines = [
        line(f"Clean {unit}{same}", [m["clean"] for m in models], scale),
        line(f"Mean corrupted {unit}", [m["mean_corrupted"] for m in models], scale),
        line("Drop, points", [m["drop"] for m in models], scale),
        line("Retention, %", [m["retention"] for m in models], 100.0),
        line("Retention above the best constant answer, %", [m["retention_above_chance"] for m in models], 100.0),
        line("Severity AUC", [m["severity_auc"]["mean"] for m in models], scale),
        line("Severity AUC / clean, %", [m["severity_auc"]["mean_over_clean"] for m in models], 100.0),
    ]
    for kind in ("mean_corruption_error", "relative_mean_corruption_error"):
        error = models[-1][kind]
        title = f"{_error_title(kind, models[-1])} ({error['baseline']} = 100)"
        lines.append(line(title, [m[kind] for m in models], 1.0))
    flips: list[Json] = [
        m["flips"] if "flip_rate" in m["flips"] else {key: m["flips"] for key, _ in _FLIPS} for m in models
    ]
    lines.extend(line(f"{title}, %", [f[key] for f in flips], 100.0) for key, title in _FLIPS)
    lines.extend(line(title, [m["format"][key] for m in models], 100.0) for key, title in _FORMAT)
    lines.extend(
        line(f"Mean under {name}, {unit}", [m["families"].get(name, {"value": None}) for m in models], scale)
        for name in models[0]["families"]
    )
    return Table(
        key="robustness",
        title=f"Robustness: {task}",
        caption=f"Means over {_grid(models[0])}{_items(models)}. 95 % intervals; for the errors lower is better.",
        header=("quantity", *(str(m["label"]) for m in models)),
        rows=tuple(lines),
    )


def _error_title(kind: str, model: Json) -> str:
    """ "mCE" only where it is the published one; the caption of the table names the corruptions."""
    relative = kind.startswith("relative")
    if model["complete"] and not model[kind].get("undefined"):
        return "Relative mCE" if relative else "mCE"
    used = len(model["corruptions"]) - len(model[kind].get("undefined") or {})
    return f"{'Relative mean' if relative else 'Mean'} corruption error, {used} of 15 corruptions"


def _items(models: Sequence[Json]) -> str:
    counts = sorted({str(m["n_items"]) for m in models if m["n_items"]})
    return f", {' or '.join(counts)} items a cell" if counts else ""


def _grid(model: Json) -> str:
    if model["complete"]:
        return "the 15 common corruptions at severities 1 to 5"
    severities = ", ".join(str(s) for s in model["severities"])
    names = ", ".join(name.replace("_", " ") for name in model["corruptions"])
    return f"{len(model['corruptions'])} of the 15 common corruptions ({names or 'none'}) at severities {severities}"


def _summary_table(comparison: Json, scale: float) -> Table:
    primary = comparison["primary"]
    rows = [
        (
            f"Clean difference ({comparison['clean_difference']['n_items']} items)",
            entry(comparison["clean_difference"], scale=scale, signed=True),
            comparison["clean_difference"]["p"],
        ),
        (
            "Difference of the corrupted means",
            entry(comparison["corrupted_difference"], scale=scale, signed=True),
            None,
        ),
        ("Difference in differences (primary)", entry(primary, scale=scale, signed=True), primary["p"]),
        ("The same on the log scale", entry(primary["log_scale"], scale=1.0, signed=True, digits=3), None),
    ]
    return Table(
        key="summary",
        title=f"{comparison['model']} minus {comparison['baseline']}: {comparison['task']}",
        caption=(
            f"Points, paired over {comparison['n_items']} items of {comparison['n_images']} images; positive is better "
            f"for {comparison['model']}. Primary: {primary['name']}; p by swapping the two labels of whole images."
        ),
        header=("quantity", "difference [95 % interval]", "p"),
        rows=tuple((Entry(main=name), number, Entry(main=p_text(p))) for name, number, p in rows),
    )


def _plain(value: Any) -> Entry:
    return Entry(main="–" if value is None else str(value))


def to_html(table: Table, *, heading: bool = True) -> str:
    """A table in a box that scrolls by itself; the first column is the row's header."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.header)
    body = "".join(f"<tr>{''.join(_html_cell(i, cell) for i, cell in enumerate(row))}</tr>" for row in table.rows)
    title = html.escape(table.title)
    return (
        f'{f"<h3>{title}</h3>" if heading else ""}<div class="scroll" tabindex="0" role="region" aria-label="{title}">'
        f'<table class="{table.key}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="caption">{html.escape(table.caption)}</p>'
    )


def _html_cell(column: int, cell: Entry) -> str:
    if column == 0:
        return f'<th scope="row">{html.escape(cell.main)}</th>'
    note = f' title="{html.escape(cell.note, quote=True)}"' if cell.note else ""
    tint = ""
    if cell.tint:
        color = "var(--better)" if cell.tint > 0 else "var(--worse)"
        tint = f' style="background:color-mix(in srgb,{color} {abs(cell.tint) * 55:.0f}%,transparent)"'
    missing = f'<small class="why">{html.escape(cell.note)}</small>' if cell.note and not cell.interval else ""
    interval = f'<span class="ci">{html.escape(cell.interval)}</span>' if cell.interval else missing
    return f"<td{note}{tint}>{html.escape(cell.main)} {interval}</td>"


def to_markdown(tables: Sequence[Table]) -> str:
    """All tables as GitHub Markdown."""
    blocks = []
    for table in tables:
        lines = [f"## {_md(table.title)}", "", f"| {' | '.join(map(_md, table.header))} |"]
        lines.append(f"| {' | '.join(['---', *['---:'] * (len(table.header) - 1)])} |")
        lines.extend(f"| {' | '.join(_md(cell.text) for cell in row)} |" for row in table.rows)
        blocks.append("\n".join([*lines, "", _md(table.caption)]))
    return "\n\n".join(blocks) + "\n"


def _md(text: str) -> str:
    text = text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")
    return text.replace("<", "&lt;").replace("\n", " ")


def to_latex(tables: Sequence[Table]) -> str:
    """All tables as LaTeX (booktabs)."""
    blocks = []
    for table in tables:
        rows = [" & ".join(_tex(cell.text) for cell in row) + r" \\" for row in table.rows]
        head = " & ".join(map(_tex, table.header)) + r" \\"
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_tex(table.title)}. {_tex(table.caption)}}}"]
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}", r"\toprule", head, r"\midrule", *rows]
        blocks.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]))
    return "% needs \\usepackage{booktabs}\n" + "\n\n".join(blocks) + "\n"


_TEX = {
    "\\": r"\textbackslash{}",
    "−": "$-$",
    "–": "--",
    "<": "$<$",
    ">": "$>$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
} | {c: "\\" + c for c in "&%$#_{}"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text.replace("\n", " "))


def cells_csv(data: ReportData, robustness: Json) -> str:
    """Every result with full precision, and beside the headline scores what was derived from them."""
    derived: dict[tuple[str, str, str, int], dict[str, Any]] = {}
    tests = ("difference_p", "difference_p_holm", "mcnemar_p", "mcnemar_p_holm")
    for block in robustness["models"]:
        for cell in block["cells"]:
            derived[block["task"], block["label"], cell["corruption"], cell["severity"]] = {
                **_flat("retention", cell["retention"]),
                **{k: cell.get(k) for k in ("right_to_wrong", "wrong_to_right")},
                **{k: cell[k]["value"] for k in ("answer_change_rate", "unparsed_rate", "format_loss") if k in cell},
            }
    for block in robustness["comparisons"]:
        for cell in block["cells"]:
            here = derived.get((block["task"], block["model"], cell["corruption"], cell["severity"]), {})
            here.update({"baseline": block["baseline"], **_flat("did", cell["did"])})
            here.update({key: cell[key] for key in ("p", "p_holm", "p_bh")})
            here.update(_flat("difference", cell["difference"]))
            here.update({key: cell.get(key) for key in tests})
    base = ("model", "router", "task", "split", "corruption", "severity", "metric", "value", "ci_low", "ci_high")
    counts = ("n_items", "n_images", "n_errors", "n_unparsed")
    changes = ("right_to_wrong", "wrong_to_right", "answer_change_rate", "unparsed_rate", "format_loss")
    extra = ("retention", "retention_low", "retention_high", *changes)
    plain = ("difference", "difference_low", "difference_high", *tests)
    against = ("baseline", "did", "did_low", "did_high", "p", "p_holm", "p_bh", *plain)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [*base, *counts, *extra, *against], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    labels = {(m.model, m.router): m.label for m in data.models}
    metrics = {scores.task: scores.metric for scores in data.scores}
    for row in data.rows:
        task = next(task for task in metrics if _task_of(row, task))
        own: dict[str, Any] = {}
        if row["metric"] == metrics[task]:
            label = labels[row["model"], row["router"] or "none"]
            own = derived.get((task, label, row["corruption"], row["severity"]), {})
        writer.writerow({**row, **own})
    return stream.getvalue()


def _flat(name: str, number: Json) -> dict[str, Any]:
    return {name: number["value"], f"{name}_low": number["ci_low"], f"{name}_high": number["ci_high"]}
