"""The experts of an answer, drawn for a terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from symphony_vlm.errors import InputError
from symphony_vlm.serving.routing_view import RoutingView

__all__ = ["coloured_words", "share_table"]

_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta")
_MOST_COLUMNS = 12
_MOST_NAMED = 6
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def share_table(view: RoutingView) -> Table:
    """A row for each layer: how much each expert contributed to the last answer's tokens.

    Of many experts only the busiest are named.
    """
    table = Table(box=None, pad_edge=False)
    num_experts = view.layers[0].num_experts
    wide = num_experts > _MOST_COLUMNS
    table.add_column("layer", justify="right")
    if wide:
        table.add_column("busiest experts", overflow="fold")
    else:
        for expert in range(num_experts):
            table.add_column(str(expert), justify="right", style=_colour(expert))
    positions = [position for word in view.answer for position in range(word.start, word.stop)]
    for layer in view.layers:
        shares = layer.shares(positions)
        if wide:
            busiest = shares.sort(descending=True, stable=True).indices[:_MOST_NAMED].tolist()
            cells = [Text("  ").join(Text(f"{e}: {shares[e]:.0%}", _colour(e)) for e in busiest if shares[e] > 0)]
        else:
            cells = [Text(f"{share:.0%}" if share > 0 else "·") for share in shares.tolist()]
        table.add_row(str(layer.layer), *cells)
    return table


def coloured_words(view: RoutingView, layer: int) -> Text:
    """The last answer, each word in the colour and with the number of the expert with the largest share in one layer.

    Raises:
        InputError: the layer has no experts.
    """
    routed = next((found for found in view.layers if found.layer == layer), None)
    if routed is None:
        known = ", ".join(str(found.layer) for found in view.layers)
        raise InputError(f"layer {layer} has no experts", where="/routing", remedy=f"Layers with experts: {known}.")
    shown = Text()
    for word in view.answer:
        expert = int(routed.shares(range(word.start, word.stop)).argmax())
        printable = "".join(letter if letter.isprintable() else " " for letter in word.text)
        shown.append(printable + str(expert).translate(_SUBSCRIPTS), _colour(expert))
    return shown


def _colour(expert: int) -> str:
    return _COLOURS[expert % len(_COLOURS)]
