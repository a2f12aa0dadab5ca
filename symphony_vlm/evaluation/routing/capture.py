"""Takes down what the routers decide while a prompt is read. Nothing here changes an answer: hooks only look.

Shape letters: B prompts, S sequence, T tokens of all prompts without padding, L sparse layers, E experts, K selected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.routing.prompts import RoutedPrompts
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.moe.layer import SparseMoE
from symphony_vlm.moe.recording import sparse_layers

__all__ = ["PromptCapture"]


class PromptCapture:
    """Records the routing of prompts: of the first forward pass inside `first_pass`, which reads them whole.

    Args:
        model: with sparse layers in its language model, in evaluation mode.

    Raises:
        InputError: it has sparse layers elsewhere, whose tokens are not those of a prompt.
    """

    def __init__(self, model: SymphonyVLMForConditionalGeneration) -> None:
        elsewhere = [str(layer.key) for _, layer in sparse_layers(model) if not isinstance(layer.key, int)]
        if elsewhere:
            raise InputError(
                f"the model has experts in front of its language model ({', '.join(elsewhere)}), whose drift is not "
                "measured",
                where="--routing",
                remedy="Leave --routing out; inspect shows these layers' load.",
            )
        self._model = model
        self._layers = [layer for _, layer in sparse_layers(model.language_model)]
        self._plain_TE: dict[int | str, Tensor] = {}
        self._found: RoutedPrompts | None = None

    @property
    def layer_names(self) -> list[str]:
        """Of each sparse layer (`SparseMoE.key`)."""
        return [str(layer.key) for layer in self._layers]

    @property
    def has_graph(self) -> bool:
        """Whether an expert graph takes part in the selection."""
        return any(_graph_selects(layer) for layer in self._layers)

    @property
    def num_experts_per_tok(self) -> int:
        """K."""
        return self._layers[0].router.config.num_experts_per_tok

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """Records the first forward pass in the block; `taken` gives it."""
        self._found = None
        with ExitStack() as hooks:
            for layer in self._layers:
                if layer.router.token_graph is not None:
                    graph: nn.Module = layer.router.token_graph
                    hooks.callback(graph.register_forward_hook(self._keep_plain(layer)).remove)
            hooks.callback(self._model.register_forward_hook(self._take, with_kwargs=True).remove)
            yield

    def taken(self) -> RoutedPrompts:
        """What `first_pass` has recorded; at most once."""
        found, self._found = self._found, None
        assert found is not None, "no forward pass took place"
        return found

    def _keep_plain(self, layer: SparseMoE) -> Any:
        """A hook of a token graph, whose mixed gate values no one else sees before the expert graph."""

        def keep(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
            if self._found is None:
                self._plain_TE[layer.key] = output[0]

        return keep

    def _take(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._found is not None:
            return  # decoding of the answer
        recorder = self._model.routing
        assert recorder is not None
        ids_BS = kwargs["input_ids"]
        mask_T = recorder.token_mask_T
        real = torch.arange(ids_BS.numel(), device=ids_BS.device) if mask_T is None else mask_T.nonzero()[:, 0]
        outputs = [recorder.outputs[layer.key] for layer in self._layers]
        plain = [self._plain_gate_values(layer) for layer in self._layers]
        selected_TLK = torch.stack([out.indices_TK for out in outputs], dim=1)[real]
        plain_TLE = torch.stack(plain, dim=1)[real]
        # The router's own order: a stable sort, ties to the lower index.
        chosen_TLK = selected_TLK
        if self.has_graph:
            chosen_TLK = torch.sort(plain_TLE, dim=-1, descending=True, stable=True).indices
            chosen_TLK = chosen_TLK[..., : selected_TLK.shape[-1]]
        weights_TLK = torch.stack([out.weights_TK for out in outputs], dim=1)[real]
        scores_TLE = torch.stack([out.scores_TE for out in outputs], dim=1)[real]
        narrow = torch.uint8 if scores_TLE.shape[-1] <= 256 else torch.uint16
        counts_B = torch.bincount(real // ids_BS.shape[1], minlength=ids_BS.shape[0])
        self._plain_TE = {}
        self._found = RoutedPrompts(
            lengths=_numpy(counts_B),
            is_image_T=_numpy(ids_BS.flatten()[real] == self._model.config.image_token_id),
            selected_TLK=_numpy(selected_TLK.to(narrow)),
            plain_TLK=_numpy(chosen_TLK.to(narrow)),
            weights_TLK=_numpy(weights_TLK.half()),
            scores_TLE=_numpy(scores_TLE.half()),
            plain_TLE=_numpy(plain_TLE.half()),
        )

    def _plain_gate_values(self, layer: SparseMoE) -> Tensor:
        """Gate values ``[T, E]`` before the expert graph, after the token graph if there is one."""
        if layer.key in self._plain_TE:
            return self._plain_TE[layer.key]
        assert self._model.routing is not None
        logits_TE = self._model.routing.outputs[layer.key].logits_TE
        return logits_TE.softmax(-1) if layer.router.config.score == "softmax" else logits_TE.sigmoid()


def _graph_selects(layer: SparseMoE) -> bool:
    graph = layer.router.expert_graph
    return graph is not None and graph.is_active and layer.router.config.applies_to != "weights"


def _numpy(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()
