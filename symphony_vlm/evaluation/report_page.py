"""The page around the report's sections: style sheet and frame. It loads nothing from anywhere."""

from __future__ import annotations

import html
from collections.abc import Sequence

__all__ = ["page", "section"]

_STYLE = """
:root{color-scheme:light dark;--font:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
--paper:#f6f7f8;--card:#ffffff;--ink:#1b1f24;--muted:#59626c;--line:#d9dee3;--accent:#0b5cad;--warn:#8a4b00;
--warn-bg:#fff6e5;--good:#00664b;--bad:#a8330a;--better:#56b4e9;--worse:#f0a04b;
--s0:#0072b2;--s1:#d55e00;--s2:#009e73;--s3:#b0568c;--s4:#2d8fc7;--s5:#b37400}
@media (prefers-color-scheme:dark){:root{--paper:#111417;--card:#191d22;--ink:#e8eaed;--muted:#a3adb8;--line:#323941;
--accent:#7cc0f5;--warn:#ffc36b;--warn-bg:#2b2213;--good:#4fd1a5;--bad:#ff9a73;--better:#2f8fc9;--worse:#c46f1a;
--s0:#56b4e9;--s1:#f08c3c;--s2:#2fc79a;--s3:#e39bc4;--s4:#9bd3f5;--s5:#e8b93c}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;overflow-wrap:break-word;background:var(--paper);color:var(--ink);font:16px/1.55 var(--font)}
main,header,footer{max-width:1080px;margin:0 auto;padding:0 20px}
header{padding-top:40px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .3rem;letter-spacing:-.01em}
h2{font-size:1.25rem;margin:0 0 .6rem}
h3{font-size:1rem;margin:1.4rem 0 .5rem}
section h3:first-of-type{margin-top:.6rem}
p{margin:.4rem 0}
a{color:var(--accent)}
.sub,.caption,footer{color:var(--muted);font-size:.875rem}
.caption{max-width:80ch}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:.9rem 0 0;font-size:.875rem}
nav a{text-decoration:none;padding:.15rem 0}
nav a:hover,nav a:focus{text-decoration:underline}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:20px 22px;margin:18px 0}
.verdict{font-size:1.125rem;line-height:1.5;max-width:75ch}
.warnings{background:var(--warn-bg);border-color:color-mix(in srgb,var(--warn) 45%,var(--line))}
.warnings h2{color:var(--warn)}
.warnings ul{margin:.2rem 0;padding-left:1.2rem}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch;
background:linear-gradient(to left,var(--card) 50%,transparent) right/40px 100% no-repeat local,
linear-gradient(to left,color-mix(in srgb,var(--ink) 22%,transparent),transparent) right/14px 100% no-repeat scroll}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.42rem .7rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th:first-child{text-align:left;padding-left:2px}
thead th{color:var(--muted);font-weight:600;font-size:.8125rem;vertical-align:bottom;
border-bottom:2px solid var(--line)}
tbody th{font-weight:500;min-width:9.5rem}
tbody tr:last-child>*{border-bottom:0}
td{white-space:nowrap}
.scroll tbody th,.scroll thead th:first-child{position:sticky;left:0;background:var(--card)}
.ci{color:var(--muted);font-size:.8125rem;white-space:nowrap}
.why{display:block;white-space:normal;color:var(--muted);max-width:18rem;margin-left:auto;line-height:1.3}
table:is(.did,.differences,.retention) td{border:2px solid var(--card);text-align:center}
table:is(.did,.differences,.retention) tbody th{vertical-align:middle}
table:is(.did,.differences,.retention) thead th{text-align:center}
table:is(.did,.differences,.retention) thead th:first-child{text-align:left}
table:is(.did,.differences,.retention) .ci{display:block;font-size:.75rem;color:inherit;opacity:.8}
table.provenance td{white-space:normal;overflow-wrap:anywhere;text-align:left;min-width:9rem}
table.provenance thead th{text-align:left}
tr.differs td{color:var(--warn)}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.4rem;font-size:.875rem;margin:.3rem 0 .6rem}
.key{display:inline-flex;align-items:center;gap:.5rem}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:14px 20px}
.panels.two{grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),370px));column-gap:48px}
.panel{margin:0;min-width:0}
.panel svg{display:block;width:100%;height:auto;max-width:370px}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:14px}
.sample{border:1px solid var(--line);border-radius:8px;padding:12px 14px;font-size:.9rem;overflow-wrap:anywhere}
.sample p{margin:.15rem 0}
.question{white-space:pre-line}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:10px;margin:.5rem 0;max-width:340px}
.pair figure{margin:0}
.pair img{display:block;width:100%;height:auto;border-radius:4px;border:1px solid var(--line)}
.pair img.small{image-rendering:pixelated}
.pair figcaption{color:var(--muted);font-size:.8125rem;margin-top:.2rem}
.sample table{font-size:.85rem;margin-top:.4rem}
.sample td,.sample thead th{text-align:left;white-space:normal}
.sample tbody th{min-width:0;overflow-wrap:anywhere}
.mark{white-space:nowrap}
.right{color:var(--good)}.wrong{color:var(--bad)}
dl{display:grid;grid-template-columns:minmax(8rem,auto) 1fr;gap:.35rem 1.2rem;font-size:.9rem;margin:.4rem 0}
dt{font-weight:600}dd{margin:0;overflow-wrap:anywhere}
details summary{cursor:pointer;font-weight:600;margin:.6rem 0}
footer{padding-bottom:40px}
@media (max-width:600px){main,header,footer{padding-left:12px;padding-right:12px}header{padding-top:24px}
section{padding:16px 14px;border-radius:8px}h1{font-size:1.4rem}
dl{grid-template-columns:1fr;gap:.1rem}dd{margin-bottom:.5rem}
th,td{padding:.4rem .45rem}tbody th{min-width:7rem}.ci{display:block;font-size:.75rem}}
@media print{:root{color-scheme:light;--paper:#fff;--card:#fff;--ink:#000;--muted:#444;--line:#bbb;
--s0:#0072b2;--s1:#d55e00;
--s2:#009e73;--s3:#b0568c;--s4:#2d8fc7;--s5:#b37400;--better:#56b4e9;--worse:#f0a04b;--warn:#8a4b00;--warn-bg:#fff;
--good:#00664b;--bad:#a8330a;--accent:#0b5cad}
body{font-size:10.5pt}nav{display:none}section{border:0;padding:0;margin:14pt 0}
main,header,footer{max-width:none;padding:0}
.panel,tr,.sample{break-inside:avoid}h2,h3{break-after:avoid}.scroll{overflow:visible;background:none}
th,td{padding:.2rem .35rem}table,.sample table{font-size:8pt}.ci,
table:is(.did,.differences,.retention) .ci{display:block;font-size:7pt}tbody th,table.provenance td{min-width:0}
thead th{overflow-wrap:anywhere;font-size:7.5pt}.samples{grid-template-columns:1fr 1fr}.pair{max-width:260px}
.panels{grid-template-columns:repeat(3,1fr)}td{white-space:normal}
td,.panel,img{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def section(key: str, title: str, body: str, *, kind: str = "") -> str:
    """One section of the page; nothing if it has no body."""
    if not body:
        return ""
    style = f' class="{kind}"' if kind else ""
    return f'<section id="{key}"{style}><h2>{html.escape(title)}</h2>{body}</section>'


def page(
    *,
    title: str,
    subtitle: str,
    sections: Sequence[tuple[str, str]],
    body: str,
    made_by: str = "symphony-vlm report",
    numbers_in: str = "results.json and cells.csv",
) -> str:
    """The whole document.

    Args:
        title: Heading, as text.
        subtitle: What was evaluated, as text.
        sections: (key, title) of the sections, for the navigation.
        body: The sections as HTML.
        made_by: Command, for the footer.
        numbers_in: Files with all numbers, for the footer.
    """
    links = "".join(f'<a href="#{key}">{html.escape(name)}</a>' for key, name in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<title>{html.escape(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>'
        f'<header><h1>{html.escape(title)}</h1><p class="sub">{html.escape(subtitle)}</p>'
        f'<nav aria-label="Sections">{links}</nav></header><main>{body}</main>'
        f"<footer><p>Made by {html.escape(made_by)}. The numbers are in {html.escape(numbers_in)} beside this page.</p>"
        "</footer></body></html>\n"
    )
