"""What the vision-language model and the bare language model share: loading, saving, loss, a language model inside."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from symphony_vlm.cards.writing import write_model_card
from symphony_vlm.errors import InputError
from symphony_vlm.model.adapters import Adapters, attach_saved_, merge_adapters_, trained_weights
from symphony_vlm.model.base_model import find_base
from symphony_vlm.model.chunked_loss import DeferredHead, chunked_cross_entropy, needs_chunks
from symphony_vlm.model.loading import adapter_record, local_folder
from symphony_vlm.model.loss import loss_of_step, only_supervised_logits, targets_of, training_loss
from symphony_vlm.moe.expert_parallel import refuse_shards
from symphony_vlm.moe.recording import RoutingRecorder, sparse_layers

__all__ = ["SymphonyOutput", "SymphonyPreTrainedModel", "keep_cache_"]


@dataclass
class SymphonyOutput(ModelOutput):
    """Output of a model.

    `logits` are ``[B, S, V]``, and None in training with labels, where only supervised positions get logits.
    `loss_parts` has the detached parts of the loss by name, see `loss.training_loss`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    loss_parts: dict[str, Tensor] | None = None


def _leave_out_local_paths(config: Path) -> None:
    """Takes from a saved configuration where on this machine its parts were loaded from; hub names stay."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    parts = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    local = [part for part in parts if Path(part.get("_name_or_path") or "").is_absolute()]
    for part in local:
        del part["_name_or_path"]
    if local:
        config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def keep_cache_(model: PreTrainedModel) -> None:
    """Lets a model keep keys and values when it generates.

    transformers' Trainer switches that off in the settings of whatever it trains. Saved, it would make each new token
    read the whole prompt again.
    """
    for settings in (model.config, model.config.get_text_config(), getattr(model, "generation_config", None)):
        if settings is not None:
            settings.use_cache = True


class SymphonyPreTrainedModel(PreTrainedModel):
    """A model around a causal LM (`language_model`) whose feed-forward layers may be mixtures of experts."""

    language_model: PreTrainedModel
    routing: RoutingRecorder | None
    """What the routers of the last forward pass decided; None for a dense model."""
    adapters: Adapters | None = None
    """Adapters that are not merged; such a model is saved without the weights of the model under them."""

    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # Loading in bfloat16 must leave gates and graphs in fp32 (and the graphs' integer counters alone).
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = [
        "router.gate",
        "router.token_graph",
        "router.expert_graph.adjacency_EE",
        "router.expert_graph.logits_EE",
    ]

    def _run_language_model(
        self,
        labels: Tensor | None,
        *,
        ignore_index: int,
        num_items_in_batch: Tensor | int | None,
        **inputs: Any,
    ) -> SymphonyOutput:
        """The language model's output with the training loss, if there are labels."""
        if labels is None:
            return SymphonyOutput(**_known(self.language_model(**inputs)))
        if inputs.get("past_key_values") is None and inputs.get("use_cache") is None:
            inputs["use_cache"] = False  # nothing comes after a loss
        targets_BS = targets_of(labels, ignore_index)
        supervised_BS = targets_BS != ignore_index
        if self.training and needs_chunks(self.language_model, supervised_BS.numel()):
            return self._run_in_chunks(targets_BS, supervised_BS, num_items_in_batch, inputs)
        if self.training:
            with only_supervised_logits(self.get_output_embeddings(), supervised_BS):
                outputs = self.language_model(**inputs)
            logits_NV, targets_N = outputs.logits[0], targets_BS[supervised_BS]
            outputs.logits = None
        else:
            outputs = self.language_model(**inputs)
            logits_NV, targets_N = outputs.logits.flatten(0, 1), targets_BS.flatten()
        loss, parts = training_loss(
            logits_NV, targets_N, self.routing, ignore_index=ignore_index, num_items_in_batch=num_items_in_batch
        )
        return SymphonyOutput(**_known(outputs) | {"loss": loss, "loss_parts": parts})

    def _run_in_chunks(
        self,
        targets_BS: Tensor,
        supervised_BS: Tensor,
        num_items_in_batch: Tensor | int | None,
        inputs: dict[str, Any],
    ) -> SymphonyOutput:
        """The same in training, where the logits of all supervised tokens would be too many at once."""
        head = DeferredHead(self.language_model, supervised_BS)
        with head.deferring():
            outputs = self.language_model(**inputs)
        outputs.logits = None
        summed = chunked_cross_entropy(head, targets_BS[supervised_BS])
        loss, parts = loss_of_step(summed, supervised_BS.sum(), self.routing, num_items_in_batch=num_items_in_batch)
        return SymphonyOutput(**_known(outputs) | {"loss": loss, "loss_parts": parts})

    def _supports_logits_to_keep(self) -> bool:
        """Whether `generate` can ask for the last token's logits alone. Transformers looks for an argument by name."""
        supports: bool = self.language_model._supports_logits_to_keep()
        return supports

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embedding."""
        embedding: nn.Module = self.language_model.get_input_embeddings()
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        head: nn.Module = self.language_model.get_output_embeddings()
        return head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's head."""
        self.language_model.set_output_embeddings(value)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Fills in what no checkpoint provided. Loading builds on the meta device, so nothing may stay raw memory."""
        super().initialize_weights()
        std = getattr(self.config.text_config, "initializer_range", 0.02)
        for _, layer in sparse_layers(self):
            layer.reset(std=std)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but the weights keep their names and shapes; of a model with adapters, what trained.

        A model card is written beside them, unless there is one that a person has edited.

        The library's "original format" takes the stacked experts of a Mixtral apart, and its Trainer cannot put them
        together again when it resumes.

        Raises:
            InputError: the experts are shared out over ranks, and no whole `state_dict` is given.
        """
        if kwargs.get("state_dict") is None:
            refuse_shards(self)
        if self.adapters is not None:
            self.config.adapter = self.adapters.record(Path(save_directory))
            kwargs["state_dict"] = trained_weights(self, kwargs.get("state_dict"))
        super().save_pretrained(save_directory, *args, **kwargs | {"save_original_format": False})
        if args[0] if args else kwargs.get("is_main_process", True):
            _leave_out_local_paths(Path(save_directory) / "config.json")
            write_model_card(Path(save_directory))

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a missing, extra or misshapen weight is an error that names it.

        A graph missing from the checkpoint becomes the identity: that is how a plain router's checkpoint is opened
        with a Symphony router. A folder with adapters is opened with the model they belong to, and merged.
        """
        if (record := adapter_record(name)) is not None:
            opened = cls.with_adapters(name, record, *args, **kwargs)
            merge_adapters_(opened[0] if isinstance(opened, tuple) else opened)
            return opened
        wants_info = kwargs.pop("output_loading_info", False)
        # Transformers' own error for a mismatch names no weight; let it pass there and raise ours below.
        kwargs["ignore_mismatched_sizes"] = True
        model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        missing = sorted(key for key in info["missing_keys"] if ".expert_graph." not in key)
        faults = {"missing": missing, "unexpected": sorted(info["unexpected_keys"])}
        faults["mismatched"] = [
            f"{key}: {tuple(saved)} in the file, {tuple(needed)} in the model"
            for key, saved, needed in sorted(info["mismatched_keys"])
        ]
        problems = [f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in faults.items() if keys]
        if problems:
            raise InputError(
                f"the weights do not fit the configuration: {'; '.join(problems)}",
                where=str(name),
                remedy="Compare config.json with the weights; they must come from one save.",
            )
        _align_memory(model)
        return (model, info) if wants_info else model

    @classmethod
    def with_adapters(cls, name: str | Path, record: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """`from_pretrained` of a folder with adapters, but they are not merged.

        Args:
            name: the folder, or a hub name.
            record: see `loading.adapter_record`.
            args: for `from_pretrained` of the model under them.
            kwargs: likewise.

        Raises:
            InputError: that model is not there, or they do not fit it.
        """
        folder = local_folder(name)
        kwargs.pop("config", None)  # it says what has adapters; the model under them has its own
        opened = cls.from_pretrained(str(find_base(record["base"], folder)), *args, **kwargs)
        attach_saved_(opened[0] if isinstance(opened, tuple) else opened, folder, record)
        return opened


def _known(outputs: Any) -> dict[str, Any]:
    """What `SymphonyOutput` passes on of the language model's output."""
    names = ("logits", "past_key_values", "hidden_states", "attentions")
    return {name: getattr(outputs, name) for name in names}


def _align_memory(model: nn.Module) -> None:
    """Copies CPU weights that safetensors mapped at odd addresses.

    Matrix kernels take other paths there and round differently, so that a loaded model would differ from the saved
    one in the last bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
