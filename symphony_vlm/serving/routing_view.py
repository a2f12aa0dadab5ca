"""Which experts read what in a conversation: per patch of its pictures, per word, per layer.

One forward pass over the whole conversation, as the model would read it in training, with its recorder of routers.
`routing_figures` draws the result; nothing here knows a user interface.

Shape letters: S positions of the conversation, G patches a side of a picture, K experts per token, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from symphony_vlm.data.conversation import IGNORE_INDEX
from symphony_vlm.data.sample import Message
from symphony_vlm.errors import InputError
from symphony_vlm.moe.recording import sparse_layers

if TYPE_CHECKING:
    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["LayerRouting", "PatchGrid", "RoutingView", "Word", "view_routing"]


@dataclass(frozen=True, kw_only=True)
class LayerRouting:
    """What the router of one decoder layer decided, and its expert graph."""

    layer: int
    """Index of the decoder layer."""
    num_experts: int
    indices_SK: Tensor
    """Experts of every position, best first."""
    weights_SK: Tensor
    """fp32, the weights with which their outputs were added."""
    adjacency_EE: Tensor | None
    """fp32, entry (j, k) is how much expert j listens to expert k; None: a plain router."""

    def shares(self, positions: Sequence[int] | range) -> Tensor:
        """How much each expert contributed to some positions: mean weight, together 1, ``[E]``.

        Weights of the selected experts are scaled to the sum 1 at every position first, so that each counts the same
        whether the router renormalises or not.
        """
        chosen = torch.tensor(list(positions), dtype=torch.long)
        weights_TK = self.weights_SK[chosen]
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        shares_E = torch.zeros(self.num_experts)
        shares_E.index_add_(0, self.indices_SK[chosen].flatten(), weights_TK.flatten())
        return shares_E / len(chosen)


@dataclass(frozen=True, kw_only=True)
class PatchGrid:
    """Where the patches of one picture stand in the conversation, row by row."""

    start: int
    """Position of the patch at the top left."""
    side: int
    """G."""
    overview_only: bool
    """Whether the picture has tiles too (``anyres``), whose positions are left out here."""

    @property
    def positions(self) -> range:
        """Of all patches, ``G * G``."""
        return range(self.start, self.start + self.side**2)


@dataclass(frozen=True, kw_only=True)
class Word:
    """A word as the model read it: one or several tokens, with the blank in front of them."""

    text: str
    start: int
    stop: int
    """Its positions are ``range(start, stop)``."""
    is_answer: bool
    """Whether the model wrote it; else it is the user's or the template's."""


@dataclass(frozen=True, kw_only=True)
class RoutingView:
    """The routing of a conversation, on the CPU."""

    layers: tuple[LayerRouting, ...]
    pictures: tuple[PatchGrid, ...]
    words: tuple[Word, ...]

    @property
    def answer(self) -> tuple[Word, ...]:
        """The words of the last answer."""
        found: list[Word] = []
        for word in reversed(self.words):
            if word.is_answer:
                found.append(word)
            elif found:
                break
        return tuple(reversed(found))


@torch.no_grad()
def view_routing(
    model: SymphonyVLMForConditionalGeneration, history: Sequence[Message], image_features: Sequence[Tensor]
) -> RoutingView:
    """Runs a conversation through the model once and reads what its routers decided.

    An answer's words are tokenised again; where a model wrote one word in unusual pieces, these may differ from the
    tokens it generated.

    Args:
        model: a model with its processor, in evaluation mode.
        history: the messages, the last one an answer (`ChatSession.history`).
        image_features: of all its pictures in their order, ``[n, D]`` each (`ChatSession.image_features`).

    Raises:
        InputError: there is no answer yet, or the language model has no router.
    """
    processor = model.processor
    assert processor is not None, "sessions exist only for models with a processor"
    layers = {layer.key: layer for _, layer in sparse_layers(model.language_model)}
    if model.routing is None or not layers:
        raise InputError("the language model is dense, so there is no routing to show", where="routing")
    if not history or history[-1].role != "assistant":
        raise InputError("there is no answer yet", where="routing", remedy="Ask something first.")
    encoded = processor.encode(
        history,
        num_image_tokens=[len(features) for features in image_features],
        max_length=getattr(model.config.text_config, "max_position_embeddings", None),
    )
    ids = torch.tensor([encoded.input_ids], device=model.device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if image_features:
        inputs["image_features"] = [image_features[index] for index in encoded.image_order]
    model(**inputs)
    routed = []
    for key, layer in layers.items():
        output, graph = model.routing.outputs[key], layer.router.expert_graph
        routed.append(
            LayerRouting(
                layer=layer.layer_index,
                num_experts=layer.router.config.num_experts,
                indices_SK=output.indices_TK.cpu(),
                weights_SK=output.weights_TK.float().cpu(),
                adjacency_EE=None if graph is None else graph.whole_adjacency().float().cpu(),
            )
        )
    lengths = [len(image_features[index]) for index in encoded.image_order]
    is_image = [token == processor.image_token_id for token in encoded.input_ids]
    overview = processor.num_image_tokens if processor.image_processor.tile_grid is not None else None
    return RoutingView(
        layers=tuple(routed),
        pictures=tuple(_grids(is_image, lengths, overview)),
        words=tuple(_words(encoded.input_ids, encoded.labels, is_image, processor.tokenizer)),
    )


def _grids(is_image: Sequence[bool], lengths: Sequence[int], overview: int | None) -> Iterator[PatchGrid]:
    """The grids of pictures with so many positions each; two pictures may stand next to each other."""
    places = [position for position, flag in enumerate(is_image) if flag]
    for length in lengths:
        start, places = places[0], places[length:]
        patches = length if overview is None else overview
        side = math.isqrt(patches)
        # In front of the map a class token, if the features have one.
        yield PatchGrid(start=start + patches - side**2, side=side, overview_only=overview is not None)


def _words(ids: Sequence[int], labels: Sequence[int], is_image: Sequence[bool], tokenizer: Any) -> Iterator[Word]:
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    word: Word | None = None
    for start, stop, text in _pieces(ids, is_image, tokenizer):
        is_answer = labels[start] != IGNORE_INDEX
        alone = ids[start] in special
        begins = (
            word is None
            or alone
            or ids[word.start] in special
            or word.stop != start
            or word.is_answer != is_answer
            or text[:1].isspace()
            or word.text[-1:].isspace()
        )
        if word is not None and not begins:
            word = Word(text=word.text + text, start=word.start, stop=stop, is_answer=is_answer)
            continue
        if word is not None:
            yield word
        word = Word(text=text, start=start, stop=stop, is_answer=is_answer)
    if word is not None:
        yield word


def _pieces(ids: Sequence[int], is_image: Sequence[bool], tokenizer: Any) -> Iterator[tuple[int, int, str]]:
    """First and behind-last position, and text, of the shortest runs of tokens that are whole letters.

    A letter of several bytes may be several tokens, and some tokenizers drop a blank in front of the first token they
    are given, so each run is what a growing window's text gains.
    """
    context = start = 0
    for position in range(len(ids)):
        if is_image[position]:
            context = start = position + 1
            continue
        before = tokenizer.decode(list(ids[context:start]), skip_special_tokens=False)
        text = tokenizer.decode(list(ids[context : position + 1]), skip_special_tokens=False)
        at_end = position + 1 == len(ids) or is_image[position + 1]
        if text.endswith("\ufffd") and not at_end:
            continue
        if len(text) > len(before) or at_end:
            yield start, position + 1, text[len(before) :]
            context, start = start, position + 1
