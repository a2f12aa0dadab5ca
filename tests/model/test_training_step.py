"""The loss and one training step: every tower with every language model, dense and with experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, CLIPVisionConfig, SiglipVisionConfig

import symphony_vlm as sv
from symphony_vlm.model.configuration import SymphonyVLMConfig
from symphony_vlm.model.loss import targets_of, training_loss
from symphony_vlm.model.vision import VisionConfig, build_vision_tower
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration as Model
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import expert_graphs

MakeModel = Callable[..., Model]

IMAGE_TOKEN_ID, VOCAB_SIZE, SIZE = 3, 32, 16
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
HUGGING_FACE = {"image_size": SIZE, "patch_size": 8, **SIZES}
TOWERS: dict[str, dict[str, Any]] = {
    "open_clip": {
        "backend": "open_clip",
        "architecture": {
            "embed_dim": 8,
            "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
        },
    },
    "clip": {"backend": "transformers", "architecture": CLIPVisionConfig(**HUGGING_FACE).to_dict()},
    "siglip": {"backend": "transformers", "architecture": SiglipVisionConfig(**HUGGING_FACE).to_dict()},
}
ROUTERS = {"dense": None, "symphony_smoe": MoEConfig(router="symphony_smoe")}


def build(tower: str, family: str, moe: MoEConfig | None, projector: Any = "mlp2x_gelu") -> Model:
    vision = VisionConfig(image_size=SIZE, **TOWERS[tower])
    text = AutoConfig.for_model(
        family, vocab_size=VOCAB_SIZE, num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **SIZES,
    )  # fmt: skip
    config = SymphonyVLMConfig(
        vision_config=vision.to_dict(),
        text_config=text,
        projector=projector,
        image_token_id=IMAGE_TOKEN_ID,
        num_image_tokens=build_vision_tower(vision).num_tokens,
    )
    torch.manual_seed(0)
    model = Model(config)
    if moe is not None:
        model.upcycle_(moe)
    return model.train()


def batch_of(model: Model, *, seed: int = 0) -> dict[str, Tensor]:
    """Two rows: one with an image, one of text alone, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    image = [model.config.image_token_id] * model.config.num_image_tokens
    words = torch.randint(4, VOCAB_SIZE, (2, len(image) + 8), generator=generator).tolist()
    rows = [words[0][:2] + image + words[0][2:8], words[1][:7]]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = ids.masked_fill((mask == 0) | (ids == model.config.image_token_id), -100)
    size = model.vision_tower.config.image_size
    pixels = torch.randn(1, 3, size, size, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tower", TOWERS)
def test_every_pair_of_encoder_and_language_model_trains_a_step(tower: str, family: str, router: str) -> None:
    model = build(tower, family, ROUTERS[router])
    batch = batch_of(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(**batch).loss
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    optimizer.step()
    optimizer.zero_grad()
    sv.update_expert_graphs(model)
    after = model(**batch).loss
    assert after < loss
    for part in ("vision_tower", "projector", "language_model"):
        assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items() if k.startswith(part))
    assert all(int(graph.num_updates) == 1 for _, graph in expert_graphs(model))


def test_the_linear_projector_is_one_matrix() -> None:
    model = build("open_clip", "llama", None, projector="linear")
    assert isinstance(model.projector, torch.nn.Linear)
    assert model(**batch_of(model)).loss.isfinite()


def test_the_logged_total_is_the_cross_entropy_plus_the_weighted_router_losses() -> None:
    config = MoEConfig(router="symphony_smoe", balance_loss_weight=0.5, z_loss_weight=0.25)
    model = build("open_clip", "llama", config)
    batch = batch_of(model)
    out = model(**batch)
    parts = out.loss_parts
    logits = model.eval()(**batch).logits
    reference = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(parts["cross_entropy"], reference)
    torch.testing.assert_close(parts["router"], 0.5 * parts["balance"] + 0.25 * parts["z"])
    torch.testing.assert_close(out.loss, parts["cross_entropy"] + parts["router"])
    for kind in ("balance", "z"):
        torch.testing.assert_close(parts[kind], (parts[f"{kind}/0"] + parts[f"{kind}/1"]) / 2)
    assert not any(part.requires_grad for part in parts.values())


@pytest.mark.parametrize(("name", "part"), [("balance_loss_weight", "balance"), ("z_loss_weight", "z")])
def test_doubling_a_weight_doubles_its_term_in_the_total(name: str, part: str) -> None:
    totals = []
    for weight in (0.0, 1.0, 2.0):
        out = (model := build("open_clip", "llama", MoEConfig(**{name: weight})))(**batch_of(model))
        totals.append(out.loss)
    torch.testing.assert_close(totals[2] - totals[0], 2 * (totals[1] - totals[0]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(totals[1] - totals[0], out.loss_parts[part], atol=1e-5, rtol=1e-5)


def test_image_positions_and_padding_enter_the_router_losses_as_tokens_and_not_at_all() -> None:
    model = build("open_clip", "llama", ROUTERS["symphony_smoe"])
    batch = batch_of(model)
    model(**batch)
    assert model.routing is not None and model.routing.token_mask_T is not None
    assert torch.equal(model.routing.token_mask_T, batch["attention_mask"].flatten().bool())


def test_micro_batches_with_the_steps_token_count_add_up_to_the_whole_batch() -> None:
    """A micro-batch with one supervised token must not weigh like one with ten."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 5, generator=generator)
    labels = torch.randint(0, 5, (3, 6), generator=generator)
    labels[0, :5] = -100
    targets = targets_of(labels, -100)
    whole, _ = training_loss(logits.flatten(0, 1), targets.flatten(), None, ignore_index=-100)
    total = int((labels[:, 1:] != -100).sum())
    pieces = [
        training_loss(logits[i], targets[i], None, ignore_index=-100, num_items_in_batch=total)[0] for i in range(3)
    ]
    torch.testing.assert_close(torch.stack(pieces).sum(), whole)


def test_a_micro_batch_without_supervised_token_costs_nothing_and_is_no_division_by_zero() -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    loss, parts = training_loss(logits, torch.full((4,), -100), None, ignore_index=-100)
    loss.backward()
    assert loss.item() == parts["cross_entropy"].item() == 0.0
    assert logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_of_supervised_positions_alone_give_the_loss_and_gradients_of_all_logits(family: str) -> None:
    """Gemma 2 caps its logits after the head. In evaluation mode all logits are computed, and the loss from them."""
    model = build("open_clip", family, ROUTERS["symphony_smoe"])
    batch = batch_of(model)
    losses, gradients = [], []
    for training in (True, False):
        out = model.train(training)(**batch)
        model.zero_grad()
        out.loss.backward()
        assert (out.logits is None) == training
        losses.append(out.loss.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    # Sums over the same terms in another order: a few units of the last place of numbers around 1.
    torch.testing.assert_close(losses[0], losses[1], atol=2e-6, rtol=0)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=2e-6, rtol=1e-4)


def test_a_training_step_without_any_supervised_token_has_a_loss_of_the_routers_alone() -> None:
    model = build("open_clip", "llama", ROUTERS["symphony_smoe"]).train()
    batch = batch_of(model)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    out = model(**batch)
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), out.loss_parts["router"])


def test_activation_checkpointing_of_the_whole_model_changes_nothing() -> None:
    observed = []
    for checkpointing in (False, True):
        model = build("clip", "qwen3", ROUTERS["symphony_smoe"])
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(**batch_of(model)).loss
        loss.backward()
        sv.update_expert_graphs(model)
        graphs = [graph.adjacency_EE for _, graph in expert_graphs(model)]
        observed.append([loss, *(p.grad for p in model.parameters()), *graphs])
    assert all(torch.equal(a, b) for a, b in zip(*observed, strict=True))


def test_a_sequence_does_not_see_its_right_padding_or_its_neighbours() -> None:
    model = build("open_clip", "llama", ROUTERS["symphony_smoe"]).eval()
    batch = batch_of(model)
    batch.pop("labels")
    together = model(**batch).logits
    length = int(batch["attention_mask"][1].sum())
    alone = model(input_ids=batch["input_ids"][1:, :length]).logits
    # Logits of size 1 by other matrix shapes.
    torch.testing.assert_close(together[1:, :length], alone, atol=1e-5, rtol=1e-5)


def test_a_frozen_tower_stays_in_evaluation_mode_while_the_rest_trains() -> None:
    model = build("clip", "llama", None)
    model.vision_tower.requires_grad_(False)
    model.train()
    assert not model.vision_tower.training and model.language_model.training and model.projector.training


def test_upcycling_twice_is_refused() -> None:
    model = build("open_clip", "llama", MoEConfig())
    with pytest.raises(sv.InputError, match="already has sparse layers"):
        model.upcycle_(MoEConfig())


def test_a_copy_of_the_model_after_a_forward_pass_trains_on_its_own() -> None:
    model = build("open_clip", "llama", ROUTERS["symphony_smoe"])
    batch = batch_of(model)
    model(**batch)
    twin = copy.deepcopy(model)
    assert twin.routing is not None and twin.routing is twin.language_model.routing
    twin(**batch).loss.backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("modules", [("language",), ("projector",)])
@pytest.mark.parametrize("frozen", ["language_model", "vision_tower"])
def test_a_frozen_part_may_be_in_16_bits_beside_one_that_trains_in_fp32(frozen: str, modules: tuple[str, ...]) -> None:
    """As when a pretrained model of 16 bits gets a new projector: upcycling runs it before any autocast."""
    model = build("clip", "llama", None)
    getattr(model, frozen).to(torch.bfloat16).requires_grad_(False)
    before = model.eval()(**batch_of(model)).logits
    model.upcycle_(MoEConfig(num_experts=4, modules=modules))
    after = model.eval()(**batch_of(model)).logits
    # Equal experts; in 16 bits w1 * y + w2 * y may round the other way.
    assert (after - before).abs().max() <= 2**-7 * before.abs().max()
    if frozen == "language_model":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.train()(**batch_of(model)).loss.backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.projector.parameters())
