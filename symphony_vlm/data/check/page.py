"""The report as one page: it loads nothing, works from a file, and shows whatever the data holds as text."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib.resources import files

from symphony_vlm.data.check.faults import KINDS, printable
from symphony_vlm.data.check.histogram import histogram_svg
from symphony_vlm.data.check.report import CheckReport
from symphony_vlm.data.check.samples_html import samples_html
from symphony_vlm.data.check.spans import SampleView
from symphony_vlm.data.check.tokens import percentiles

__all__ = ["check_page"]

_EXAMPLES = 3
# Nothing of what the data holds may run or load, even if a text slipped through unescaped.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def check_page(report: CheckReport, views: Sequence[SampleView]) -> str:
    """The whole document.

    Args:
        report: What was found.
        views: Samples to show.
    """
    title = ", ".join(file.name for file in report.files)
    style = files("symphony_vlm.data.check").joinpath("page.css").read_text(encoding="utf-8")
    body = "".join(
        (
            _section("Counts", _tiles(report) + _mix(report)),
            _section("Lengths", _lengths(report)),
            _section("Faults", _faults(report)),
            _section("Notes", _notes(report)),
            _section("Files", _files(report) if len(report.files) > 1 else ""),
            _section("Samples", samples_html(views)),
        )
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(title)}: data check</title><style>{style}</style></head><body>"
        f'<header><h1>Data check</h1><p class="sub">{_text(title)}</p>{_verdict(report)}</header><main>{body}</main>'
        "<footer><p>Made by symphony-vlm data check. The numbers are in check.json and every fault in faults.jsonl "
        "beside this page.</p></footer></body></html>\n"
    )


def _text(value: str) -> str:
    return html.escape(printable(value))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _verdict(report: CheckReport) -> str:
    if not report.faults:
        return f'<p class="verdict good">No faults in {report.n_records:,} records.</p>'
    return (
        f'<p class="verdict bad">{len(report.faults):,} faults in {report.faults.n_faulty_records:,} of '
        f"{report.n_records:,} records.</p>"
    )


def _tiles(report: CheckReport) -> str:
    tiles = [
        (f"{report.n_records:,}", "records"),
        (f"{len(report.ledger):,}", "different images"),
        (f"{report.n_image_uses:,}", "uses of images"),
    ]
    widths, heights = percentiles(report.ledger.widths), percentiles(report.ledger.heights)
    if widths:
        tiles.append((f"{widths['p50']:.0f} × {heights['p50']:.0f}", "median pixels"))
    if report.tokens is not None:
        share = report.tokens.supervised_share
        tiles.append(("none" if share is None else f"{share:.1%}", "of the tokens supervised"))
        tiles.append((f"{sum(report.tokens.lengths):,}", "tokens in all"))
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for value, label in tiles)
        + "</div>"
    )


def _mix(report: CheckReport) -> str:
    labels = {"one_image": "one image", "several_images": "several images", "text_only": "text only"}
    total = sum(report.modalities.values())
    if not total:
        return ""
    bars, keys = [], []
    for number, (key, label) in enumerate(labels.items()):
        count = report.modalities[key]
        if count:
            bars.append(f'<i class="m{number}" style="flex-grow:{count}"></i>')
            keys.append(f'<span><i class="m{number}"></i>{label}: {count:,} ({count / total:.1%})</span>')
    return f'<div class="mix">{"".join(bars)}</div><div class="key">{"".join(keys)}</div>'


def _lengths(report: CheckReport) -> str:
    values, unit = report.lengths
    if not values:
        return ""
    stats = percentiles(values)
    names = {"min": "shortest", "p50": "median", "p90": "90 %", "p95": "95 %", "p99": "99 %", "max": "longest"}
    head = "".join(f'<th class="number">{name}</th>' for name in [*names.values(), "mean"])
    row = "".join(f'<td class="number">{stats[key]:,.0f}</td>' for key in names)
    row += f'<td class="number">{stats["mean"]:,.1f}</td>'
    limit = report.tokens.tokenization.max_length if report.tokens else None
    caption = "Characters of text a record; add --tokenizer for tokens."
    if report.tokens is not None:
        made = report.tokens.tokenization
        caption = (
            f"Tokens a record in the template {_text(made.template.name)}, {made.num_image_tokens} for each image."
        )
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody><tr>{row}</tr></tbody></table></div>'
    return f'{histogram_svg(values, unit, limit)}<p class="caption">{caption}</p>{table}'


def _faults(report: CheckReport) -> str:
    rows = []
    for kind, count in report.faults.by_kind.most_common():
        examples = [f"<li>{_text(fault.reason)}</li>" for fault in report.faults.examples[kind]]
        shown = f"<ul>{''.join(examples[:_EXAMPLES])}</ul>"
        if len(examples) > _EXAMPLES:
            shown += f"<details><summary>more</summary><ul>{''.join(examples[_EXAMPLES:])}</ul></details>"
        if count > len(examples):
            shown += f'<p class="caption">{count - len(examples):,} more in faults.jsonl</p>'
        rows.append(
            f'<tr><td class="kind">{_text(kind)}<span>{_text(KINDS.get(kind, ""))}</span></td>'
            f'<td class="number">{count:,}</td><td>{shown}</td></tr>'
        )
    head = '<thead><tr><th>kind</th><th class="number">count</th><th>records</th></tr></thead>'
    return (
        f'<div class="scroll"><table class="faults">{head}<tbody>{"".join(rows)}</tbody></table></div>' if rows else ""
    )


def _notes(report: CheckReport) -> str:
    items = []
    for note in report.notes:
        examples = "".join(f"<li>{_text(example)}</li>" for example in note.examples)
        more = f"<details><summary>examples</summary><ul>{examples}</ul></details>" if examples else ""
        items.append(f"<p>{_text(note.text)}.</p>{more}")
    return "".join(items)


def _files(report: CheckReport) -> str:
    rows = "".join(
        f'<tr><td>{_text(file.path)}</td><td class="number">{file.records:,}</td>'
        f'<td class="number">{file.faults:,}</td></tr>'
        for file in report.files
    )
    head = '<thead><tr><th>file</th><th class="number">records</th><th class="number">faults</th></tr></thead>'
    return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'
