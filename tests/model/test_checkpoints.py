"""Saving and loading: the same bits under any folder name, and a plain message for weights that do not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from symphony_vlm._imports import torchvision_operators_missing
from symphony_vlm.errors import InputError
from symphony_vlm.model.configuration import SymphonyVLMConfig
from symphony_vlm.model.loading import load, resolve_model_folder
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import expert_graphs

MakeModel = Callable[..., SymphonyVLMForConditionalGeneration]


def inputs_of(model: SymphonyVLMForConditionalGeneration) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = [model.config.image_token_id] * model.config.num_image_tokens
    size = model.vision_tower.config.image_size
    return {
        "input_ids": torch.tensor([[5, *image, 6, 7, 8]]),
        "pixel_values": torch.randn(1, 3, size, size, generator=generator),
    }


@torch.no_grad()
def logits_of(model: SymphonyVLMForConditionalGeneration) -> Tensor:
    logits: Tensor = model.eval()(**inputs_of(model)).logits
    return logits


def save(model: SymphonyVLMForConditionalGeneration, folder: Path) -> Path:
    model.save_pretrained(folder)
    assert model.processor is not None
    model.processor.save_pretrained(folder)
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("moe", [None, MoEConfig(), MoEConfig(router="symphony_glam")], ids=["dense", "moe", "glam"])
def test_a_model_saved_renamed_and_loaded_gives_the_same_bits(
    tiny_model_factory: MakeModel, tmp_path: Path, moe: MoEConfig | None
) -> None:
    model = tiny_model_factory(moe=moe)
    for _, graph in expert_graphs(model):
        # A state that no initialisation would reproduce.
        graph.adjacency_EE.uniform_()
        graph.num_updates.fill_(7)
    before = logits_of(model)
    folder = save(model, tmp_path / "llava-v1.5-7b-lora").rename(tmp_path / "qxzt")
    loaded = load(folder, device="cpu")
    assert torch.equal(logits_of(loaded), before)
    assert set(loaded.state_dict()) == set(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert loaded.config.moe == model.config.moe
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_loaded_tensors_lie_where_freshly_made_ones_do(tiny_model_folder: Path) -> None:
    """Weights mapped from a file at odd addresses take other matrix kernels, with other rounding, than saved ones."""
    model = load(tiny_model_folder, device="cpu")
    assert [name for name, value in model.state_dict().items() if value.data_ptr() % 64] == []


def test_tied_embeddings_stay_tied(tiny_model_factory: MakeModel, tmp_path: Path) -> None:
    dense = tiny_model_factory()
    config = SymphonyVLMConfig(**{**dense.config.to_dict(), "tie_word_embeddings": True})
    config.text_config.tie_word_embeddings = True
    model = SymphonyVLMForConditionalGeneration(config).eval()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    before = logits_of(model)
    model.save_pretrained(tmp_path / "m")
    loaded = SymphonyVLMForConditionalGeneration.from_pretrained(tmp_path / "m")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert torch.equal(logits_of(loaded), before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("projector.0.weight"), "1 missing (projector.0.weight)"),
        (lambda w: w.update({"no.such": torch.zeros(1)}), "1 unexpected (no.such)"),
        (lambda w: w.pop("language_model.model.layers.0.mlp.router.gate.weight"), "mlp.router.gate.weight"),
    ],
    ids=["missing", "extra", "missing gate"],
)
def test_a_missing_or_extra_weight_is_an_error_that_names_it(
    tiny_moe_model: SymphonyVLMForConditionalGeneration, tmp_path: Path, change: Any, words: str
) -> None:
    folder = save(tiny_moe_model, tmp_path / "m")
    change_weights(folder, change)
    with pytest.raises(InputError) as error:
        load(folder)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "name", ["projector.0.weight", "language_model.model.layers.0.mlp.router.expert_graph.adjacency_EE"]
)
def test_a_weight_of_another_shape_is_an_error_that_names_it(
    tiny_moe_model: SymphonyVLMForConditionalGeneration, tmp_path: Path, name: str
) -> None:
    folder = save(tiny_moe_model, tmp_path / "m")
    change_weights(folder, lambda w: w.update({name: torch.zeros(3, 5)}))
    with pytest.raises(InputError) as error:
        load(folder)
    assert name in str(error.value) and "(3, 5)" in str(error.value).replace("[", "(").replace("]", ")")


def test_a_plain_routers_checkpoint_opens_with_a_symphony_router_as_identity(
    tiny_model_factory: MakeModel, tmp_path: Path
) -> None:
    model = tiny_model_factory(moe=MoEConfig(router="smoe"))
    folder = save(model, tmp_path / "m")
    config = SymphonyVLMConfig.from_pretrained(folder)
    config.moe = MoEConfig(router="symphony_smoe").to_dict()
    for _ in range(2):  # memory left over would differ from run to run
        loaded = SymphonyVLMForConditionalGeneration.from_pretrained(folder, config=config)
        graphs = [graph for _, graph in expert_graphs(loaded)]
        assert len(graphs) == 2
        assert all(torch.equal(graph.adjacency_EE, torch.eye(4)) and int(graph.num_updates) == 0 for graph in graphs)
        assert torch.equal(logits_of(loaded), logits_of(model))


def test_loading_in_bfloat16_leaves_routers_and_graphs_in_fp32(
    tiny_moe_model: SymphonyVLMForConditionalGeneration, tmp_path: Path
) -> None:
    for _, graph in expert_graphs(tiny_moe_model):
        graph.adjacency_EE.uniform_()
    folder = save(tiny_moe_model, tmp_path / "m")
    loaded = load(folder, dtype="bfloat16", device="cpu")
    expected = tiny_moe_model.state_dict()
    for name, value in loaded.state_dict().items():
        if ".router." in name:
            assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name
        elif value.is_floating_point():
            assert value.dtype == torch.bfloat16, name
    assert logits_of(loaded).isfinite().all()
    again = load(save(loaded, tmp_path / "again"), device="cpu")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits_of(again), logits_of(loaded))


def test_the_finished_model_of_a_runs_folder_is_found(tiny_model_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(tiny_model_folder, target_is_directory=True)
    assert resolve_model_folder(run) == str(run / "model")
    assert resolve_model_folder("someone/some-model") == "someone/some-model"


def test_a_folder_without_a_model_is_an_error_that_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"no config\.json.*notes\.txt"):
        load(tmp_path)
    with pytest.raises(InputError, match="no such model folder"):
        load(tmp_path / "nowhere")


def test_another_models_folder_is_refused_by_its_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(InputError, match="model_type is 'llava', expected 'symphony_vlm'"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load(tmp_path)


def test_an_unknown_projector_is_refused() -> None:
    with pytest.raises(InputError, match="'mlp3x' is not one of linear, mlp2x_gelu"):
        SymphonyVLMConfig(projector="mlp3x")  # type: ignore[arg-type]


# Beside a torchvision without its compiled operators, transformers can be imported before this package only if somebody
# has declared them; on a healthy install nothing is needed.
DECLARE_OPERATORS = """
import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
IMPORTS = {
    "auto classes first": (
        "import transformers\n"
        "from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor\n"
        "import symphony_vlm"
    ),
    "configuration module first": "import symphony_vlm.model.configuration",
}
OUR_CLASSES = [
    "SymphonyVLMConfig",
    "SymphonyVLMForConditionalGeneration",
    "SymphonyVLMProcessor",
    "SymphonyImageProcessor",
]
USE = """
import sys, torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
folder, inputs, output = sys.argv[1:]
config = AutoConfig.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
image_processor = AutoImageProcessor.from_pretrained(folder)
names = [type(x).__name__ for x in (config, model, processor, image_processor)]
with torch.no_grad():
    logits = model.eval()(**torch.load(inputs)).logits
torch.save({"names": names, "logits": logits, "ids": processor(text="yes no")["input_ids"]}, output)
"""


def test_auto_classes_open_the_folder_with_our_classes(tiny_model_folder: Path) -> None:
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

    auto_classes = (AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoImageProcessor)
    assert [type(auto.from_pretrained(tiny_model_folder)).__name__ for auto in auto_classes] == OUR_CLASSES


@pytest.mark.parametrize("order", IMPORTS)
def test_a_fresh_process_opens_the_folder_with_auto_classes(
    tiny_model_folder: Path, tmp_path: Path, order: str
) -> None:
    before = DECLARE_OPERATORS if order == "auto classes first" and torchvision_operators_missing() else ""
    model = load(tiny_model_folder, device="cpu")
    torch.save(inputs_of(model), tmp_path / "inputs.pt")
    arguments = [str(tiny_model_folder), str(tmp_path / "inputs.pt"), str(tmp_path / "out.pt")]
    result = subprocess.run(
        [sys.executable, "-c", before + IMPORTS[order] + USE, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    out = torch.load(tmp_path / "out.pt")
    assert out["names"] == OUR_CLASSES
    assert torch.equal(out["logits"], logits_of(model))
    assert model.processor is not None
    assert torch.equal(out["ids"], model.processor(text="yes no")["input_ids"])
