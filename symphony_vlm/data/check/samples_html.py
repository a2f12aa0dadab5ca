"""Samples in the page: pictures as thumbnails, every token coloured by what it is."""

from __future__ import annotations

import html
from collections.abc import Sequence

from symphony_vlm.data.check.faults import printable
from symphony_vlm.data.check.spans import SampleView, Span, legend
from symphony_vlm.data.check.thumbnails import thumbnail
from symphony_vlm.data.sample import ImageRef

__all__ = ["samples_html"]


def samples_html(views: Sequence[SampleView]) -> str:
    """The list of samples with its legend; nothing without samples."""
    if not views:
        return ""
    key = "".join(f'<span class="t {kind}">{label}</span>' for kind, label in legend(views).items())
    switch = ""
    if any(view.n_tokens is not None for view in views):
        # A checkbox and a style rule: no script is needed.
        switch = '<input type="checkbox" id="ids"><label class="ids" for="ids">show token ids</label>'
    samples = "".join(_sample(view) for view in views)
    return f'<div class="legend">{key}</div>{switch}<div class="list">{samples}</div>'


def _sample(view: SampleView) -> str:
    facts = f"id {view.sample.id}"
    if view.n_tokens is not None:
        facts += f" · {view.n_tokens:,} tokens, {view.n_supervised:,} supervised"
    pictures = "".join(_figure(ref) for ref in view.sample.images)
    tokens = "".join(_span(span) for span in view.spans)
    return (
        f'<article class="sample{" pictured" if pictures else ""}">'
        f"<h3>{_text(view.file)}, record {view.index}<small>{_text(facts)}</small></h3>"
        + (f'<div class="pictures">{pictures}</div>' if pictures else "")
        + f'<div class="tokens">{tokens}</div></article>'
    )


def _figure(ref: ImageRef) -> str:
    url = thumbnail(ref)
    picture = f'<img src="{url}" alt="">' if url else '<div class="broken">cannot be read</div>'
    return f"<figure>{picture}<figcaption>{_text(ref.name)}</figcaption></figure>"


def _span(span: Span) -> str:
    text = _text(span.text).replace("\n", '<span class="return">↵</span>\n')
    ids = f"<sub>{','.join(map(str, span.ids))}</sub>" if span.ids else ""
    # A number belongs behind its token, not at the start of the line that the token breaks.
    words = text.rstrip("\n")
    line = "\n" if span.starts_line else ""
    return f'{line}<span class="t {span.kind}">{words}{ids}{text[len(words) :]}</span>'


def _text(value: str) -> str:
    return html.escape(printable(value))
