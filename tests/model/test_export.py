"""Exported checkpoints: opened by transformers alone, in a process that cannot import this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    LlavaForConditionalGeneration,
    MixtralForCausalLM,
    PreTrainedModel,
)

import symphony_vlm as sv
from symphony_vlm import cli
from symphony_vlm.errors import InputError
from symphony_vlm.model import stock_text
from symphony_vlm.model.configuration import SymphonyVLMConfig
from symphony_vlm.model.image_processor import SymphonyImageProcessor
from symphony_vlm.model.processor import SymphonyVLMProcessor
from symphony_vlm.model.vision import VisionConfig
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import expert_graphs
from symphony_vlm.moe.proof import MAX_LOGIT_DIFFERENCE
from symphony_vlm.moe.recording import sparse_layers

VOCAB_SIZE, IMAGE_ID, IMAGE_SIZE, PATCH_SIZE = 48, 3, 16, 8
NEW_TOKENS = 12
SYMPHONY: dict[str, Any] = {"router": "symphony_smoe", "smooth": "logits", "num_experts": 4}
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    # No end: every generation has all its tokens.
    "eos_token_id": None,
    "pad_token_id": 0,
}
NATIVE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12},
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 8, "head_dim": 8, "mlp_only_layers": [1]},
    "olmoe": {"num_experts": 4, "norm_topk_prob": True},
}


def as_trained(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Weights, gates and graphs large enough to matter, and no two experts alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 or (name.endswith("bias") and "norm" not in name and "ln_" not in name):
                weight.copy_((1.0 if "router" in name else 0.25) * torch.randn(weight.shape, generator=generator))
        for _, graph in expert_graphs(model):
            if graph.config.expert_graph != "learnable":
                rows = torch.rand(graph.adjacency_EE.shape, generator=generator)
                graph.adjacency_EE.copy_(rows / rows.sum(1, keepdim=True))
    return model.eval()


def dense(family: str = "llama", **settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | settings))).eval()


def upcycled(family: str = "llama", moe: dict[str, Any] | None = None, **settings: Any) -> PreTrainedModel:
    model = dense(family, **settings)
    sv.upcycle_(model, MoEConfig(**(SYMPHONY | (moe or {}))))
    return as_trained(model)


def taken_over(family: str, moe: dict[str, Any] | None = None) -> PreTrainedModel:
    model = dense(family, num_experts_per_tok=2, **NATIVE[family])
    sv.symphonize_(model, MoEConfig(smooth="logits", **(moe or {})))
    return as_trained(model)


_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
_IMAGE = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
_VIT = {**_IMAGE, "width": 16, "layers": 3, "head_width": 8, "mlp_ratio": 2.0}
TOWERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "clip": ("transformers", {"model_type": "clip_vision_model", **_TOWER, **_IMAGE}),
    "siglip": ("transformers", {"model_type": "siglip_vision_model", **_TOWER, **_IMAGE}),
    "open_clip": ("open_clip", {"embed_dim": 16, "vision_cfg": _VIT}),
    "quick_gelu": ("open_clip", {"embed_dim": 16, "vision_cfg": _VIT, "quick_gelu": True}),
    "resnet": (
        "open_clip",
        {"embed_dim": 16, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}},
    ),
    "layer_scale": ("open_clip", {"embed_dim": 16, "vision_cfg": {**_VIT, "ls_init_value": 0.1}}),
}


def vlm(
    tower: str = "clip",
    moe: dict[str, Any] | None = SYMPHONY,
    *,
    family: str = "qwen3",
    projector: Any = "mlp2x_gelu",
    text: dict[str, Any] | None = None,
    **vision: Any,
) -> SymphonyVLMForConditionalGeneration:
    backend, architecture = TOWERS[tower]
    image_size = architecture.get("vision_cfg", architecture)["image_size"]
    vision_config = VisionConfig(backend=backend, architecture=architecture, image_size=image_size, **vision)
    settings = SIZES | NATIVE.get(family, {}) | (text or {})
    if family in NATIVE:
        settings["num_experts_per_tok"] = 2
    config = SymphonyVLMConfig(
        vision_config=vision_config.to_dict(),
        text_config=AutoConfig.for_model(family, **settings),
        image_token_id=IMAGE_ID,
        projector=projector,
    )
    model = SymphonyVLMForConditionalGeneration(config).eval()
    model.config.num_image_tokens = model.vision_tower.num_tokens
    if moe is not None:
        (sv.symphonize_ if family in NATIVE else sv.upcycle_)(model, MoEConfig(**(SYMPHONY | moe)))
    return as_trained(model)


ROUND_TRIPS: dict[str, Any] = {
    "MixtralForCausalLM": {
        "llama": lambda: upcycled("llama"),
        "llama, a plain router": lambda: upcycled("llama", {"router": "smoe", "smooth": "probs"}),
        "llama, the graph in training alone": lambda: upcycled("llama", {"active": "train", "smooth": "probs"}),
        "llama, the graph afterwards alone": lambda: upcycled("llama", {"active": "eval"}),
        "llama, learnable graph": lambda: upcycled("llama", {"expert_graph": "learnable"}),
        "llama, tied": lambda: upcycled("llama", tie_word_embeddings=True),
        "llama, halves": lambda: upcycled("llama", {"expert_split": 2, "num_experts": 8, "num_experts_per_tok": 4}),
        "llama, scaled positions": lambda: upcycled(
            "llama",
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
        "llama, other sizes": lambda: upcycled("llama", head_dim=12, hidden_act="gelu", rms_norm_eps=1e-3),
        "mistral": lambda: upcycled("mistral", sliding_window=5),
        "mixtral": lambda: taken_over("mixtral"),
    },
    "Qwen2MoeForCausalLM": {
        "qwen2": lambda: upcycled("qwen2"),
        "qwen2, windows": lambda: upcycled(
            "qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1, tie_word_embeddings=True
        ),
        "qwen2, shared expert in every other layer": lambda: upcycled(
            "qwen2", {"shared_expert": True, "router": "symphony_glam", "renormalize": False}
        ),
        "qwen2_moe": lambda: taken_over("qwen2_moe"),
    },
    "Qwen3MoeForCausalLM": {
        "qwen3": lambda: upcycled("qwen3", head_dim=8),
        "qwen3, every other layer": lambda: upcycled("qwen3", {"layers": "alternate"}, head_dim=8),
        "qwen3, not renormalized, with biases": lambda: upcycled(
            "qwen3", {"renormalize": False, "layers": (1,)}, head_dim=8, attention_bias=True
        ),
        "qwen3, a window in all layers": lambda: upcycled(
            "qwen3", head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=0
        ),
        "qwen3_moe": lambda: taken_over("qwen3_moe"),
        "qwen3_moe, one of its layers": lambda: taken_over("qwen3_moe", {"layers": (2,)}),
    },
    "OlmoeForCausalLM": {"olmoe": lambda: taken_over("olmoe")},
    "LlavaForConditionalGeneration": {
        "clip and llama": lambda: vlm("clip", family="llama", text={"tie_word_embeddings": True}),
        "clip and qwen3, every other layer": lambda: vlm("clip", {"layers": "alternate"}, text={"head_dim": 8}),
        "clip with its class token": lambda: vlm("clip", feature_select="cls_patch", feature_layer=-1),
        "clip and qwen2": lambda: vlm("clip", family="qwen2"),
        "clip and mixtral": lambda: vlm("clip", family="mixtral"),
        "clip and a dense llama": lambda: vlm("clip", None, family="llama"),
        "siglip": lambda: vlm("siglip", feature_layer=-1),
        "open_clip": lambda: vlm("open_clip"),
        "open_clip, quick_gelu": lambda: vlm("quick_gelu", feature_layer=-1, feature_select="cls_patch"),
    },
}
CASES = [(name, case) for name, cases in ROUND_TRIPS.items() for case in cases]

WITHOUT_US = """
import importlib.abc, importlib.util, json, sys
from pathlib import Path

class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "symphony_vlm":
            raise ModuleNotFoundError(name)

assert not any(name.split(".")[0] == "symphony_vlm" for name in sys.modules)
sys.meta_path.insert(0, Without())
try:
    import symphony_vlm
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("symphony_vlm could be imported")

# The models do not need torchvision; one that was built for another torch would stop transformers' import.
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torchvision" else find_spec(name, *rest)
"""

ELSEWHERE = """
import torch
import transformers
from safetensors.torch import load_file, save_file

for folder in sorted(Path(sys.argv[1]).iterdir()):
    model_class = getattr(transformers, json.loads((folder / "stock" / "config.json").read_text())["architectures"][0])
    model = model_class.from_pretrained(folder / "stock").eval()
    inputs = load_file(folder / "inputs.safetensors")
    with torch.no_grad():
        logits = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=int(sys.argv[2]), do_sample=False, use_cache=True)
    assert not any(name.split(".")[0] == "symphony_vlm" for name in sys.modules)
    save_file({"logits": logits, "tokens": tokens}, folder / "found.safetensors")
"""

ANSWER_ELSEWHERE = """
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("stock").eval()
processor = AutoProcessor.from_pretrained("stock")
question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sys.argv[1]}]}]
text = processor.apply_chat_template(question, add_generation_prompt=True)
inputs = processor(images=Image.open("picture.png"), text=text, return_tensors="pt", add_special_tokens=False)
with torch.no_grad():
    tokens = model.generate(**inputs, max_new_tokens=int(sys.argv[2]), do_sample=False)
print(json.dumps({"model": type(model).__name__, "prompt": inputs["input_ids"].tolist(), "tokens": tokens.tolist()}))
"""


def elsewhere(script: str, folder: Path, *arguments: str) -> str:
    """What a script prints in a folder where this package cannot be imported."""
    command = [sys.executable, "-I", "-c", WITHOUT_US + script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def inputs_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Text, with a picture in it for a vision-language model; two rows."""
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(4, VOCAB_SIZE, (2, 14), generator=generator)
    if not isinstance(model, SymphonyVLMForConditionalGeneration):
        return {"input_ids": text, "attention_mask": torch.ones_like(text)}
    picture = torch.full((2, model.config.num_image_tokens), IMAGE_ID)
    ids = torch.cat([text[:, :3], picture, text[:, 3:]], dim=1)
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@torch.no_grad()
def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**inputs).logits
    return logits


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case exported here, and opened, run and asked to generate elsewhere."""
    root = tmp_path_factory.mktemp("exported")
    results: dict[str, Any] = {}
    for number, (architecture, case) in enumerate(CASES):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            model = ROUND_TRIPS[architecture][case]()
        folder = root / f"{number:02d}"
        folder.mkdir()
        inputs = inputs_of(model)
        save_file(inputs, folder / "inputs.safetensors")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        logits = logits_of(model, inputs)
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        difference = sv.export(model, folder / "stock")
        after = model.state_dict()
        results[case] = {
            "model": model,
            "folder": folder,
            "logits": logits,
            "tokens": tokens,
            "difference": difference,
            "changed": [name for name in before if not torch.equal(before[name], after[name])],
        }
    elsewhere(ELSEWHERE, root, ".", str(NEW_TOKENS))
    return results


@pytest.mark.parametrize(("architecture", "case"), CASES)
def test_transformers_alone_computes_the_same(exported: dict[str, Any], architecture: str, case: str) -> None:
    result = exported[case]
    found = load_file(result["folder"] / "found.safetensors")
    config = json.loads((result["folder"] / "stock" / "config.json").read_text())
    assert config["architectures"] == [architecture]
    # The bound that every conversion here is held to; the difference is of the order of fp32's last bit.
    allowed = MAX_LOGIT_DIFFERENCE * max(1.0, float(result["logits"].abs().max()))
    assert (found["logits"] - result["logits"]).abs().max() <= allowed
    assert result["difference"] <= allowed
    assert result["logits"].std() > 0.1
    # Greedy tokens, here and there with a cache of keys and values.
    assert torch.equal(found["tokens"], result["tokens"])
    assert result["changed"] == []


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe", "olmoe", "clip and llama"])
def test_the_graph_matters_in_these_models(exported: dict[str, Any], case: str) -> None:
    """Guards the test above: an export that forgot the graph would be far off."""
    model = exported[case]["model"]
    inputs = inputs_of(model)
    saved = [graph.adjacency_EE.clone() for _, graph in expert_graphs(model)]
    for _, graph in expert_graphs(model):
        graph.adjacency_EE.copy_(torch.eye(len(graph.adjacency_EE)))
    without = logits_of(model, inputs)
    for (_, graph), adjacency_EE in zip(expert_graphs(model), saved, strict=True):
        graph.adjacency_EE.copy_(adjacency_EE)
    assert (without - exported[case]["logits"]).abs().max() > 0.05


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3, every other layer", "mixtral", "qwen2_moe", "olmoe"])
def test_every_expert_is_restored(exported: dict[str, Any], case: str) -> None:
    """Transformers takes stacked experts apart when it saves them; a probe's tokens would not visit all of them."""
    opened = AutoModelForCausalLM.from_pretrained(exported[case]["folder"] / "stock")
    checked = 0
    for name, layer in sparse_layers(exported[case]["model"]):
        stock: Any = opened.get_submodule(name)
        assert torch.equal(stock.experts.gate_up_proj, layer.experts.gate_up_proj)
        assert torch.equal(stock.experts.down_proj, layer.experts.down_proj)
        assert len({float(expert.detach().sum()) for expert in stock.experts.down_proj}) == layer.experts.num_experts
        checked += 1
    assert checked >= 2


def test_experts_of_llava_are_restored(exported: dict[str, Any]) -> None:
    for case in ("clip and llama", "clip and qwen2", "siglip"):
        opened = LlavaForConditionalGeneration.from_pretrained(exported[case]["folder"] / "stock")
        for index, (_, layer) in enumerate(sparse_layers(exported[case]["model"])):
            stock: Any = opened.model.language_model.layers[index].mlp
            assert torch.equal(stock.experts.gate_up_proj, layer.experts.gate_up_proj)
            assert torch.equal(stock.experts.down_proj, layer.experts.down_proj)


def test_qwen2_without_a_shared_expert_has_one_of_size_nought(exported: dict[str, Any]) -> None:
    config = json.loads((exported["qwen2"]["folder"] / "stock" / "config.json").read_text())
    assert config["shared_expert_intermediate_size"] == 0


def test_a_picture_and_a_question_get_the_same_answer_elsewhere(tmp_path: Path, tiny_model_factory: Any) -> None:
    """From pixels to tokens with transformers' Auto classes and what lies in the folder."""
    model = tiny_model_factory(moe=MoEConfig(**SYMPHONY))
    as_trained(model)
    sv.export(model, tmp_path / "stock")
    pixels = np.random.default_rng(1).integers(0, 256, (40, 28, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    said = elsewhere(ANSWER_ELSEWHERE, tmp_path, "What color is the circle?", str(NEW_TOKENS))
    found = json.loads(said.splitlines()[-1])

    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is the circle?"}]}]
    text = model.processor.apply_chat_template(question, add_generation_prompt=True)
    inputs = model.processor(images=Image.open(tmp_path / "picture.png"), text=text)
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert found["model"] == "LlavaForConditionalGeneration"
    assert found["prompt"] == inputs["input_ids"].tolist()
    assert found["tokens"] == tokens.tolist()
    assert len(set(found["tokens"][0][len(found["prompt"][0]) :])) > 1


# Refusals.

REFUSALS: dict[str, tuple[str, Any]] = {
    "probs smoothing": ("moe.smooth", lambda: upcycled(moe={"smooth": "probs"})),
    "cosine gate": ("moe.gate", lambda: upcycled(moe={"router": "symphony_xmoe"})),
    "cosine gate, no graph": ("moe.gate", lambda: upcycled(moe={"router": "xmoe"})),
    "sigmoid": ("moe.score", lambda: upcycled(moe={"score": "sigmoid"})),
    "similarity graph": ("moe.token_graph", lambda: upcycled(moe={"router": "similarity_smoe"})),
    "attention graph": ("moe.token_graph", lambda: upcycled(moe={"router": "attention_smoe"})),
    "selection": ("moe.applies_to", lambda: upcycled(moe={"applies_to": "selection"})),
    "weights": ("moe.applies_to", lambda: upcycled(moe={"applies_to": "weights"})),
    "mixed layers": ("moe.layers", lambda: upcycled(moe={"router": "symphony_glam"})),
    "listed layers": ("moe.layers", lambda: upcycled("mistral", {"layers": (0, 1)})),
    "not renormalized": ("moe.renormalize", lambda: upcycled(moe={"renormalize": False})),
    "shared expert": ("moe.shared_expert", lambda: upcycled(moe={"shared_expert": True})),
    "shared expert, qwen3": ("moe.shared_expert", lambda: upcycled("qwen3", {"shared_expert": True})),
    "attention biases": ("text_config.attention_bias", lambda: upcycled(attention_bias=True)),
    "feed-forward biases": ("text_config.mlp_bias", lambda: upcycled(mlp_bias=True)),
    "mixed windows": (
        "text_config.max_window_layers",
        lambda: upcycled("qwen3", use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "another family": ("text_config.model_type", lambda: upcycled("phi3")),
    "taken over with probs smoothing": ("moe.smooth", lambda: _taken_over_with_probs()),
    "dense": ("export", lambda: dense()),
    "native, not taken over": ("export", lambda: dense("mixtral", **NATIVE["mixtral"])),
    "linear projector": ("projector", lambda: vlm(projector="linear")),
    "experts in the projector": ("moe.modules", lambda: vlm(moe={"modules": ("language", "projector")})),
    "experts in the tower": ("moe.modules", lambda: vlm(moe={"modules": ("vision",)})),
    "vlm with probs smoothing": ("moe.smooth", lambda: vlm(moe={"smooth": "probs"})),
    "vlm with mixed layers": ("moe.layers", lambda: vlm(moe={"layers": "alternate"}, family="llama")),
    "vlm of another family": ("text_config.model_type", lambda: vlm(moe=None, family="gemma2")),
    "resnet": ("vision_config.architecture.vision_cfg.layers", lambda: vlm("resnet")),
    "layer scale": ("vision_config.architecture.vision_cfg.ls_init_value", lambda: vlm("layer_scale")),
}


def _taken_over_with_probs() -> PreTrainedModel:
    model = dense("mixtral", **NATIVE["mixtral"])
    sv.symphonize_(model, MoEConfig())
    return model


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_expressed_is_refused_by_the_name_of_its_setting(tmp_path: Path, case: str) -> None:
    where, build = REFUSALS[case]
    with pytest.raises(InputError) as caught:
        sv.export(build(), tmp_path / "stock")
    assert caught.value.where == where
    assert caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"format: 'gguf' is not one of transformers"):
        sv.export(upcycled(), tmp_path / "stock", format="gguf")


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        sv.export(upcycled(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_other_weights_than_the_class_has_are_refused(tmp_path: Path) -> None:
    model = upcycled()
    layer: Any = model.get_submodule("model.layers.0.self_attn")
    layer.adapter = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"2 unexpected \(model\.layers\.0\.self_attn\.adapter\.bias"):
        sv.export(model, tmp_path / "stock")


# The proof.


def test_a_wrong_fold_is_noticed_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock_text, "folded_gate", lambda router: router.gate.weight.detach().clone())
    with pytest.raises(RuntimeError, match="exporting changed the logits"):
        sv.export(upcycled(), tmp_path / "stock")
    assert list(tmp_path.iterdir()) == []


def test_an_expert_that_is_not_restored_is_noticed_though_no_token_of_the_probe_chose_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = upcycled()
    for _, layer in sparse_layers(model):
        # The last row of every gate, and so its expert, is far behind the others.
        layer.router.gate.weight.data[-1] = 0.0
        layer.router.expert_graph.adjacency_EE.copy_(torch.eye(4))
        layer.router.gate.weight.data[:-1] *= 10.0
    open_it = MixtralForCausalLM.from_pretrained

    def forgetting(*args: Any, **kwargs: Any) -> Any:
        opened = open_it(*args, **kwargs)
        opened.model.layers[1].mlp.experts.down_proj.data[-1] = 0.0
        return opened

    monkeypatch.setattr(MixtralForCausalLM, "from_pretrained", forgetting)
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.experts\.down_proj is not what was written"):
        sv.export(model, tmp_path / "stock")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["language model", "vision-language model"])
def test_experts_of_a_width_that_transformers_default_kernel_refuses_are_proven_too(tmp_path: Path, kind: str) -> None:
    sizes = {"intermediate_size": 22}
    model = upcycled(**sizes) if kind == "language model" else vlm(family="llama", text=sizes)
    assert sv.export(model, tmp_path / "stock") <= MAX_LOGIT_DIFFERENCE * 10


# Precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["language model", "vision-language model"])
def test_a_model_in_16_bits_is_proven_in_32_and_stays_as_it_was(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    # This cast rounds the rotary tables too, which the opened checkpoint has exact.
    model = (upcycled("qwen3", head_dim=8) if kind == "language model" else vlm(text={"head_dim": 8})).to(dtype)
    before = {name: tensor.clone() for name, tensor in (*model.state_dict().items(), *model.named_buffers())}
    difference = sv.export(model, tmp_path / "stock")
    assert difference <= MAX_LOGIT_DIFFERENCE * 10
    for name, tensor in (*model.state_dict().items(), *model.named_buffers()):
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    stock_class = AutoModelForCausalLM if kind == "language model" else LlavaForConditionalGeneration
    opened = stock_class.from_pretrained(tmp_path / "stock", dtype="auto")
    assert {parameter.dtype for parameter in opened.parameters()} == {dtype}
    # The file keeps the gate in the precision it has here, so whoever opens it in fp32 loses nothing.
    with safe_open(tmp_path / "stock" / "model.safetensors", framework="pt") as file:
        kept = {file.get_slice(name).get_dtype() for name in file.keys() if name.endswith("mlp.gate.weight")}  # noqa: SIM118
    assert kept == {"F32"}


# A saved model, by the command line.


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


def test_the_command_exports_a_saved_language_model_with_its_tokenizer(
    tmp_path: Path, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = upcycled(vocab_size=len(tiny_tokenizer))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    stock = tmp_path / "stock"
    code, out, err = run(capsys, "export", "--model", str(tmp_path / "model"), "--output", str(stock), "--json")
    assert code == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert summary.keys() == {"max_logit_difference", "output"}
    assert summary["max_logit_difference"] <= MAX_LOGIT_DIFFERENCE * 10
    assert summary["output"] == str(stock)
    from transformers import AutoTokenizer

    text = "What color is the circle?"
    assert AutoTokenizer.from_pretrained(stock)(text).input_ids == tiny_tokenizer(text).input_ids
    opened = AutoModelForCausalLM.from_pretrained(stock)
    assert type(opened) is MixtralForCausalLM
    ids = inputs_of(model)
    assert (logits_of(opened, ids) - logits_of(model, ids)).abs().max() <= MAX_LOGIT_DIFFERENCE * 10


def test_the_command_names_the_setting_and_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    upcycled(moe={"smooth": "probs"}).save_pretrained(tmp_path / "model")
    code, _, err = run(capsys, "export", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "stock"))
    assert code == 2
    assert "moe.smooth: 'probs' cannot be folded" in err
    assert not (tmp_path / "stock").exists()


@pytest.mark.parametrize("resize_mode", ["pad", "stretch", "crop"])
def test_the_command_exports_a_vision_language_model_with_its_processor(
    tmp_path: Path, tiny_model_factory: Any, capsys: pytest.CaptureFixture[str], resize_mode: str
) -> None:
    model = tiny_model_factory(moe=MoEConfig(**SYMPHONY))
    model.processor.image_processor.resize_mode = resize_mode
    model.save_pretrained(tmp_path / "model")
    model.processor.save_pretrained(tmp_path / "model")
    code, out, err = run(
        capsys,
        "export",
        "--model",
        str(tmp_path / "model"),
        "--output",
        str(tmp_path / "stock"),
        "--format",
        "transformers",
    )
    assert code == 0, err
    assert "largest difference of the logits" in out
    # Pillow resizes here; transformers' other backend differs from it by up to one grey level.
    processor = AutoProcessor.from_pretrained(tmp_path / "stock", backend="pil")
    generator = np.random.default_rng(0)
    for shape in [(50, 70, 3), (80, 41, 3), (32, 32, 3)]:
        image = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
        text = "<image>\nWhat color is the circle?"
        ours = model.processor(images=image, text=text)
        stock = processor(images=image, text=text, return_tensors="pt")
        assert torch.equal(stock["input_ids"], ours["input_ids"])
        assert torch.equal(stock["pixel_values"], ours["pixel_values"])
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    prompts = [p.apply_chat_template(question, add_generation_prompt=True) for p in (processor, model.processor)]
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    ("tower", "feature_select"),
    [("clip", "patch"), ("clip", "cls_patch"), ("siglip", "patch"), ("siglip", "cls_patch")],
)
def test_the_processor_writes_one_placeholder_per_feature(
    tmp_path: Path, tiny_tokenizer: Any, tower: str, feature_select: str
) -> None:
    model = vlm(tower, feature_select=feature_select)
    images = SymphonyImageProcessor(image_size=IMAGE_SIZE)
    count = model.config.num_image_tokens
    model.processor = SymphonyVLMProcessor(images, tiny_tokenizer, num_image_tokens=count, template="compact")
    sv.export(model, tmp_path / "stock")
    processor = AutoProcessor.from_pretrained(tmp_path / "stock", backend="pil")
    picture = Image.new("RGB", (20, 30))
    ids = processor(images=picture, text="<image>", return_tensors="pt")["input_ids"]
    assert (
        (ids == processor.image_token_id).sum()
        == count
        == (4 if (tower, feature_select) != ("clip", "cls_patch") else 5)
    )


def test_llava_does_not_answer_with_the_placeholder_either(exported: dict[str, Any]) -> None:
    settings = json.loads((exported["open_clip"]["folder"] / "stock" / "generation_config.json").read_text())
    assert settings["suppress_tokens"] == [IMAGE_ID]


def test_exporting_into_an_empty_folder_works(tmp_path: Path) -> None:
    sv.export(upcycled(), tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
