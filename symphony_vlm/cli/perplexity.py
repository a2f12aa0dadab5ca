"""The command that measures language models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.table import Table

from symphony_vlm.cli.application import Json, app, console, finish, names
from symphony_vlm.cli.memory import keep_freed_memory
from symphony_vlm.errors import InputError
from symphony_vlm.text import nearest

if TYPE_CHECKING:
    from symphony_vlm.evaluation.perplexity.texts import Attack

__all__: list[str] = []


@app.command()
def perplexity(
    model: Annotated[
        str, typer.Option(help="Folder of a causal LM, a vision-language model or a finished run, or a hub name.")
    ],
    text: Annotated[str, typer.Option(help="Text file, table with a column text, or a data set of the hub.")],
    output: Annotated[Optional[Path], typer.Option(help="Folder for results.json and lines.jsonl.")] = None,  # noqa: UP045
    attack: Annotated[Optional[str], typer.Option(help="word_swap; the clean text is scored too.")] = None,  # noqa: UP045
    rate: Annotated[str, typer.Option(help="Of swapped words in a line, several separated by commas.")] = "0.015",
    token: Annotated[str, typer.Option(help="What words are swapped for.")] = "AAA",
    profile: Annotated[str, typer.Option(help="textattack (at least one word a line) or exact.")] = "textattack",
    context: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Tokens in a window; default: the model's positions, at most 1024.", min=2),
    ] = None,
    stride: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="How far the next window begins; default half the context.", min=1),
    ] = None,
    drop_incomplete: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Cut the text into so many streams and drop incomplete windows, as published.", min=1),
    ] = None,
    subset: Annotated[Optional[str], typer.Option(help="Of a hub data set that has several.")] = None,  # noqa: UP045
    split: Annotated[Optional[str], typer.Option(help="Of a data set that has several.")] = None,  # noqa: UP045
    limit: Annotated[Optional[int], typer.Option(help="The first so many lines alone.", min=1)] = None,  # noqa: UP045
    interval_by: Annotated[str, typer.Option(help="What is drawn again: auto, article or line.")] = "auto",
    against: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="An output folder of another model on the same text, for a paired test."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows scored together.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Of the attack and the intervals.")] = 0,
    json_: Json = False,
) -> None:
    """Perplexity of a language model on a text, over sliding windows, clean and attacked, with intervals.

    Example: symphony-vlm perplexity --model runs/wikitext2_tiny --text wiki.test.tokens --attack word_swap --rate 0.05
    """
    attacks = _attacks(attack, rate, token, profile, seed)
    if interval_by not in ("auto", "article", "line"):
        raise InputError(f"{interval_by!r} is none of auto, article, line", where="--interval-by")
    from symphony_vlm.evaluation.perplexity.plan import PerplexityPlan
    from symphony_vlm.evaluation.perplexity.run import evaluate_perplexity

    plan = PerplexityPlan(
        model=model,
        text=text,
        subset=subset,
        split=split,
        attacks=attacks,
        context=context,
        stride=stride,
        streams=drop_incomplete,
        limit_lines=limit,
        batch_size=batch_size,
        clusters=interval_by,  # type: ignore[arg-type]
        seed=seed,
    )
    keep_freed_memory()
    summary = evaluate_perplexity(plan, output, against=against, console=console())
    found = summary.to_dict()
    if not json_:
        _show(found)
    finish(found, json_, str(output / "results.json") if output else "add --output DIR to keep the cost of every line")


def _attacks(attack: str | None, rates: str, token: str, profile: str, seed: int) -> tuple[Attack, ...]:
    if attack is None:
        return ()
    if attack != "word_swap":
        raise InputError(f"{attack!r} is no attack on text{nearest(attack, ['word_swap'])}", where="--attack")
    from symphony_vlm.evaluation.attacks.word_swap import PROFILES
    from symphony_vlm.evaluation.perplexity.texts import Attack

    if profile not in PROFILES:
        raise InputError(f"{profile!r} is none of {', '.join(PROFILES)}", where="--profile")
    if not token or any(character.isspace() for character in token):
        raise InputError(f"{token!r} must be one word", where="--token")
    values: list[float] = []
    for text in names(rates):
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not 0 < value <= 1:
            raise InputError(f"{text!r} must be a number above 0 and at most 1", where="--rate")
        values.append(value)
    if not values:
        raise InputError("no rate was given", where="--rate", remedy="Give one, e.g. --rate 0.015.")
    return tuple(
        Attack(rate=value, token=token, profile=PROFILES[PROFILES.index(profile)], seed=seed)
        for value in dict.fromkeys(values)
    )


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console

    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for name in ("text", "perplexity", "95 % interval", "per word", "without swapped", "swapped", "tokens", "coverage"):
        table.add_column(name, justify="left" if name == "text" else "right")
    for cell in found["results"]:
        table.add_row(
            "clean" if cell["attack"] is None else f"{cell['attack']} {cell['rate']:g}",
            f"{cell['perplexity']:.3f}",
            f"{cell['ci_low']:.3f} to {cell['ci_high']:.3f}",
            f"{cell['word_perplexity']:.3f}",
            f"{cell['perplexity_without_swapped']:.3f}",
            f"{cell['realised_rate']:.2%}",
            f"{cell['n_tokens']:,}",
            f"{cell['coverage']:.2%}",
        )
    # Piped output must not depend on the width of a terminal that nobody sees.
    screen = Console(highlight=False)
    if not screen.is_terminal:
        screen = Console(highlight=False, width=120)
    screen.print(table)
    for pair in found["pairs"]:
        screen.print(
            f"{pair['second']} minus {pair['first']}: {pair['nats_per_word']:+.4f} nats per word "
            f"[{pair['ci_low']:+.4f}, {pair['ci_high']:+.4f}], p = {pair['p_value']:.3g}",
            soft_wrap=True,
        )
