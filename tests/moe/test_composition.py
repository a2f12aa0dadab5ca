"""Every composition as a whole: it trains, is saved and loaded, and a stranger's router joins in.

docs/routing.md is tested here too: its table of settings, the code of its section on writing a router, its test names.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import symphony_vlm as sv
from symphony_vlm.errors import InputError
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.moe import router as router_module
from symphony_vlm.moe.configuration import PARTS, PRESETS, MoEConfig
from symphony_vlm.moe.recording import sparse_layers
from symphony_vlm.moe.router import Router, make_router, register_router

if TYPE_CHECKING:
    TinyModel = Callable[..., SymphonyVLMForConditionalGeneration]

MakeModel = Callable[..., PreTrainedModel]
MakeIds = Callable[..., Tensor]

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "routing.md").read_text(encoding="utf-8")
COMPOSITIONS: list[dict[str, Any]] = [
    *({"router": name} for name in PRESETS),
    {"router": "xmoe", "expert_graph": "learnable", "cosine_learnable_temperature": True},
    {"router": "similarity_smoe", "expert_graph": "symphony", "token_graph_dim": 4},
    {"router": "attention_smoe", "expert_graph": "fixed", "smooth": "logits"},
]


@pytest.fixture
def registry() -> Iterator[None]:
    """Forgets afterwards what a test has registered."""
    before = [dict(PRESETS), dict(router_module._CLASSES)]
    yield
    for names, old in zip((PRESETS, router_module._CLASSES), before, strict=True):
        names.clear()
        names.update(old)


@torch.no_grad()
def scramble_(model: torch.nn.Module) -> None:
    """Router weights and graphs that no initialisation would reproduce."""
    generator = torch.Generator().manual_seed(0)
    for _, layer in sparse_layers(model):
        for parameter in layer.router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for name, buffer in layer.router.named_buffers():
            if name.endswith("adjacency_EE"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator).softmax(-1))


def check_loading(model: SymphonyVLMForConditionalGeneration, folder: Path) -> SymphonyVLMForConditionalGeneration:
    """Saves, loads in fp32 and in bfloat16, and compares every bit of the routers and of the logits."""
    scramble_(model)
    ids = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    state = model.state_dict()
    for name, value in type(model).from_pretrained(folder, dtype=torch.bfloat16).state_dict().items():
        if ".router." in name:
            assert value.dtype == state[name].dtype and torch.equal(value, state[name]), name
    return loaded


@pytest.mark.parametrize("settings", COMPOSITIONS, ids=lambda s: "-".join(map(str, s.values())))
def test_a_saved_composition_is_loaded_with_every_bit_from_its_configuration_alone(
    tiny_model_factory: TinyModel, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = tiny_model_factory(moe=MoEConfig(**settings))
    loaded = check_loading(model, tmp_path / "some-name")
    assert loaded.config.moe == model.config.moe


@pytest.mark.parametrize("settings", COMPOSITIONS, ids=lambda s: "-".join(map(str, s.values())))
def test_every_part_of_a_composition_is_trained(
    language_model: MakeModel, token_ids: MakeIds, settings: dict[str, Any]
) -> None:
    model = language_model()
    sv.upcycle_(model, MoEConfig(**settings, expert_init_noise=0.5))
    model.train()
    ids = token_ids(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if ".router." in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
            assert parameter.grad.isfinite().all(), name
    before = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("adjacency_EE")}
    sv.update_expert_graphs(model)
    moved = [not torch.equal(before[name], model.state_dict()[name]) for name in before]
    assert all(moved) if model.routing.config.expert_graph == "symphony" else not any(moved)


# Routers of other people.


def code_blocks(section: str) -> list[str]:
    """The Python of one section of the document."""
    text = DOCUMENT.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_documents_router_of_ones_own_works_from_upcycling_to_loading(
    tiny_model_factory: TinyModel, registry: None, tmp_path: Path
) -> None:
    definition, usage = code_blocks("Write your own router")
    assert len([line for line in definition.splitlines() if line.strip()]) <= 25
    namespace: dict[str, Any] = {"__name__": "a_strangers_module"}
    exec(definition, namespace)

    model = tiny_model_factory()
    exec(usage, {**namespace, "language_model": model.language_model})
    assert all(type(layer.router) is namespace["NoisyRouter"] for _, layer in sparse_layers(model.language_model))

    model = tiny_model_factory(moe=MoEConfig(router="noisy_smoe", expert_init_noise=0.5))
    loaded = check_loading(model, tmp_path / "m")
    assert all(type(layer.router) is namespace["NoisyRouter"] for _, layer in sparse_layers(loaded))

    ids = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    loaded.train()
    first, second = (loaded(input_ids=ids, labels=ids).loss for _ in range(2))
    assert first != second  # the noise
    first.backward()
    sv.update_expert_graphs(loaded)
    for _, layer in sparse_layers(loaded):
        assert layer.router.width.grad.abs().max() > 0
        assert int(layer.router.expert_graph.num_updates) == 1
    fresh = make_router(loaded.config.moe_config, 512)
    fresh.reset(torch.Generator().manual_seed(0))
    # 2048 draws: a standard error of 1.6 %; four of them.
    assert float(fresh.width.detach().std()) == pytest.approx(0.02, rel=0.07)


def test_the_documents_controls_work(language_model: MakeModel) -> None:
    (code,) = (block for block in code_blocks("Settings") if "set_expert_graph_" in block)
    model = language_model()
    sv.upcycle_(model, MoEConfig(expert_graph="fixed"))
    exec(code, {"torch": torch, "model": model})
    graphs = [layer.router.expert_graph.adjacency_EE for _, layer in sparse_layers(model)]
    assert torch.equal(*graphs)
    torch.testing.assert_close(graphs[0].sum(1), torch.ones(4))
    assert not torch.allclose(graphs[0], torch.full((4, 4), 0.25), atol=0.05)


def test_a_registered_router_is_a_preset_with_its_parts_and_may_be_registered_again(registry: None) -> None:
    for parts in ({"gate": "cosine"}, {"gate": "linear", "layers": "alternate"}):

        @register_router("mine", **parts)
        class Mine(Router):
            pass

        config = MoEConfig(router="mine")
        assert type(make_router(config, 8)) is Mine
        assert {name: getattr(config, name) for name in PARTS} == {**PARTS, **parts}
    assert type(make_router(MoEConfig(router="smoe"), 8)) is Router


def test_a_router_that_nobody_has_registered_says_how_to_get_it(registry: None) -> None:
    with pytest.raises(InputError, match=r"moe.router: 'mine' is not a router preset.*imported"):
        MoEConfig(router="mine")


@pytest.mark.parametrize(
    ("name", "parts", "words"), [("smoe", {}, "a router of this package"), ("mine", {"gait": "linear"}, "'gait'")]
)
def test_a_registration_that_cannot_be_is_refused(registry: None, name: str, parts: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        register_router(name, **parts)
    assert "mine" not in PRESETS


# The document's tables.


def test_the_table_of_settings_is_complete_with_its_defaults() -> None:
    section = DOCUMENT.split("## Settings\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", section, flags=re.MULTILINE))
    spelled = {True: "true", False: "false", None: "none"}
    expected = {}
    for field in dataclasses.fields(MoEConfig):
        default = field.default
        if field.name in PARTS:
            expected[field.name] = "preset"
        elif isinstance(default, (bool, type(None))):
            expected[field.name] = spelled[default]
        else:
            words = ", ".join(default) if isinstance(default, tuple) else str(default)
            expected[field.name] = f"`{words}`" if isinstance(default, (str, tuple)) else words
    assert rows == expected


def test_the_table_of_presets_names_all_of_them() -> None:
    section = DOCUMENT.split("## Presets\n")[1].split("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", section)) - {"router"} == set(PRESETS)


def test_the_tests_that_the_document_names_exist() -> None:
    named = sorted({f"tests/{name}" for name in re.findall(r"`((?:\w+/)*test_\w+\.py::[^`]+)`", DOCUMENT)})
    variants = DOCUMENT.split("## What is proven\n")[1]
    assert all(f"| `{name}` |" in variants for name in PRESETS) and len(named) >= 15
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *named]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = {line.strip() for line in result.stdout.splitlines() if "::" in line}
    assert set(named) <= found | {name for name in named if any(line.startswith(f"{name}[") for line in found)}
