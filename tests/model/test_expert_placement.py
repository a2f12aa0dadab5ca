"""Experts in the projector and the vision tower: equal logits, losses, graphs, saving, as in the decoder."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

import symphony_vlm as sv
from symphony_vlm.errors import InputError
from symphony_vlm.model.configuration import SymphonyVLMConfig
from symphony_vlm.model.vision import VisionConfig
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import expert_graphs
from symphony_vlm.moe.losses import load_balancing_loss
from symphony_vlm.moe.proof import MAX_LOGIT_DIFFERENCE
from symphony_vlm.moe.recording import sparse_layers

IMAGE_SIZE, PATCH_SIZE, IMAGE_ID = 16, 8, 3
NUM_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2

_HUGGING_FACE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_SIZES = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
TOWERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "open_clip": (
        "open_clip",
        {"embed_dim": 16, "vision_cfg": {**_SIZES, "width": 16, "layers": 2, "head_width": 8, "mlp_ratio": 2.0}},
    ),
    "open_clip quick_gelu": (
        "open_clip",
        {"embed_dim": 16, "vision_cfg": {**_SIZES, "width": 16, "layers": 2, "head_width": 8}, "quick_gelu": True},
    ),
    "timm": (
        "open_clip",
        {
            "embed_dim": 16,
            "vision_cfg": {
                "timm_model_name": "test_vit",
                "timm_model_pretrained": False,
                "timm_pool": "",
                "image_size": 160,
            },
        },
    ),
    "clip": ("transformers", {"model_type": "clip_vision_model", **_HUGGING_FACE, **_SIZES}),
    "siglip": ("transformers", {"model_type": "siglip_vision_model", **_HUGGING_FACE, **_SIZES}),
}
PLACEMENTS = [
    placement
    for size in (1, 2, 3)
    for placement in itertools.combinations(("language", "projector", "vision"), size)
    if placement != ("language",)
]


def build(tower: str = "open_clip", *, seed: int = 0) -> SymphonyVLMForConditionalGeneration:
    """A dense model whose weights and biases are large enough for every layer to matter."""
    backend, architecture = TOWERS[tower]
    image_size = architecture.get("vision_cfg", architecture)["image_size"]
    vision = VisionConfig(backend=backend, architecture=architecture, image_size=image_size, feature_layer=-1)
    text = AutoConfig.for_model(
        "qwen3",
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=160,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = SymphonyVLMConfig(vision_config=vision.to_dict(), text_config=text, image_token_id=IMAGE_ID)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SymphonyVLMForConditionalGeneration(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2 or (name.endswith("bias") and "norm" not in name and "ln_" not in name):
                    parameter.normal_(0.0, 0.2)
    model.config.num_image_tokens = model.vision_tower.num_tokens
    return model.eval()


def batch_of(model: SymphonyVLMForConditionalGeneration, rows: int = 3, *, images: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    text = torch.randint(4, 48, (rows, 8), generator=generator)
    if not images:
        return {"input_ids": text, "labels": text}
    picture = torch.full((rows, model.config.num_image_tokens), IMAGE_ID)
    ids = torch.cat([text[:, :3], picture, text[:, 3:]], dim=1)
    size = model.vision_tower.config.image_size
    pixels = torch.randn(rows, 3, size, size, generator=generator)
    return {"input_ids": ids, "labels": ids.masked_fill(ids == IMAGE_ID, -100), "pixel_values": pixels}


@torch.no_grad()
def logits_of(model: SymphonyVLMForConditionalGeneration, batch: dict[str, Any]) -> Tensor:
    logits: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return logits


@pytest.mark.parametrize("modules", PLACEMENTS, ids="+".join)
@pytest.mark.parametrize("tower", TOWERS)
def test_logits_do_not_change_wherever_the_experts_are(tower: str, modules: tuple[Any, ...]) -> None:
    model = build(tower)
    batch = batch_of(model)
    before = logits_of(model, batch)
    model.upcycle_(MoEConfig(modules=modules))
    placed = {name.split(".")[0] for name, _ in sparse_layers(model)}
    assert placed == {{"vision": "vision_tower", "language": "language_model"}.get(name, name) for name in modules}
    assert before.std() > 0.1
    allowed = MAX_LOGIT_DIFFERENCE * max(1.0, float(before.abs().max()))
    assert (logits_of(model, batch) - before).abs().max() <= allowed


@pytest.mark.parametrize("router", ["smoe", "xmoe", "symphony_glam", "symphony_xmoe"])
@pytest.mark.parametrize("options", [{}, {"shared_expert": True}, {"expert_split": 2}], ids=str)
def test_other_routers_and_options_are_exact_there_too(router: str, options: dict[str, Any]) -> None:
    model = build()
    batch = batch_of(model)
    before = logits_of(model, batch)
    sv.upcycle_(model, MoEConfig(modules=("projector", "vision"), router=router, **options))
    allowed = MAX_LOGIT_DIFFERENCE * max(1.0, float(before.abs().max()))
    assert (logits_of(model, batch) - before).abs().max() <= allowed


@pytest.mark.parametrize("where", ["projector", "vision_tower.visual.transformer.resblocks.1.mlp"])
def test_experts_there_matter(where: str) -> None:
    """Guards the tests above: other experts give other logits."""
    model = build()
    model.upcycle_(MoEConfig(modules=("projector", "vision")))
    batch = batch_of(model)
    before = logits_of(model, batch)
    with torch.no_grad():
        model.get_submodule(where).experts.down_proj.zero_()
    assert (logits_of(model, batch) - before).abs().max() > 0.01


def everywhere(**settings: Any) -> SymphonyVLMForConditionalGeneration:
    model = build()
    model.upcycle_(MoEConfig(modules=("language", "projector", "vision"), momentum=0.5, **settings))
    return model


KEYS = [0, 1, "projector.0", "vision.0", "vision.1"]


def test_the_losses_of_every_module_reach_the_total() -> None:
    model = everywhere().train()
    batch = batch_of(model)
    out = model(**batch)
    routing = model.routing
    assert routing is not None and sorted(routing.outputs, key=str) == KEYS
    assert {f"balance/{key}" for key in KEYS} <= set(out.loss_parts)
    for key in KEYS[2:]:
        routed = routing.outputs[key]
        assert len(routed.indices_TK) >= 3 * NUM_TOKENS
        expected = load_balancing_loss(logits_TE=routed.logits_TE, indices_TK=routed.indices_TK)
        torch.testing.assert_close(out.loss_parts[f"balance/{key}"], expected)
    mean = torch.stack([out.loss_parts[f"balance/{key}"] for key in KEYS]).mean()
    torch.testing.assert_close(out.loss_parts["balance"], mean)
    torch.testing.assert_close(out.loss, out.loss_parts["cross_entropy"] + out.loss_parts["router"])
    # The losses alone must move every gate.
    routing.losses()["balance"].backward()
    for name, parameter in model.named_parameters():
        if name.endswith("router.gate.weight"):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_graphs_and_statistics_of_every_module_move_with_one_update() -> None:
    model = everywhere().train()
    model(**batch_of(model)).loss.backward()
    sv.update_expert_graphs(model)
    graphs = [graph for _, graph in expert_graphs(model)]
    assert len(graphs) == 5
    assert all(int(graph.num_updates) == 1 for graph in graphs)
    assert not any(torch.equal(graph.adjacency_EE, torch.eye(4)) for graph in graphs)
    assert model.routing is not None
    statistics = model.routing.statistics.read()
    assert sorted(statistics, key=str) == KEYS
    assert statistics["projector.0"]["tokens"] == 3 * NUM_TOKENS


def test_a_batch_without_images_does_not_find_the_record_of_the_one_before() -> None:
    model = everywhere().train()
    model(**batch_of(model))
    out = model(**batch_of(model, images=False))
    assert model.routing is not None and sorted(model.routing.outputs) == [0, 1]
    assert "balance/projector.0" not in out.loss_parts


def test_without_images_and_without_sparse_decoder_layers_nothing_is_routed() -> None:
    model = build()
    model.upcycle_(MoEConfig(modules=("projector",)))
    model.train()
    out = model(**batch_of(model, images=False))
    assert float(out.loss_parts["balance"]) == 0.0
    torch.testing.assert_close(out.loss, out.loss_parts["cross_entropy"])


def test_frozen_modules_are_neither_trained_nor_counted() -> None:
    """Stage 1 of LLaVA trains the projector alone."""
    model = everywhere()
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    model.train()
    model(**batch_of(model)).loss.backward()
    sv.update_expert_graphs(model)
    assert {name.split(".")[0] for name, graph in expert_graphs(model) if int(graph.num_updates)} == {"projector"}


def test_padding_is_left_out_in_the_decoder_alone() -> None:
    model = everywhere()
    batch = batch_of(model)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, -2:] = 0
    losses = model(**batch, attention_mask=mask).loss_parts
    assert model.routing is not None
    for key, routed in model.routing.outputs.items():
        token_mask = mask.flatten().bool() if isinstance(key, int) else None
        expected = load_balancing_loss(
            logits_TE=routed.logits_TE, indices_TK=routed.indices_TK, token_mask_T=token_mask
        )
        torch.testing.assert_close(losses[f"balance/{key}"], expected)


@pytest.mark.parametrize("modules", [("projector",), ("vision",), ("language", "projector", "vision")], ids="+".join)
def test_saving_and_opening_gives_the_same_bits(tmp_path: Path, modules: tuple[Any, ...]) -> None:
    model = build()
    model.upcycle_(MoEConfig(modules=modules, shared_expert=True, router="symphony_xmoe", expert_init_noise=0.1))
    model.train()
    batch = batch_of(model)
    model(**batch)
    sv.update_expert_graphs(model)
    model.eval()
    model.save_pretrained(tmp_path / "a")
    opened = SymphonyVLMForConditionalGeneration.from_pretrained(tmp_path / "a")
    assert torch.equal(logits_of(opened, batch), logits_of(model, batch))
    assert opened.config.moe == model.config.moe


def test_it_works_in_sixteen_bits_and_generates() -> None:
    model = everywhere().bfloat16()
    batch = batch_of(model)
    del batch["labels"]
    answer = model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert answer.shape[1] == batch["input_ids"].shape[1] + 3
    for _, layer in sparse_layers(model):
        assert layer.router.gate.weight.dtype == torch.float32
        assert layer.experts.down_proj.dtype == torch.bfloat16


def test_gates_of_all_modules_start_apart() -> None:
    gates = [layer.router.gate.weight for _, layer in sparse_layers(everywhere())]
    assert len(gates) == 5
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(gates, 2))


def test_alternate_layers_are_chosen_among_the_blocks_of_the_tower_too() -> None:
    model = build()
    model.upcycle_(MoEConfig(modules=("language", "vision"), layers="alternate"))
    assert [layer.key for _, layer in sparse_layers(model)] == ["vision.0", 0]


def test_a_tower_without_transformer_blocks_or_a_linear_projector_is_refused() -> None:
    model = build()
    config = model.config.to_dict() | {"projector": "linear"}
    linear = SymphonyVLMForConditionalGeneration(SymphonyVLMConfig.from_dict(config))
    with pytest.raises(InputError, match="projector has a Linear"):
        linear.upcycle_(MoEConfig(modules=("projector",)))
    resnet = {"embed_dim": 16, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}}
    vision = VisionConfig(backend="open_clip", architecture=resnet, image_size=64).to_dict()
    convolutional = SymphonyVLMForConditionalGeneration(
        SymphonyVLMConfig.from_dict(model.config.to_dict() | {"vision_config": vision})
    )
    with pytest.raises(InputError, match="OpenClipTower has 0 lists of layers"):
        convolutional.upcycle_(MoEConfig(modules=("vision",)))


def test_a_mixtral_inside_a_vision_language_model_is_taken_over(tmp_path: Path) -> None:
    model = build()
    text = model.config.text_config.to_dict() | {"model_type": "mixtral", "num_local_experts": 4}
    vlm = SymphonyVLMForConditionalGeneration(
        SymphonyVLMConfig.from_dict(model.config.to_dict() | {"text_config": text})
    ).eval()
    batch = batch_of(vlm)
    before = logits_of(vlm, batch)
    sv.symphonize_(vlm)
    torch.testing.assert_close(logits_of(vlm, batch), before, atol=1e-5, rtol=1e-5)
    assert {"balance/0", "balance/1"} <= set(vlm(**batch).loss_parts)
    vlm.save_pretrained(tmp_path)
    opened = SymphonyVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits_of(opened, batch), logits_of(vlm, batch))
