"""The experts of an answer's tokens, drawn for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from rich.text import Text

from symphony_vlm.errors import InputError
from symphony_vlm.serving.token_text import TokenText

if TYPE_CHECKING:
    from symphony_vlm.serving.routing_trace import ConversationRouting

__all__ = ["coloured_words", "share_table"]

_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta")
_MOST_COLUMNS = 12
_MOST_NAMED = 6
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def share_table(routing: ConversationRouting) -> Table:
    """A row for each layer: how large a share of the places of the answer's tokens each expert had.

    Every token has one place for each of its experts. Of many experts only the busiest are named.
    """
    table = Table(box=None, pad_edge=False)
    wide = routing.num_experts > _MOST_COLUMNS
    table.add_column("layer", justify="right")
    if wide:
        table.add_column("busiest experts", overflow="fold")
    else:
        for expert in range(routing.num_experts):
            table.add_column(str(expert), justify="right", style=_colour(expert))
    for layer, experts_SK in routing.experts.items():
        chosen = experts_SK[routing.answer_start :].flatten().long()
        shares = torch.bincount(chosen, minlength=routing.num_experts) / max(1, len(chosen))
        if wide:
            busiest = shares.sort(descending=True, stable=True).indices[:_MOST_NAMED].tolist()
            cells = [Text("  ").join(Text(f"{e}: {shares[e]:.0%}", _colour(e)) for e in busiest if shares[e] > 0)]
        else:
            cells = [Text(f"{share:.0%}" if share > 0 else "·") for share in shares.tolist()]
        table.add_row(str(layer), *cells)
    return table


def coloured_words(routing: ConversationRouting, tokenizer: Any, layer: int) -> Text:
    """The answer, each piece in the colour of its token's first expert in one layer, and with its number.

    Raises:
        InputError: the layer has no experts.
    """
    if layer not in routing.experts:
        known = ", ".join(map(str, routing.experts))
        raise InputError(f"layer {layer} has no experts", where="/routing", remedy=f"Layers with experts: {known}.")
    text = TokenText(tokenizer)
    shown = Text()
    first = routing.experts[layer][routing.answer_start :, 0].tolist()
    for token, expert in zip(routing.token_ids[routing.answer_start :], first, strict=True):
        # The bytes of one letter may be several tokens; it is shown with the last of them.
        if piece := text.add(token):
            printable = "".join(letter if letter.isprintable() else " " for letter in piece)
            shown.append(printable + str(expert).translate(_SUBSCRIPTS), _colour(expert))
    return shown


def _colour(expert: int) -> str:
    return _COLOURS[expert % len(_COLOURS)]
