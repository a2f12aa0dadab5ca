"""Token graphs: a token's routing listens to related tokens (Graph of Tokens, arXiv 2505.00792).

Shape letters: B batch, S tokens of this pass, L tokens of the past and this pass, T = B * S, H attention heads,
D hidden size, R rank, E experts.

With gate values g(u_j) of the tokens, r_i = sum_j S_ij g(u_j). Gate values, not logits, are what the paper mixes: r_i
is the choice of expert of a token that is i with probability S_ii and else one of those it resembles. In a language
model j runs over what token i may see: itself and earlier tokens of its document, no padding. The attention layer
before the sparse one is called with exactly that knowledge, and with the KV cache, so a hook on it is all the
plumbing there is; that also holds when activation checkpointing runs the layer a second time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from symphony_vlm.errors import InputError
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.documents import Documents, window_mask
from symphony_vlm.moe.precision import KeepsPrecision

__all__ = [
    "AttentionCall",
    "AttentionGraph",
    "SimilarityGraph",
    "TokenGraph",
    "connect_token_graphs",
    "make_token_graph",
    "show_probabilities_",
]


@dataclass(frozen=True)
class AttentionCall:
    """What an attention layer was called with, and the probabilities that it computed."""

    shape: tuple[int, int]
    """(B, S)."""
    attention_mask: Tensor | None = None
    """As transformers passes it: None (causal), ``[B, L]`` padding, or ``[B, 1, S, L]``, bool or additive."""
    position_ids: Tensor | None = None
    """``[B or 1, S]``; where they start again, a packed document begins."""
    cache: Cache | None = None
    probabilities_BHSL: Tensor | None = None
    documents: Documents | None = None
    """Of a packed batch."""
    sliding_window: int | None = None

    def within_document(self, length: int, device: torch.device) -> AttentionCall:
        """The same call as if a document of that length had been alone."""
        return AttentionCall(shape=(1, length), attention_mask=window_mask(length, self.sliding_window, device))


class TokenGraph(KeepsPrecision):
    """A graph of the tokens: what its two kinds have in common. Its arithmetic is in fp32.

    Args:
        config: the token graph's settings.
        layer_name: names the layer in error messages.
    """

    def __init__(self, config: MoEConfig, layer_name: str) -> None:
        super().__init__()
        self.config = config
        self.layer_name = layer_name
        self.cache_index: int | None = None
        """Index of this graph's layer in the KV cache, after those of the attention layers."""
        self.call: AttentionCall | None = None
        """The attention layer's last call; each serves one routing and is then dropped, so that none can be stale."""

    def forward(self, x_TD: Tensor, *values_TE: Tensor) -> tuple[Tensor, ...]:
        """Mixes gate values over the tokens: r_i = sum_j S_ij g(u_j), each ``[T, E] -> [T, E]``.

        Raises:
            RuntimeError: nobody said which tokens form a sequence, or the KV cache is another model's.
            InputError: the KV cache cannot hold gate values, or attention gives no probabilities.
        """
        call, self.call = self.call, None
        if call is None or call.shape[0] * call.shape[1] != len(x_TD):
            raise RuntimeError(
                f"{self.layer_name}: a router with token_graph: {self.config.token_graph} must know which tokens form "
                "a sequence. It hears that from the attention layer before it: run the language model, not the sparse "
                "layer alone."
            )
        if call.documents is not None and call.probabilities_BHSL is None:
            # One after the other: over the whole row the graph would be mostly zeros.
            pieces = zip(*(part.split(call.documents.lengths) for part in (x_TD, *values_TE)), strict=True)
            mixed = [self._mix(call.within_document(len(piece[0]), x_TD.device), *piece) for piece in pieces]
            return tuple(torch.cat(parts) for parts in zip(*mixed, strict=True))
        return self._mix(call, x_TD, *values_TE)

    def _mix(self, call: AttentionCall, x_TD: Tensor, *values_TE: Tensor) -> tuple[Tensor, ...]:
        x_BSD = x_TD.float().view(*call.shape, -1)
        new = [self.keys(x_BSD), *(values.view(*call.shape, -1) for values in values_TE)]
        keys_BLR, *values_BLE = new if call.cache is None else self._with_past(call.cache, new)
        weights_BSL = self.weights(x_BSD, keys_BLR, call)
        # With sliding-window attention the last tokens alone are seen.
        last = slice(-weights_BSL.shape[-1], None)
        return tuple((weights_BSL @ values_BLE[:, last]).flatten(0, 1) for values_BLE in values_BLE)

    def keys(self, x_BSD: Tensor) -> Tensor:
        """What later tokens must know of these ones besides their gate values: ``[B, S, R]``."""
        return x_BSD[..., :0]

    def weights(self, x_BSD: Tensor, keys_BLR: Tensor, call: AttentionCall) -> Tensor:
        """S ``[B, S, L]`` in fp32, whose rows sum to 1. L may be less than the keys' for a sliding window."""
        raise NotImplementedError

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Initialises what no checkpoint provided."""

    def after_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the attention layer whose call this graph listens to."""
        hidden_BSD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.call = AttentionCall(
            shape=(hidden_BSD.shape[0], hidden_BSD.shape[1]),
            attention_mask=kwargs.get("attention_mask"),
            position_ids=kwargs.get("position_ids"),
            # GPTBigCode and GPT-Neo still use the old name.
            cache=kwargs.get("past_key_values", kwargs.get("layer_past")),
            probabilities_BHSL=output[1] if isinstance(output, tuple) and len(output) > 1 else None,
            documents=kwargs.get("documents"),
            # As the families' attention layers themselves look for it.
            sliding_window=getattr(
                module, "sliding_window", getattr(getattr(module, "config", None), "sliding_window", None)
            ),
        )

    def _with_past(self, cache: Cache, new: list[Tensor]) -> list[Tensor]:
        """Adds this pass to the KV cache and returns past and present, ``[B, S, n] -> [B, L, n]``.

        A layer of the cache itself follows beam search, cropping and batch selection without a word from us.
        """
        assert self.cache_index is not None
        if any(isinstance(layer, StaticLayer) for layer in cache.layers):
            raise InputError(
                f"{type(cache).__name__} cannot hold the earlier tokens' gate values, which token_graph: "
                f"{self.config.token_graph} needs",
                where="cache",
                remedy="Use a cache that grows (cache_implementation='dynamic', the default), or use_cache=False.",
            )
        while len(cache.layers) <= self.cache_index:
            cache.layers.append(DynamicLayer())
        joined_B1Sn = torch.cat(new, dim=-1)[:, None]
        joined_B1Ln, _ = cache.update(joined_B1Sn, joined_B1Sn[..., :0], self.cache_index)
        if joined_B1Ln.shape[2] != cache.get_seq_length():
            raise RuntimeError(
                f"{self.layer_name}: the KV cache holds {cache.get_seq_length()} tokens but gate values of "
                f"{joined_B1Ln.shape[2]}; it was filled by a model without this router"
            )
        return list(joined_B1Ln[:, 0].split([part.shape[-1] for part in new], dim=-1))


class SimilarityGraph(TokenGraph):
    """S_ij = softmax_j(u_i^T W_s u_j / (D tau)) over what token i may see.

    W_s starts as the identity. After the decoder's normalisation a hidden state has a length of about sqrt(D), which
    is what D in the denominator is for: S starts as a softmax of cosine similarities over tau. With tau = 0.1 a token
    at a right angle counts e^-10 of oneself, one with cosine 0.9 e^-1.

    With ``token_graph_dim: R`` W_s = Q K^T has rank R. Q = K start as R random orthogonal directions, which keep dot
    products right on average.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, layer_name: str) -> None:
        super().__init__(config, layer_name)
        rank = config.token_graph_dim or hidden_size
        if rank > hidden_size:
            raise InputError(f"{rank} must be at most the hidden size ({hidden_size})", where="moe.token_graph_dim")
        self.query = nn.Parameter(torch.empty(hidden_size, rank, dtype=torch.float32))
        self.key = nn.Parameter(torch.empty_like(self.query)) if config.token_graph_dim else None

    def keys(self, x_BSD: Tensor) -> Tensor:
        """The hidden states, seen through K if the rank is limited."""
        return x_BSD if self.key is None else x_BSD @ self.key.float()

    def weights(self, x_BSD: Tensor, keys_BLR: Tensor, call: AttentionCall) -> Tensor:
        """The softmax over the tokens that may be seen."""
        visible_BSL = _visible(call, keys_BLR.shape[1], x_BSD.device)
        keys_BLR = keys_BLR[:, -visible_BSL.shape[-1] :]
        scale = 1 / (x_BSD.shape[-1] * self.config.token_graph_temperature)
        similarity_BSL = scale * (x_BSD @ self.query.float()) @ keys_BLR.transpose(1, 2)
        return similarity_BSL.masked_fill(~visible_BSL, float("-inf")).softmax(-1)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """W_s = I, or its low-rank likeness, unless a checkpoint has already provided it."""
        hidden_size, rank = self.query.shape
        start_DR = torch.eye(hidden_size)
        if self.key is not None:
            directions_DR = torch.linalg.qr(torch.randn(hidden_size, rank, generator=generator, device="cpu")).Q
            start_DR = directions_DR * (hidden_size / rank) ** 0.5
        for weight in (self.query, self.key):
            if weight is not None and not getattr(weight, "_is_hf_initialized", False):
                weight.copy_(start_DR)


class AttentionGraph(TokenGraph):
    """S is the matrix of the attention layer before, averaged over its heads. It has no weights of its own."""

    def weights(self, x_BSD: Tensor, keys_BLR: Tensor, call: AttentionCall) -> Tensor:
        """The attention probabilities. Their dropout in training, where a model has any, is part of them."""
        if call.probabilities_BHSL is None:
            raise InputError(
                f"{self.layer_name}: token_graph: attention needs the attention probabilities, which this "
                "implementation of attention does not give out",
                where="attn_implementation",
                remedy="Load the model with attn_implementation='eager'.",
            )
        return call.probabilities_BHSL.float().mean(1)


def make_token_graph(config: MoEConfig, hidden_size: int, layer_name: str) -> TokenGraph | None:
    """The token graph of a composition (setting ``token_graph``)."""
    if config.token_graph == "similarity":
        return SimilarityGraph(config, hidden_size, layer_name)
    return AttentionGraph(config, layer_name) if config.token_graph == "attention" else None


def connect_token_graphs(language_model: PreTrainedModel) -> None:
    """Lets every token graph listen to the attention layer of its decoder layer (``self_attn`` or ``attn``), once.

    Attention graphs need probabilities, which PyTorch's fused attention (``sdpa``, the default of transformers) does
    not give out; such a model is switched to ``eager``. Any other implementation is a choice of the user's and stays.

    Raises:
        InputError: a decoder layer has no attention layer to listen to.
    """
    graphs = [(name, module) for name, module in language_model.named_modules() if isinstance(module, TokenGraph)]
    if not graphs:
        return
    num_layers = language_model.config.get_text_config().num_hidden_layers
    for n, (name, graph) in enumerate(graphs):
        parts = name.split(".")
        parents = (language_model.get_submodule(".".join(parts[:i])) for i in range(len(parts) - 1, -1, -1))
        attention = next((found for parent in parents if (found := _attention_of(parent)) is not None), None)
        if attention is None:
            raise InputError(
                f"{graph.layer_name} has no self_attn (or attn) whose tokens a token graph could listen to",
                where="moe.token_graph",
                remedy="Use token_graph: none there.",
            )
        graph.cache_index = num_layers + n
        attention.register_forward_hook(graph.after_attention, with_kwargs=True)
    for _, graph in graphs:
        show_probabilities_(language_model, graph.config)


def _attention_of(layer: nn.Module) -> nn.Module | None:
    """The attention layer of a decoder layer; GPT's families call it ``attn``."""
    return getattr(layer, "self_attn", None) or getattr(layer, "attn", None)


def show_probabilities_(language_model: PreTrainedModel, config: MoEConfig) -> None:
    """Lets attention give out its probabilities if token graphs are made of them.

    A proof of equal logits switches before it asks the original: to some models (Gemma 2 with its soft cap, in older
    transformers) the two implementations are not the same function.
    """
    if config.token_graph == "attention" and language_model.config._attn_implementation == "sdpa":
        language_model.set_attn_implementation("eager")


def _visible(call: AttentionCall, length: int, device: torch.device) -> Tensor:
    """Whom each token may listen to, bool ``[B or 1, S, L]``: whom it may attend to, and always itself.

    Args:
        call: of the attention layer.
        length: L, which a sliding window shortens.
        device: for a mask that has to be made.
    """
    mask = call.attention_mask
    size = call.shape[1]
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() in (2, 4)):
        raise InputError(
            f"a {type(mask).__name__} as attention mask says nothing to a similarity graph",
            where="attn_implementation",
            remedy="Load the model with attn_implementation='sdpa' or 'eager'.",
        )
    if mask is not None and mask.dim() == 4:
        mask_BSL = mask[:, 0]
        visible_BSL = mask_BSL > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask_BSL.bool()
    else:
        visible_BSL = torch.ones(1, size, length, dtype=torch.bool, device=device).tril(length - size)
        if mask is not None:
            visible_BSL = visible_BSL & mask[:, None, -length:].bool()
        elif call.position_ids is not None and length == size:
            # No mask and positions that start again: packed documents, as transformers reads them too.
            starts_BS = call.position_ids.diff(prepend=call.position_ids[:, :1] - 1) != 1
            document_BS = starts_BS.cumsum(-1)
            visible_BSL = visible_BSL & (document_BS[:, :, None] == document_BS[:, None, :])
    length = visible_BSL.shape[-1]
    # A row of padding sees nobody; a softmax over nobody would be NaN.
    itself_SL = torch.eye(length, dtype=torch.bool, device=visible_BSL.device)[length - size :]
    return visible_BSL | itself_SL
