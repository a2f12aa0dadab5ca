"""The report's gallery of flipped answers: both pictures, the question, and what every model said."""

from __future__ import annotations

import html
from collections.abc import Sequence

from symphony_vlm.evaluation.flip_pictures import PicturePair
from symphony_vlm.evaluation.report_samples import FlippedSample, SampleChoice

__all__ = ["gallery"]


def gallery(choices: Sequence[SampleChoice]) -> str:
    """The cards of every choice; why there are no pictures is said once if it is the same for all."""
    samples = [sample for choice in choices for sample in choice.samples]
    if not samples:
        return ""
    reasons = {sample.pictures for sample in samples if isinstance(sample.pictures, str)}
    common = next(iter(reasons)) if len(reasons) == 1 and all(isinstance(s.pictures, str) for s in samples) else None
    blocks = []
    for choice in choices:
        cards = "".join(_card(sample, say_why=common is None) for sample in choice.samples)
        count = f"{len(choice.samples)} of {choice.total}"
        blocks.append(f'<h3>{html.escape(choice.title)} ({count})</h3><div class="samples">{cards}</div>')
    note = "Chosen by the hash of item and corruption, not by hand; pairs of an item and a corrupted cell are counted."
    drawn = "Pictures are drawn again from the data and checked against the evaluation's hashes of their pixels."
    said = f"Without pictures: {common}." if common is not None else drawn
    return f'{"".join(blocks)}<p class="caption">{note} {html.escape(said)}</p>'


def _card(sample: FlippedSample, *, say_why: bool) -> str:
    def said(text: str, right: bool) -> str:
        mark, kind = ("✓ right", "right") if right else ("✗ wrong", "wrong")
        return f'<td>{html.escape(text)} <span class="mark {kind}">{mark}</span></td>'

    rows = "".join(
        f'<tr><th scope="row">{html.escape(label)}</th>{said(clean, ok)}{said(bad, bad_ok)}</tr>'
        for label, clean, bad, ok, bad_ok in sample.said
    )
    cell = f"{sample.cell[0].replace('_', ' ')}, severity {sample.cell[1]}"
    return (
        f'<article class="sample"><p class="sub">{html.escape(cell)} · {html.escape(sample.item_id)}</p>'
        f"{_pictures(sample.pictures, say_why=say_why)}"
        f'<p class="question">{html.escape(sample.question)}</p>'
        f"<p>Answer: <strong>{html.escape(sample.answer)}</strong></p>"
        '<table><thead><tr><th scope="col">model</th><th scope="col">clean</th>'
        f'<th scope="col">corrupted</th></tr></thead><tbody>'
        f"{rows}</tbody></table></article>"
    )


def _pictures(pictures: PicturePair | str, *, say_why: bool) -> str:
    if isinstance(pictures, str):
        return f'<p class="caption">No pictures: {html.escape(pictures)}.</p>' if say_why else ""
    kind = ' class="small"' if pictures.small else ""
    shown = "".join(
        f'<figure><img{kind} src="{url}" alt="{html.escape(name)} picture"><figcaption>{html.escape(name)}</figcaption>'
        "</figure>"
        for name, url in (("clean", pictures.clean), ("corrupted", pictures.corrupted))
    )
    return f'<div class="pair">{shown}</div>'
