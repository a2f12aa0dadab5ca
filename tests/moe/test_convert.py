"""Upcycling a folder: the same bits as in memory, in little memory, proven, or nothing at all; and its command."""

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
from transformers import AutoModelForCausalLM, PreTrainedModel

import symphony_vlm as sv
from symphony_vlm import cli
from symphony_vlm.config.loading import load_moe_settings
from symphony_vlm.errors import InputError
from symphony_vlm.moe import convert
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.convert import upcycle_checkpoint
from symphony_vlm.moe.proof import MAX_LOGIT_DIFFERENCE

MakeModel = Callable[..., PreTrainedModel]
MakeIds = Callable[..., Tensor]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def check_equal_folders(one: Path, other: Path) -> None:
    weights, expected = weights_of(one), weights_of(other)
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        assert weights[name].dtype == tensor.dtype and torch.equal(weights[name], tensor), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "starcoder2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"router": "symphony_xmoe"},
        {"expert_init_noise": 0.1, "layers": "alternate"},
        {"shared_expert": True, "expert_split": 2},
    ],
    ids=["xmoe", "noise", "shared and split"],
)
def test_a_folder_becomes_what_upcycling_in_memory_would_have_saved(
    language_model: MakeModel, token_ids: MakeIds, family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = language_model(family, tie_word_embeddings=family == "gemma2")
    model.save_pretrained(tmp_path / "dense")
    config = MoEConfig(**settings)
    difference = upcycle_checkpoint(tmp_path / "dense", tmp_path / "sparse", config, seed=5)

    in_memory = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    sv.upcycle_(in_memory, config, seed=5)
    in_memory.save_pretrained(tmp_path / "expected")
    check_equal_folders(tmp_path / "sparse", tmp_path / "expected")

    opened = sv.load_language_model(tmp_path / "sparse")
    with torch.no_grad():
        before, after = (m(input_ids=token_ids(2, 9)).logits for m in (model, opened))
    largest = float((after - before).abs().max())
    allowed = MAX_LOGIT_DIFFERENCE * max(1.0, float(before.abs().max()))
    if config.expert_init_noise:
        assert min(largest, difference) > 1e-3
    else:
        assert max(largest, difference) <= allowed


@pytest.mark.parametrize("modules", [("language",), ("language", "projector", "vision")], ids="+".join)
def test_a_vision_language_model_stays_one(tiny_model: Any, modules: tuple[Any, ...], tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "dense")
    tiny_model.processor.save_pretrained(tmp_path / "dense")
    config = MoEConfig(modules=modules)
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "sparse", config)
    tiny_model.upcycle_(config)
    tiny_model.save_pretrained(tmp_path / "expected")
    weights, expected = weights_of(tmp_path / "sparse"), weights_of(tmp_path / "expected")
    assert set(weights) == set(expected) and all(torch.equal(weights[name], expected[name]) for name in expected)
    assert sv.load(tmp_path / "sparse").chat("What color is it?", max_new_tokens=3) is not None


def test_sixteen_bits_stay_sixteen_bits_and_the_proof_is_in_thirty_two(
    language_model: MakeModel, tmp_path: Path
) -> None:
    language_model().bfloat16().save_pretrained(tmp_path / "dense")
    difference = upcycle_checkpoint(tmp_path / "dense", tmp_path / "sparse", MoEConfig())
    # What 8 bits of mantissa would hide.
    assert difference < 1e-4
    weights = weights_of(tmp_path / "sparse")
    assert {tensor.dtype for name, tensor in weights.items() if "router" not in name} == {torch.bfloat16}
    assert weights["model.layers.0.mlp.router.gate.weight"].dtype == torch.float32
    assert sv.load_language_model(tmp_path / "sparse").dtype == torch.bfloat16


def test_small_shards_are_listed_in_an_index(language_model: MakeModel, tmp_path: Path) -> None:
    language_model().save_pretrained(tmp_path / "dense", max_shard_size="2KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 3
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "sparse", MoEConfig(), max_shard_bytes=5000)
    files = sorted(path.name for path in (tmp_path / "sparse").glob("*.safetensors"))
    index = json.loads((tmp_path / "sparse" / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    weights = weights_of(tmp_path / "sparse")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in weights.values())
    # No file is larger than asked, but for one that holds a single larger tensor.
    for file in files:
        tensors = load_file(tmp_path / "sparse" / file).values()
        assert sum(t.numel() * t.element_size() for t in tensors) <= 5000 or len(tensors) == 1


def test_the_files_beside_the_weights_come_along(language_model: MakeModel, tmp_path: Path) -> None:
    source = tmp_path / "dense"
    language_model().save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE", "pytorch_model.bin"):
        (source / name).write_text(name)
    upcycle_checkpoint(source, tmp_path / "sparse", MoEConfig())
    found = {path.name for path in (tmp_path / "sparse").iterdir()}
    expected = {"tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE", "generation_config.json"}
    assert found == expected | {"config.json", "model.safetensors", "README.md"}


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    real = convert.fill_

    def spoiled(sparse: Any, *arguments: Any) -> None:
        real(sparse, *arguments)
        sparse.experts.down_proj.data *= 1.01

    monkeypatch.setattr(convert, "fill_", spoiled)


def test_if_the_proof_fails_nothing_is_left(
    language_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    language_model().save_pretrained(tmp_path / "dense")
    spoil(monkeypatch)
    with pytest.raises(RuntimeError, match="upcycling changed the logits by"):
        upcycle_checkpoint(tmp_path / "dense", tmp_path / "sparse", MoEConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_an_output_with_something_in_it_is_refused(language_model: MakeModel, tmp_path: Path) -> None:
    language_model().save_pretrained(tmp_path / "dense")
    (tmp_path / "sparse").mkdir()
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "sparse", MoEConfig())  # an empty one is as good as none
    with pytest.raises(InputError, match="not empty"):
        upcycle_checkpoint(tmp_path / "dense", tmp_path / "sparse", MoEConfig())


@pytest.mark.parametrize("fault", ["missing", "unexpected"])
def test_weights_that_do_not_fit_are_named(language_model: MakeModel, tmp_path: Path, fault: str) -> None:
    language_model().save_pretrained(tmp_path / "dense")
    weights = weights_of(tmp_path / "dense")
    name = "model.layers.1.mlp.up_proj.weight" if fault == "missing" else "model.layers.1.mlp.side_proj.weight"
    if fault == "missing":
        del weights[name]
    else:
        weights[name] = torch.zeros(2)
    save_file(weights, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"1 {fault}.*{name}"):
        upcycle_checkpoint(tmp_path / "dense", tmp_path / "sparse", MoEConfig())
    assert not (tmp_path / "sparse").exists()


def test_other_folders_are_refused_with_a_remedy(language_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        upcycle_checkpoint(tmp_path / "empty", tmp_path / "sparse", MoEConfig())
    language_model().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors").rename(tmp_path / "dense" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no model\.safetensors.*save_pretrained"):
        upcycle_checkpoint(tmp_path / "dense", tmp_path / "sparse", MoEConfig())
    language_model("mixtral").save_pretrained(tmp_path / "native")
    with pytest.raises(InputError, match="mixture of experts already"):
        upcycle_checkpoint(tmp_path / "native", tmp_path / "sparse", MoEConfig())


MEMORY_PROBE = """
import gc, json, resource, sys
from pathlib import Path
import symphony_vlm, torch
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.convert import upcycle_checkpoint

seen = []

def report(text):
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seen.append((text, peak, sum(storages.values())))

source, output = map(Path, sys.argv[1:])
upcycle_checkpoint(source, output, MoEConfig(num_experts=4), max_shard_bytes=2**24, report=report)
print(json.dumps(seen))
"""


def test_it_holds_one_layer_and_one_shard_at_a_time(language_model: MakeModel, tmp_path: Path) -> None:
    """24 layers of 3.1 MB become 24 of 12.6 MB, 302 MB together, in shards of 17 MB."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24, "head_dim": 64}
    language_model(**sizes).save_pretrained(tmp_path / "dense")
    command = [sys.executable, "-c", MEMORY_PROBE, str(tmp_path / "dense"), str(tmp_path / "sparse")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    peaks = {text: peak for text, peak, _ in seen}
    size = sum(path.stat().st_size for path in (tmp_path / "sparse").glob("*.safetensors"))
    assert size > 300e6
    # Needed on top of what the dense model's logits had needed: a layer, a shard, the shard as bytes, 47 MB.
    # Twice that leaves room for the allocator, and is less than a third of the model.
    growth = peaks["logits of the upcycled model"] - peaks["decoder layer 0 (1 of 24)"]
    assert growth < 95e6
    # When either model is opened for its logits nothing of the other is left: a few constants and one logit tensor.
    assert [text for text, _, live in seen if live > 5e6 and text.startswith("logits")] == []
    # While writing: no more than the layer before, the one to come and a shard.
    assert max(live for _, _, live in seen) < 50e6


# The command.


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out.splitlines(), said.err


@pytest.fixture
def dense_folder(language_model: MakeModel, tmp_path: Path) -> Path:
    language_model().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_the_command_writes_a_model_and_prints_the_difference(
    dense_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "moe.yaml"
    settings.write_text("num_experts: 4\nrouter: symphony_xmoe\n")
    output = tmp_path / "sparse"
    arguments = ["upcycle", "--model", str(dense_folder), "--config", str(settings), "--output", str(output)]
    code, out, _ = call(capsys, *arguments, "--seed", "3", "--json", "num_experts=6")
    assert code == 0
    summary = json.loads(out[-1])
    assert set(summary) == {"max_logit_difference", "output"} and summary["output"] == str(output)
    assert 0 <= summary["max_logit_difference"] < 1e-4
    model = sv.load_language_model(output)
    assert (model.config.moe["num_experts"], model.config.moe["router"]) == (6, "symphony_xmoe")

    code, _, err = call(capsys, *arguments)
    assert code == 2 and "not empty" in err and len(err.splitlines()) == 1


def test_the_command_fails_with_code_1_if_the_proof_does(
    dense_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    arguments = ["--model", str(dense_folder), "--config", "quickstart", "--output", str(tmp_path / "sparse")]
    code, _, err = call(capsys, "upcycle", *arguments)
    assert code == 1 and "upcycling changed the logits by" in err
    assert not (tmp_path / "sparse").exists()


def test_settings_come_from_a_recipe_or_from_a_file_of_their_own(tmp_path: Path) -> None:
    assert load_moe_settings("quickstart").layers == "alternate"
    assert load_moe_settings("quickstart", ["model.moe.num_experts=8"]).num_experts == 8
    file = tmp_path / "moe.yaml"
    file.write_text("moe: {num_experts: 8, modules: [language, vision]}\n")
    assert load_moe_settings(str(file), ["moe.strength=0.25"]) == MoEConfig(
        num_experts=8, modules=("language", "vision"), strength=0.25
    )
    file.write_text("num_expert: 8\n")
    with pytest.raises(InputError, match="did you mean 'num_experts'"):
        load_moe_settings(str(file))
    file.write_text("- a list\n")
    with pytest.raises(InputError, match="are a mapping"):
        load_moe_settings(str(file))
