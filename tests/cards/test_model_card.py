"""Model cards: what they say, and that a card which somebody has edited is never written over."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import save_file

from symphony_vlm.cards.facts import hub_id, without_paths
from symphony_vlm.cards.writing import CARD, is_edited, keep_edited_card, write_model_card
from symphony_vlm.moe.configuration import MoEConfig

CONFIG = {
    "model_type": "symphony_vlm",
    "moe": MoEConfig(num_experts=8, strength=0.25).to_dict(),
    "num_image_tokens": 16,
    "projector": "mlp2x_gelu",
    "vision_config": {"backend": "open_clip", "architecture": {"vision_cfg": {"layers": 3, "image_size": 64}}},
    "text_config": {
        "_name_or_path": "/home/somebody/secret/model",
        "model_type": "qwen3",
        "num_hidden_layers": 5,
        "hidden_size": 32,
        "vocab_size": 400,
    },
}
TRAINING = {
    "recipe": "my_recipe",
    "stages": [
        {"name": "pretrain", "kind": "multimodal", "rates": {"projector": 1e-3}},
        {"name": "instruct", "kind": "multimodal", "rates": {"projector": 2e-5, "language_model": 1e-5}},
    ],
    "parts": [{"part": "language model", "name": "Qwen/Qwen3-0.6B", "licence": "Apache 2.0"}],
    "log": [
        {"stage": "pretrain", "step": 10, "loss": 2.5},
        {"stage": "instruct", "step": 10, "loss": 1.5},
        {"stage": "instruct", "step": 20, "loss": 1.25},
        {"stage": "instruct", "step": 20, "eval_loss": 1.125},
    ],
    "provenance": {
        "recipe_sha256": "ab" * 32,
        "seed": 7,
        "counts": {"train: /home/somebody/data/mine.json": {"records": 96, "train": 86, "validation": 10, "faults": 1}},
        "data_sha256": {"mine.json": "cd" * 32},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "git": {"commit": "ef" * 20, "dirty": True},
        "hardware": {"device": "a GPU"},
    },
}


def _model(folder: Path, config: dict[str, Any] | None = None, training: dict[str, Any] | None = None) -> Path:
    import numpy as np

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    if training:
        (folder / "training.json").write_text(json.dumps(training))
    save_file({"a": np.zeros((3, 5), np.float32), "b": np.zeros((), np.float32)}, folder / "model.safetensors")
    return folder


def _read(folder: Path) -> tuple[dict[str, Any], str]:
    """Header and text of a card."""
    found = re.match(r"---\n(.*?)\n---\n(.*)", (folder / CARD).read_text(encoding="utf-8"), re.S)
    assert found
    return yaml.safe_load(found.group(1)), found.group(2)


def test_a_card_says_what_the_model_is_and_where_it_comes_from(tmp_path: Path) -> None:
    folder = _model(tmp_path / "model", training=TRAINING)
    assert write_model_card(folder)
    header, text = _read(folder)
    assert header == {
        "library_name": "symphony_vlm",
        "pipeline_tag": "image-text-to-text",
        "base_model": ["Qwen/Qwen3-0.6B"],
        "tags": ["symphony-vlm", "mixture-of-experts", "symphony_smoe"],
    }
    for line in (
        "# my_recipe, stage instruct",
        'model = sv.load("FOLDER_OR_HUB_ID")',
        "| pretrained language model | Qwen/Qwen3-0.6B (Apache 2.0) |",
        "| numbers in the weight files | 16 |",
        "| vision tower | open_clip, 3 layers, pictures of 64 pixels |",
        "| language model | qwen3, layers 5, hidden size 32, vocabulary 400 |",
        "| moe.router | symphony_smoe |",
        "| moe.num_experts | 8 |",
        "| moe.strength | 0.25 |",
        "| pretrain | multimodal | projector 0.001 | 10 | 2.5000 |  |",
        "| instruct | multimodal | projector 2e-05, language_model 1e-05 | 20 | 1.2500 | 1.1250 |",
        "| train: mine.json | 96 | 86 | 10 | 1 |",
        "sha256 of the data: mine.json `cdcdcdcdcdcdcdcd`.",
        "Provenance: recipe `my_recipe` (sha256 `abababababababab`), seed 7, torch 2.13.0, "
        "commit `efefefefefef` with changes, a GPU.",
    ):
        assert line in text.splitlines(), line
    assert "/home" not in (folder / CARD).read_text() and "somebody" not in text


def test_a_router_without_a_graph_has_no_rows_about_one(tmp_path: Path) -> None:
    folder = _model(tmp_path / "model", CONFIG | {"moe": MoEConfig(router="smoe").to_dict()})
    write_model_card(folder)
    assert "moe.router | smoe" in _read(folder)[1] and "moe.strength" not in _read(folder)[1]


@pytest.mark.parametrize(
    ("config", "library", "task", "loader"),
    [
        (
            {"model_type": "symphony_lm", "moe": CONFIG["moe"]},
            "symphony_vlm",
            "text-generation",
            "sv.load_language_model",
        ),
        ({"model_type": "llava"}, "transformers", "image-text-to-text", "AutoModelForImageTextToText"),
        ({"model_type": "mixtral"}, "transformers", "text-generation", "AutoModelForCausalLM"),
    ],
)
def test_every_kind_of_model_is_loaded_as_its_card_says(
    config: dict[str, Any], library: str, task: str, loader: str, tmp_path: Path
) -> None:
    folder = _model(tmp_path / "model", config)
    write_model_card(folder)
    header, text = _read(folder)
    assert (header["library_name"], header["pipeline_tag"]) == (library, task)
    block = text.partition("```python\n")[2].partition("```")[0]
    assert loader in block and len(block.splitlines()) == 3
    compile(block, "card", "exec")


def test_an_encoder_has_a_card_too(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 32}}))
    write_model_card(tmp_path)
    assert _read(tmp_path)[0]["library_name"] == "open_clip"


def test_a_card_is_renewed_until_somebody_edits_it(tmp_path: Path) -> None:
    folder = _model(tmp_path / "model")
    card = folder / CARD
    assert write_model_card(folder)
    before = card.read_text()
    (folder / "training.json").write_text(json.dumps(TRAINING))
    assert write_model_card(folder) and card.read_text() != before
    written = card.read_text()
    edits = {
        "a word": written.replace("For research", "For fun"),
        "the header": written.replace("tags:", "license: mit\ntags:"),
        "something below": written + "\nMy notes.\n",
        "without the seal": re.sub(r"<!-- Written.*\n", "", written),
        "of its own": "# Mine\n",
        "empty": "",
    }
    for name, text in edits.items():
        card.write_text(text)
        assert is_edited(card), name
        assert not write_model_card(folder), name
        assert card.read_text() == text, name
    # Git may change line ends, which is no edit.
    card.write_bytes(written.replace("\n", "\r\n").encode())
    assert not is_edited(card)


def test_an_edited_card_survives_that_its_folder_is_replaced(tmp_path: Path) -> None:
    old, new = _model(tmp_path / "old"), _model(tmp_path / "new")
    write_model_card(old)
    write_model_card(new)
    written = (new / CARD).read_text()
    keep_edited_card(old, new)
    assert (new / CARD).read_text() == written
    (old / CARD).write_text("# Mine\n")
    keep_edited_card(old, new)
    assert (new / CARD).read_text() == "# Mine\n"


def test_a_model_made_of_another_names_it_and_its_licence(tmp_path: Path) -> None:
    source = _model(tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "0a1b", {"model_type": "qwen3"}, TRAINING)
    (source / CARD).write_text("---\nlicense: apache-2.0\n---\n# Qwen\n")
    folder = _model(tmp_path / "moe", {"model_type": "symphony_lm", "moe": CONFIG["moe"]})
    write_model_card(folder, source=source)
    header, text = _read(folder)
    assert header["base_model"] == ["Qwen/Qwen3-0.6B"] and header["license"] == "apache-2.0"
    assert "# my_recipe, stage instruct" in text


@pytest.mark.parametrize("card", ["---\n[unclosed\n---\n", "no header", "---\n- a\n---\n", "---\nlicense: [a]\n---\n"])
def test_a_source_card_that_cannot_be_read_is_no_obstacle(card: str, tmp_path: Path) -> None:
    source = _model(tmp_path / "source")
    (source / CARD).write_text(card)
    folder = _model(tmp_path / "moe")
    assert write_model_card(folder, source=source)
    assert "license" not in _read(folder)[0]


def test_evaluation_results_of_this_model_are_told(tmp_path: Path) -> None:
    folder = _model(tmp_path / "model")
    figure = {"value": 0.5, "ci_low": 0.25, "ci_high": 0.75}
    entry = {"task": "scenes", "metric": "accuracy", "clean": figure, "mean_corrupted": {"value": 0.375}}
    entry |= {"model": str(folder), "retention": {"value": None, "reason": "clean score is 0"}}
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"robustness": {"models": [entry, entry | {"model": "other", "task": "pope"}]}}))
    write_model_card(folder, results=results)
    text = _read(folder)[1]
    assert "| scenes | accuracy | 0.5000 [0.2500, 0.7500] | 0.3750 | clean score is 0 |" in text
    assert "pope" not in text


def test_absolute_paths_become_names_and_addresses_stay() -> None:
    assert without_paths("at /home/me/a b") == "at a b"
    assert without_paths("`/data/x.json`, ~/y/z.json, C:\\data\\w.json") == "`x.json`, z.json, w.json"
    for kept in ("https://arxiv.org/abs/2510.16411", "org/name", "a/b/c", "1 / 2", "and/or", "./relative/file"):
        assert without_paths(kept) == kept


def test_a_hub_id_is_no_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("runs/mine") == "runs/mine"
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert hub_id("runs/mine") is None
    assert hub_id(str(tmp_path)) is None
    assert hub_id("/cache/hub/models--org--a--b/snapshots/12") == "org/a--b"


def test_save_pretrained_writes_a_card_on_the_main_process_alone(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from symphony_vlm import load_language_model, upcycle_

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    upcycle_(model, MoEConfig())
    model.save_pretrained(tmp_path / "upcycled")
    assert _read(tmp_path / "upcycled")[0]["tags"][-1] == "symphony_smoe"
    opened = load_language_model(tmp_path / "upcycled", device="cpu")
    opened.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / CARD).read_text() == (tmp_path / "upcycled" / CARD).read_text()
    opened.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / CARD).exists()
