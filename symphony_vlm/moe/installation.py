"""Puts sparse layers into a model: the structure, the record of their decisions, and what saving needs to know.

Weights come later: from a checkpoint, from the dense layers (`upcycle`), or they stay those of the model's own sparse
layers (`native`).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from symphony_vlm.cards.writing import write_model_card
from symphony_vlm.errors import InputError
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_parallel import refuse_shards
from symphony_vlm.moe.feed_forward import Placement, is_native_moe, placements, recognise
from symphony_vlm.moe.layer import SparseMoE
from symphony_vlm.moe.recording import RoutingRecorder
from symphony_vlm.moe.router import make_router

__all__ = [
    "expert_sizes",
    "finish_installation_",
    "install_moe_",
    "language_model_config",
    "layer_from_dense",
    "layer_from_native",
]


def install_moe_(model: PreTrainedModel, config: MoEConfig) -> RoutingRecorder:
    """Replaces the chosen feed-forward layers by sparse ones, in place: the structure that a checkpoint then fills.

    Args:
        model: a causal LM, or a model with ``moe_modules`` (see `feed_forward.placements`).
        config: the settings.

    Returns:
        The recorder of router outputs, also left at ``model.routing``.
    """
    any_native = False
    for place in placements(model, config):
        native = is_native_moe(place.mlp)
        place.replace(layer_from_native(place, config) if native else layer_from_dense(place, config))
        any_native = any_native or native
    if any_native:
        language_model: Any = getattr(model, "moe_modules", {"language": model})["language"]
        # Its class would add a balance loss of routers that it no longer has.
        language_model.config.output_router_logits = False
        language_model.register_forward_pre_hook(_refuse_router_logits, with_kwargs=True)
    return finish_installation_(model, config)


def _refuse_router_logits(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_router_logits"):
        raise InputError(
            "the class's own router logits and balance loss are gone with its routers",
            where="output_router_logits",
            remedy="Leave it out; model.routing.outputs has the logits, and the loss has the router losses in it.",
        )


def finish_installation_(model: PreTrainedModel, config: MoEConfig) -> RoutingRecorder:
    """What follows when the sparse layers are in their places: the recorder, and the settings in what is saved."""
    modules = getattr(model, "moe_modules", None)
    if modules is None:
        model.save_pretrained = SaveWithSparseLayers(model, config)
        recorder = RoutingRecorder.attach(model, config)
    else:
        model.config.moe = config.to_dict()
        in_front = {"vision": modules.get("vision"), "projector": getattr(model, "projector", None)}
        chosen = [part for name, part in in_front.items() if name in config.modules and part is not None]
        recorder = RoutingRecorder.attach(modules["language"], config, chosen)
        modules["language"].routing = recorder
    model.routing = recorder
    return recorder


def layer_from_dense(place: Placement, config: MoEConfig) -> SparseMoE:
    """A sparse layer of the form of a dense one, its weights not yet set; the shared expert is the dense layer itself.

    Raises:
        InputError: the dense layer is of no known form, or cannot be split as the settings ask.
    """
    weight = recognise(place.mlp, place.label).down.weight
    with torch.device(weight.device):
        layer = SparseMoE(
            config,
            layer_index=place.layer,
            module=place.module,
            shared_expert=place.mlp if config.shared_expert else None,
            **expert_sizes(place, config),
        )
    return layer.to(weight.dtype).train(place.mlp.training)


def expert_sizes(place: Placement, config: MoEConfig) -> dict[str, Any]:
    """Form of the experts that take a dense layer's place.

    Raises:
        InputError: the dense layer is of no known form, or cannot be split as the settings ask.
    """
    sizes = recognise(place.mlp, place.label).sizes
    if sizes["intermediate_size"] % config.expert_split:
        raise InputError(
            f"{config.expert_split} does not divide the {sizes['intermediate_size']} hidden values of {place.label}",
            where="moe.expert_split",
        )
    return sizes | {"intermediate_size": sizes["intermediate_size"] // config.expert_split}


def layer_from_native(place: Placement, config: MoEConfig) -> SparseMoE:
    """A sparse layer that holds the experts, the gate and the shared expert of one of transformers' own, not copies."""
    block: Any = place.mlp
    gate, experts = block.gate, block.experts
    with torch.device("meta"):  # the experts are given their weights below; memory for others would be wasted
        layer = SparseMoE(
            config,
            hidden_size=experts.gate_up_proj.shape[2],
            intermediate_size=experts.down_proj.shape[2],
            hidden_act=experts.act_fn,
            layer_index=place.layer,
            shared_expert=getattr(block, "shared_expert", None),
        )
    layer.experts.gate_up_proj, layer.experts.down_proj = experts.gate_up_proj, experts.down_proj
    if layer.shared_expert is not None:
        layer.shared_expert_gate = block.shared_expert_gate
    with torch.device(gate.weight.device):
        layer.router = make_router(config, experts.gate_up_proj.shape[2], layer_name=place.label)
    if gate.weight.device.type != "meta":
        layer.router.reset()
    if gate.weight.dtype != torch.float32:
        gate.weight = nn.Parameter(gate.weight.detach().float(), requires_grad=gate.weight.requires_grad)
    layer.router.gate.weight = gate.weight
    return layer.train(block.training)


def language_model_config(text_config: PreTrainedConfig, config: MoEConfig) -> PreTrainedConfig:
    """The configuration, to be saved, of a causal LM with sparse layers."""
    # A copy: a composite configuration takes over its parts and forgets their attention implementation.
    result = AutoConfig.for_model(
        "symphony_lm", text_config=copy.deepcopy(text_config), moe=config, dtype=text_config.dtype
    )
    result.architectures = ["SymphonyForCausalLM"]
    return result


class SaveWithSparseLayers:
    """``save_pretrained`` of a causal LM that was converted in place.

    Its class writes a configuration that describes the dense model, and whoever loaded that would get new random
    layers. This writes the weights as its class does, and a configuration that says what they are: ``symphony_lm``,
    opened by ``AutoModelForCausalLM`` or ``symphony_vlm.load_language_model``.
    """

    def __init__(self, model: PreTrainedModel, config: MoEConfig) -> None:
        # An object, not a closure: the model that holds it can be copied and pickled with it.
        self._model = model
        self._moe = config

    def __call__(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        """As ``PreTrainedModel.save_pretrained``.

        Raises:
            InputError: `push_to_hub` was given, which would send the dense configuration; or the experts are shared out
                over ranks, and no whole `state_dict` is given.
        """
        if kwargs.get("state_dict") is None:
            refuse_shards(self._model)
        if kwargs.get("push_to_hub"):
            raise InputError(
                "a model converted in place is sent when it is complete",
                where="save_pretrained(push_to_hub=True)",
                remedy="Call model.push_to_hub(name).",
            )
        # Not in the original format: that would take the stacked experts of a Mixtral apart again.
        kwargs["save_original_format"] = False
        type(self._model).save_pretrained(self._model, save_directory, is_main_process, **kwargs)
        if is_main_process:
            config = language_model_config(self._model.config, self._moe)
            config.save_pretrained(save_directory)
            write_model_card(Path(save_directory))
