"""The routing tab: which expert read which patch and which word of the conversation, and the expert graph."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from symphony_vlm.moe.recording import sparse_layers
from symphony_vlm.serving.faults import fault_text
from symphony_vlm.serving.patch_geometry import seen_region
from symphony_vlm.serving.routing_figures import graph_svg, legend_html, overlay_svg, strongest_edges, words_html
from symphony_vlm.serving.routing_view import LayerRouting, RoutingView, view_routing
from symphony_vlm.serving.uploads import Upload, open_upload
from symphony_vlm.serving.visitor import Visitor

if TYPE_CHECKING:
    from symphony_vlm.model.processor import SymphonyVLMProcessor
    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["MAX_SHOWN_PICTURES", "layer_choices", "routing_html"]

MAX_SHOWN_PICTURES = 4
"""The last ones of a conversation."""


def layer_choices(models: Sequence[SymphonyVLMForConditionalGeneration]) -> list[int]:
    """Decoder layers in which any of the models has experts."""
    return sorted({layer.layer_index for model in models for _, layer in sparse_layers(model.language_model)})


def routing_html(
    models: Sequence[SymphonyVLMForConditionalGeneration],
    visitor: Visitor,
    number: int,
    layer_index: int | None,
    *,
    compute: bool,
) -> str | None:
    """What the tab shows for one model and layer.

    Args:
        models: of the page.
        visitor: whose conversation.
        number: which of the models.
        layer_index: the decoder layer.
        compute: whether the model may be run; else only what was computed for the last answer is drawn again.

    Returns:
        HTML, or None if the model would have to be run.
    """
    model, session = models[number], visitor.sessions[number]
    if not layer_choices([model]):
        return _empty("No routing to show", "This language model is dense: it has no experts and no router.")
    if session is None or not session.history:
        return _empty("Nothing to show yet", "Ask something in the chat; the routing of the conversation appears here.")
    if visitor.view is None or visitor.view[0] != number:
        if not compute:
            return None
        try:
            visitor.view = (number, view_routing(model, session.history, session.image_features))
        except Exception as error:
            return _empty("The routing could not be computed", fault_text(error))
    view = visitor.view[1]
    layer = next((layer for layer in view.layers if layer.layer == layer_index), None)
    if layer is None:
        return _empty("No experts here", f"Layer {layer_index} of this model is dense.")
    uploads = [u for e in visitor.exchanges if e.answered[number] for u in e.uploads]
    assert model.processor is not None
    return (
        f'<div class="routing">{_pictures(view, layer, uploads, model.processor)}'
        f"<section><h3>Words</h3>{words_html(view, layer)}</section>"
        f'<div class="pair"><section><h3>Experts of layer {layer.layer}</h3>{legend_html(view, layer)}</section>'
        f"<section><h3>Expert graph</h3>{_graph(layer)}</section></div></div>"
    )


def _pictures(
    view: RoutingView, layer: LayerRouting, uploads: Sequence[Upload], processor: SymphonyVLMProcessor
) -> str:
    assert len(uploads) == len(view.pictures), "one grid for each picture"
    drawn = []
    for grid, upload in list(zip(view.pictures, uploads, strict=True))[-MAX_SHOWN_PICTURES:]:
        picture = open_upload(upload)
        region = seen_region(processor.image_processor, (picture.height, picture.width))
        drawn.append(
            _note("Where this encoder's preparation puts the picture is not known.")
            if region is None
            else f"<figure>{overlay_svg(picture, region, grid, layer)}</figure>"
        )
    if not drawn:
        return ""
    notes = ["Each patch has the colour and the number of the expert with the largest weight there."]
    if len(view.pictures) > MAX_SHOWN_PICTURES:
        notes.append(f"The last {MAX_SHOWN_PICTURES} of {len(view.pictures)} pictures.")
    if view.pictures[0].overview_only:
        notes.append("The picture was cut into tiles; only its overview is shown.")
    return f'<section><h3>Picture</h3><div class="figures">{"".join(drawn)}</div>{_note(" ".join(notes))}</section>'


def _graph(layer: LayerRouting) -> str:
    if layer.adjacency_EE is None:
        return _note("A plain router: it has no expert graph.")
    if not strongest_edges(layer.adjacency_EE, 1):
        return graph_svg(layer) + _note("The graph has no edges: training has not moved it from the identity.")
    self_weight = float(layer.adjacency_EE.diagonal().mean())
    return graph_svg(layer) + _note(
        "A line runs from an expert to one that listens to it, in the first one's colour, as wide as the weight. "
        f"Experts listen to themselves with {self_weight:.2f} on average, which is not drawn."
    )


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _empty(title: str, text: str) -> str:
    return f'<div class="empty"><h2>{html.escape(title)}</h2><p>{html.escape(text)}</p></div>'
