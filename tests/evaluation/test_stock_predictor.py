"""Models of transformers through the runner: the answers their own processor and `generate` give, in batches too."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

import symphony_vlm as sv
from symphony_vlm.cli import main
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.opening import open_model
from symphony_vlm.evaluation.runner import EvaluationPlan, evaluate
from symphony_vlm.evaluation.stock_predictor import load_stock_model
from symphony_vlm.evaluation.task import EvaluationItem
from symphony_vlm.files import write_json

# The tests' folders are no packages.
_spec = importlib.util.spec_from_file_location("stock_models", Path(__file__).with_name("stock_models.py"))
assert _spec is not None and _spec.loader is not None
stock_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stock_models)

NEW_TOKENS = 6
QUESTIONS = (
    "What color is the circle?",
    "yes?",
    "How many shapes are there in it?",
    "a",
    "no no no",
    "Is it small? yes or no",
)
_generator = np.random.default_rng(0)
PICTURES = [_generator.integers(0, 255, size, dtype=np.uint8) for size in ((40, 28, 3), (32, 32, 3), (20, 60, 3))]
FEATURES = ([0], [1], None, [2], [0, 1], [0])
"""Which pictures belong to each question."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A saved model by its ``model_type``, written when first asked for; tests only read it."""
    base = tmp_path_factory.mktemp("stock")

    def folder(name: str) -> Path:
        path = base / name
        return path if path.is_dir() else stock_models.STOCK_MODELS[name](path)

    return folder


def _items() -> list[EvaluationItem]:
    return [EvaluationItem(id=f"q{i}", question=question, answers=("x",)) for i, question in enumerate(QUESTIONS)]


def _answers(folder: Path, batch_size: int) -> list[str]:
    predictor = open_model(str(folder)).predictor(batch_size=batch_size, max_new_tokens=NEW_TOKENS)
    encoded = predictor.encode_images(PICTURES)
    return predictor.answer(_items(), [None if use is None else [encoded[i] for i in use] for use in FEATURES])


@torch.no_grad()
def _direct_answers(folder: Path) -> list[str]:
    """One question at a time, prompt as text first, as the models' pages show it."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    answers = []
    for question, use in zip(QUESTIONS, FEATURES, strict=True):
        content = [{"type": "image"} for _ in use or ()] + [{"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        images = [Image.fromarray(PICTURES[i]) for i in use or ()]
        inputs = processor(text=[text], images=[images] if images else None, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=1.0)
        new = ids[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize("name", stock_models.STOCK_MODELS)
def test_answers_are_those_of_processor_and_generate_in_batches_of_1_and_4(
    folders: Callable[[str], Path], name: str
) -> None:
    """Bit-equal in fp32: greedy tokens of unlike random weights leave no near ties at this size."""
    folder = folders(name)
    expected = _direct_answers(folder)
    assert len(set(expected)) >= 4  # the model does listen to its questions
    assert _answers(folder, 1) == expected
    assert _answers(folder, 4) == expected
    assert open_model(str(folder)).router == name


def test_a_picture_changes_the_answer(folders: Callable[[str], Path]) -> None:
    predictor = open_model(str(folders("llava"))).predictor(batch_size=4, max_new_tokens=NEW_TOKENS)
    item = _items()[0]
    answers = predictor.answer([item] * 3, [[picture] for picture in PICTURES])
    assert len(set(answers)) == 3


# Whole evaluations.


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two test pictures with eight questions each."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    generate_scenes(folder, train=1, test=2)
    return folder


def _records(output: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "predictions" / name).read_text().splitlines()]


def _evaluate(model: Path, scenes: Path, output: Path, **changes: Any) -> list[dict[str, Any]]:
    settings = {"tasks": ("scenes",), "data": scenes, "corruptions": ("gaussian_noise",), "severities": (5,)}
    plan = EvaluationPlan(model=str(model), max_new_tokens=4, **(settings | changes))
    evaluate(plan, output, console=Console(quiet=True))
    results: list[dict[str, Any]] = json.loads((output / "results.json").read_text())["results"]
    return results


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_run_has_clean_and_corrupted_cells_and_says_which_model(
    folders: Callable[[str], Path], scenes: Path, tmp_path: Path, name: str
) -> None:
    rows = _evaluate(folders(name), scenes, tmp_path / "out")
    assert {row["router"] for row in rows} == {name}
    assert {(row["corruption"], row["severity"]) for row in rows} == {("none", 0), ("gaussian_noise", 5)}
    assert all(row["n_errors"] == 0 and row["value"] is not None for row in rows)
    clean = _records(tmp_path / "out", "scenes.none.0.jsonl")
    noisy = _records(tmp_path / "out", "scenes.gaussian_noise.5.jsonl")
    assert [record["item_id"] for record in clean] == [record["item_id"] for record in noisy]
    changed = [a["prediction"] != b["prediction"] for a, b in zip(clean, noisy, strict=True)]
    assert sum(changed) >= 4  # the noise reaches the model
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert summary["provenance"]["model_sha256"] == manifest["model_sha256"] is not None


def test_a_run_goes_on_where_it_stopped_and_refuses_other_weights(
    folders: Callable[[str], Path], scenes: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(folders("llava"), model)
    _evaluate(model, scenes, tmp_path / "out")
    name = "scenes.gaussian_noise.5.jsonl"
    path = tmp_path / "out" / "predictions" / name
    whole = path.read_bytes()
    before = {record["item_id"]: record["prediction"] for record in _records(tmp_path / "out", name)}
    path.write_bytes(whole[: len(whole) // 2])
    _evaluate(model, scenes, tmp_path / "out")
    assert {record["item_id"]: record["prediction"] for record in _records(tmp_path / "out", name)} == before
    weights = load_file(model / "model.safetensors")
    weights[next(name for name in weights if "projector" in name)] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="differs in model_sha256"):
        _evaluate(model, scenes, tmp_path / "out")


def test_questions_without_a_picture_are_answered_beside_those_with_one(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    Image.fromarray(PICTURES[0]).save(tmp_path / "a.png")
    records = [
        {"id": "with", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nyes?"}]},
        {"id": "without", "conversations": [{"from": "human", "value": "yes?"}]},
    ]
    for record in records:
        record["conversations"].append({"from": "gpt", "value": "no"})  # type: ignore[attr-defined]
    write_json(tmp_path / "data.json", records)
    rows = _evaluate(
        folders("qwen2_vl"), tmp_path / "data.json", tmp_path / "out", tasks=("short_answer",), corruptions=()
    )
    assert (rows[0]["n_items"], rows[0]["n_errors"]) == (2, 0)
    answered = _records(tmp_path / "out", "short_answer.none.0.jsonl")
    found = {record["item_id"]: record["prediction"] for record in answered}
    assert len(found) == 2 and found["with"] != found["without"]


def test_the_command_takes_a_stock_model(
    folders: Callable[[str], Path], scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(folders("llava")), "--task", "scenes", "--data", str(scenes), "--limit", "8"]
    with pytest.raises(SystemExit) as stop:
        main(["eval", *arguments, "--output", str(tmp_path / "out"), "--json"])
    assert not stop.value.code
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n_errors"] == 0
    assert (tmp_path / "out" / "report.html").is_file()


def test_an_exported_model_answers_as_the_model_it_was_made_from(
    tiny_model_factory: Any, scenes: Path, tmp_path: Path
) -> None:
    """The whole chain in fp32: prompt, pixels, weights. The logits differ by 1e-6, the texts do not."""
    model = tiny_model_factory(moe=sv.MoEConfig(num_experts=4, router="symphony_smoe", smooth="logits"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.copy_(0.25 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(tmp_path / "ours")
    model.processor.save_pretrained(tmp_path / "ours")
    sv.export(model, tmp_path / "stock")
    ours = _evaluate(tmp_path / "ours", scenes, tmp_path / "out_ours")
    stock = _evaluate(tmp_path / "stock", scenes, tmp_path / "out_stock")
    assert (ours[0]["router"], stock[0]["router"]) == ("symphony_smoe", "llava")
    for name in ("scenes.none.0.jsonl", "scenes.gaussian_noise.5.jsonl"):
        found = [
            [(record["item_id"], record["pixels_sha256"], record["prediction"]) for record in _records(output, name)]
            for output in (tmp_path / "out_ours", tmp_path / "out_stock")
        ]
        assert found[0] == found[1]
        assert len({prediction for _, _, prediction in found[0]}) > 4


# What cannot be evaluated.


def _edit(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    write_json(path, json.loads(path.read_text()) | values)


def _without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _blind_template(folder: Path) -> None:
    template = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)


def _deaf_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("<image> answer:")


def _template_that_raises(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only text') }}")


def _own_code(folder: Path) -> None:
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForImageTextToText": "modeling_own.OwnModel"}
    _edit(folder, "config.json", model_type="own_model", auto_map=code)
    (folder / "configuration_own.py").write_text("raise SystemExit('this code must not run')\n")


def _unknown_type(folder: Path) -> None:
    _edit(folder, "config.json", model_type="no_such_model")


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _incomplete(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "projector" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _other_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    _edit(folder, "config.json", text_config=config["text_config"] | {"intermediate_size": 40})


def _without_processor(folder: Path) -> None:
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_without_template, "the processor has no chat template"),
        (_blind_template, "the chat template leaves out the image"),
        (_deaf_template, "the chat template leaves out the question"),
        (_template_that_raises, "does not take an image and a question.*only text"),
        (_own_code, "comes with Python code of its own, which is never run"),
        (_unknown_type, "no_such_model"),
        (_pickled, "safetensors"),
        (_incomplete, "1 weights of the model are missing in the checkpoint .*projector"),
        (_other_sizes, "mismatch"),
        (_without_processor, "processor"),
    ],
)
def test_a_model_that_cannot_be_asked_is_refused_by_name(
    folders: Callable[[str], Path], tmp_path: Path, damage: Callable[[Path], None], complaint: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders("llava"), folder)
    damage(folder)
    with pytest.raises(InputError, match=complaint) as caught:
        open_model(str(folder)).predictor(batch_size=1, max_new_tokens=1)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_language_model_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(vocab_size=64, **stock_models.TEXT)).save_pretrained(tmp_path / "llama")
    with pytest.raises(InputError, match="is no image-text model of transformers"):
        load_stock_model(str(tmp_path / "llama"))


def test_a_hub_name_that_is_not_here_is_one_line_offline() -> None:
    with pytest.raises(InputError, match="no-such-owner/no-such-model") as caught:
        open_model("no-such-owner/no-such-model")
    assert "\n" not in str(caught.value)


def test_what_a_checkpoint_says_of_decoding_is_not_taken_over(folders: Callable[[str], Path]) -> None:
    """Its end tokens are, and the tokenizer's beside them."""
    model, processor = load_stock_model(str(folders("llava")))
    settings = model.generation_config
    assert (settings.do_sample, settings.temperature, settings.repetition_penalty) == (False, None, None)
    assert settings.eos_token_id == [processor.tokenizer.eos_token_id]


def test_an_image_reference_is_opened_by_the_runner_alone(folders: Callable[[str], Path]) -> None:
    """A predictor sees corrupted pixels and never the file: an item's own reference plays no part."""
    predictor = open_model(str(folders("llava"))).predictor(batch_size=1, max_new_tokens=NEW_TOKENS)
    missing = ImageRef(path=Path("missing.png"), name="missing.png")
    item = EvaluationItem(id="q", question=QUESTIONS[0], answers=("x",), images=(missing,), image_key="k")
    assert predictor.answer([item], [[PICTURES[0]]]) == predictor.answer(_items()[:1], [[PICTURES[0]]])
