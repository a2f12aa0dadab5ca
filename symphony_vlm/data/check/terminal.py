"""The report and the samples on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from symphony_vlm.data.check.faults import KINDS, printable
from symphony_vlm.data.check.report import CheckReport
from symphony_vlm.data.check.spans import SampleView, legend
from symphony_vlm.data.check.tokens import percentiles

__all__ = ["render_report", "render_samples"]

_STYLES = {"supervised": "green", "context": "", "marker": "magenta", "image": "bold cyan", "cut": "red strike"}
_EXAMPLES = 2


def render_report(report: CheckReport) -> RenderableType:
    """Counts, faults by kind with examples, notes, and a verdict as the last line."""
    parts: list[RenderableType] = [_counts(report)]
    if report.faults:
        parts.append(_faults(report))
    if report.notes:
        parts.append(Text("Notes", style="bold"))
        for note in report.notes:
            parts.append(Text(f"• {note.text}"))
            parts += [
                Padding(Text(_plain(example), style="dim"), (0, 0, 0, 4), expand=False)
                for example in note.examples[:_EXAMPLES]
            ]
        parts.append(Text())
    parts.append(_verdict(report))
    return Group(*parts)


def _counts(report: CheckReport) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for file in report.files:
        table.add_row(
            "file" if file is report.files[0] else "", Text(f"{_plain(file.name)} ({file.records:,} records)")
        )
    table.add_row("records", f"{report.n_records:,}  ({_modalities(report)})")
    table.add_row("images", f"{len(report.ledger):,} different, used {report.n_image_uses:,} times{_sizes(report)}")
    values, unit = report.lengths
    if values:
        stats = percentiles(values)
        names = {"p50": "median", "p90": "90 %", "p99": "99 %", "max": "longest"}
        table.add_row(unit, ", ".join(f"{label} {stats[key]:,.0f}" for key, label in names.items()))
    if report.tokens is not None:
        share = report.tokens.supervised_share
        made = report.tokens.tokenization
        table.add_row("supervised", "no token" if share is None else f"{share:.1%} of the tokens")
        limit = "no limit" if made.max_length is None else f"max_length {made.max_length:,}"
        table.add_row("template", f"{made.template.name}, {made.num_image_tokens} tokens an image, {limit}")
    seconds = max(report.seconds, 1e-9)
    table.add_row("time", f"{report.seconds:.1f} s, {report.n_records / seconds:,.0f} records a second")
    table.add_row()
    return table


def _modalities(report: CheckReport) -> str:
    labels = {"text_only": "text only", "one_image": "one image", "several_images": "several images"}
    shown = [f"{report.modalities[key]:,} {label}" for key, label in labels.items() if report.modalities[key]]
    return ", ".join(shown) or "none readable"


def _sizes(report: CheckReport) -> str:
    widths, heights = percentiles(report.ledger.widths), percentiles(report.ledger.heights)
    return f", median {widths['p50']:.0f} x {heights['p50']:.0f} pixels" if widths else ""


def _faults(report: CheckReport) -> Table:
    table = Table(box=SIMPLE_HEAD, title=f"{len(report.faults):,} faults", title_justify="left", title_style="bold red")
    table.add_column("kind", min_width=18, max_width=28)
    table.add_column("count", justify="right")
    table.add_column("examples", overflow="fold")
    for kind, count in report.faults.by_kind.most_common():
        examples = report.faults.examples[kind][:_EXAMPLES]
        text = Text("\n").join(Text(_plain(fault.reason)) for fault in examples)
        more = count - len(examples)
        if more:
            text.append(f"\nand {more:,} more", style="dim")
        label = Text.assemble((kind, "red"), "\n", (KINDS.get(kind, ""), "dim"))
        table.add_row(label, f"{count:,}", text, end_section=True)
    return table


def _verdict(report: CheckReport) -> Text:
    if not report.faults:
        return Text(f"No faults in {report.n_records:,} records.", style="bold green")
    good = report.n_records - report.faults.n_faulty_records
    return Text(
        f"{len(report.faults):,} faults in {report.faults.n_faulty_records:,} of {report.n_records:,} records; "
        f"{good:,} are clean.",
        style="bold red",
    )


def render_samples(views: Sequence[SampleView], *, ids: bool = False) -> RenderableType:
    """Samples with every piece coloured; with ``ids`` each token is followed by its number."""
    key = Text("  ").join(Text(label, style=_STYLES[kind]) for kind, label in legend(views).items())
    return Group(key, Text(), *_interleave(_sample(view, ids=ids) for view in views))


def _interleave(items: Iterable[RenderableType]) -> list[Any]:
    return [part for item in items for part in (item, Text())]


def _sample(view: SampleView, *, ids: bool) -> Group:
    title = Text(f"{_plain(view.file)}: record {view.index}", style="bold")
    title.append(f"  id {_plain(view.sample.id)}", style="dim")
    if view.n_tokens is not None:
        title.append(f"  {view.n_tokens} tokens, {view.n_supervised} supervised", style="dim")
    lines = [title, *(Text(f"image {_plain(ref.name)}", style="dim cyan") for ref in view.sample.images)]
    body = Text()
    for number, span in enumerate(view.spans):
        # Tokens side by side need a border: every other one is underlined.
        style = _STYLES[span.kind]
        tokens = view.n_tokens is not None and span.kind in ("supervised", "context")
        shown = "↵\n".join(map(_plain, span.text.split("\n")))
        words = shown.rstrip("\n")
        body.append("\n" * span.starts_line + words, style=f"{style} underline" if tokens and number % 2 else style)
        if ids and span.ids:
            body.append(f"({','.join(map(str, span.ids))})", style="dim")
        body.append(shown[len(words) :])
    return Group(*lines, Padding(body, (0, 0, 0, 2), expand=False))


def _plain(text: str) -> str:
    """The text with control characters written out: those of the data must not reach the terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in printable(text))
