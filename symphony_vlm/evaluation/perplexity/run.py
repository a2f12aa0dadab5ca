"""Opens a model and a text, scores the text clean and attacked, and writes results and the cost of every line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from symphony_vlm.data.text_lines import articles, open_lines
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.perplexity.lines_file import line_records, read_line_records, write_line_records
from symphony_vlm.evaluation.perplexity.opening import OpenedLanguageModel, open_language_model
from symphony_vlm.evaluation.perplexity.plan import MIN_ARTICLES, PerplexityPlan
from symphony_vlm.evaluation.perplexity.results import CellFigures, cell_figures, paired, paired_dict
from symphony_vlm.evaluation.perplexity.scoring import log_probabilities
from symphony_vlm.evaluation.perplexity.texts import Attack, attacked, clean, in_vocabulary
from symphony_vlm.evaluation.perplexity.tokens import tokenise
from symphony_vlm.evaluation.perplexity.windows import Window, sliding_windows, stream_windows
from symphony_vlm.files import write_json
from symphony_vlm.training.provenance import provenance

__all__ = ["PerplexitySummary", "evaluate_perplexity"]

MAX_DEFAULT_CONTEXT = 1024


@dataclass(frozen=True, kw_only=True)
class PerplexitySummary:
    """Figures of the clean text, of every attack, and differences on the same lines."""

    cells: list[CellFigures]
    pairs: list[dict[str, Any]]
    settings: dict[str, Any]
    """Context, stride, clusters, whether the attack's word is in the vocabulary."""

    def to_dict(self) -> dict[str, Any]:
        """The summary of ``--json``: the last cell's figures on top, all cells below ``results``."""
        cells = [cell.to_dict() for cell in self.cells]
        return {**cells[-1], **self.settings, "results": cells, "pairs": self.pairs}


def evaluate_perplexity(
    plan: PerplexityPlan, output: Path | None, *, against: Path | None = None, console: Console | None = None
) -> PerplexitySummary:
    """Scores a text under a model.

    Args:
        plan: what to do.
        output: folder for ``results.json`` and ``lines.jsonl``; None writes nothing.
        against: such a folder of another model on the same text, to be compared with line by line.
        console: where progress goes; default: standard error.

    Raises:
        InputError: the model, the text or a setting cannot be used, or `against` is of another text.
    """
    console = console or Console(stderr=True)
    start = time.monotonic()
    others = read_line_records(against) if against is not None else {}
    opened = open_language_model(plan.model)
    lines, fingerprint = _lines(plan)
    context, stride = _context(plan, opened)
    clusters, kind = _clusters(lines, plan)
    cells: list[CellFigures] = []
    records: list[dict[str, Any]] = []
    for attack in (None, *plan.attacks):
        figures, own = _cell(lines, attack, plan, opened, clusters, context, stride)
        console.print(_progress(figures), highlight=False)
        cells.append(figures)
        records += own
    settings: dict[str, Any] = {"context": context, "stride": stride, "streams": plan.streams, "interval_by": kind}
    settings["n_clusters"] = len(set(clusters))
    if plan.attacks:
        settings["token_in_vocabulary"] = in_vocabulary(plan.attacks[0].token, opened.tokenizer)
    pairs = _pairs(records, cells, others, plan, str(against))
    summary = PerplexitySummary(cells=cells, pairs=pairs, settings=settings)
    if output is not None:
        write_line_records(output / "lines.jsonl", records)
        common = {"model": plan.model, "router": opened.router, "task": "perplexity", "split": Path(plan.text).name}
        facts = {"plan": asdict(plan), **settings, "text_sha256": fingerprint, "seconds": time.monotonic() - start}
        rows = [row for cell in cells for row in cell.rows(common)]
        document = {"results": rows, "pairs": pairs, "summary": summary.to_dict(), "provenance": provenance(**facts)}
        write_json(output / "results.json", document)
    return summary


def _lines(plan: PerplexityPlan) -> tuple[list[str], str]:
    text = open_lines(plan.text, subset=plan.subset, split=plan.split)
    lines = list(text)[: plan.limit_lines]
    if not any(line.strip() for line in lines):
        raise InputError("holds no text", where=plan.text, remedy="Give a text file, one with more than blank lines.")
    return lines, text.fingerprint


def _context(plan: PerplexityPlan, opened: OpenedLanguageModel) -> tuple[int, int]:
    longest = opened.max_positions
    context = plan.context or min(longest or MAX_DEFAULT_CONTEXT, MAX_DEFAULT_CONTEXT)
    if longest is not None and context > longest:
        raise InputError(
            f"{context} tokens are more than the model's {longest} positions",
            where="--context",
            remedy=f"Use at most {longest}.",
        )
    return context, plan.stride or max(1, context // 2)


def _clusters(lines: Sequence[str], plan: PerplexityPlan) -> tuple[list[str], str]:
    """What each line is drawn again with, and whether that is its article."""
    numbers = articles(lines)
    count = len(set(numbers))
    if plan.clusters == "article" and count < 2:
        raise InputError(
            "the text has no titles (= Title =) that would tell its articles apart",
            where="--interval-by article",
            remedy="Use --interval-by line.",
        )
    if plan.clusters == "article" or (plan.clusters == "auto" and count >= MIN_ARTICLES):
        return [f"article {number}" for number in numbers], "article"
    return [f"line {index}" for index in range(len(lines))], "line"


def _cell(
    lines: Sequence[str],
    attack: Attack | None,
    plan: PerplexityPlan,
    opened: OpenedLanguageModel,
    clusters: Sequence[str],
    context: int,
    stride: int,
) -> tuple[CellFigures, list[dict[str, Any]]]:
    text = clean(lines) if attack is None else attacked(lines, attack)
    tokens = tokenise(text.text, opened.tokenizer, text.spans)
    windows = _windows(len(tokens.ids_N), plan, context, stride)
    scores_N = log_probabilities(opened.model, tokens.ids_N, windows, batch_size=plan.batch_size)
    counts = tokens.per_line(scores_N)
    figures = cell_figures(text, attack, counts, len(tokens.ids_N), clusters, seed=plan.seed)
    return figures, line_records(figures.name, counts, clusters, text.swapped_by_line)


def _windows(num_tokens: int, plan: PerplexityPlan, context: int, stride: int) -> list[Window]:
    if plan.streams is None:
        return sliding_windows(num_tokens, context=context, stride=stride)
    return stream_windows(num_tokens, streams=plan.streams, context=context, stride=stride)


def _pairs(
    records: Sequence[dict[str, Any]],
    figures: Sequence[CellFigures],
    others: dict[str, dict[int, dict[str, Any]]],
    plan: PerplexityPlan,
    against: str,
) -> list[dict[str, Any]]:
    """Attacked against clean, and this model against the other on every cell that both have."""
    nats = {cell.name: cell.values["nats_per_token"][0] for cell in figures}
    cells: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        cells.setdefault(record["cell"], {})[record["line"]] = record
    found = [
        paired_dict(paired(cells["clean"], cell, name, seed=plan.seed), "clean", name)
        | {"nats_per_token": nats[name] - nats["clean"]}
        for name, cell in cells.items()
        if name != "clean"
    ]
    shared = [name for name in cells if name in others]
    if others and not shared:
        raise InputError(f"has none of the cells {', '.join(cells)}", where=against)
    found += [
        paired_dict(paired(others[name], cells[name], against, seed=plan.seed), f"{against}: {name}", name)
        for name in shared
    ]
    return found


def _progress(cell: CellFigures) -> str:
    value, low, high = cell.values["perplexity"]
    rate = "" if cell.attack is None else f", {cell.realised_rate:.2%} of the words swapped"
    return f"{cell.name}: perplexity {value:.3f} [{low:.3f}, {high:.3f}]{rate}"
