"""The contract with lmms-eval: found, built from its argument string, asked its way, answers in its order."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import symphony_vlm as sv
from symphony_vlm.corruptions import at_long_side, corrupt, corruption_rng, image_key
from symphony_vlm.data.sample import ImagePart, Message, TextPart
from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.records import read_records
from symphony_vlm.evaluation.runner import EvaluationPlan, evaluate
from symphony_vlm.integrations import lmms_eval as adapter

INSTALLED = importlib.util.find_spec("lmms_eval") is not None
ROOT = Path(__file__).resolve().parents[2]
NEW_TOKENS = 6
_generator = np.random.default_rng(0)
DOCUMENTS = [
    {
        "question": question,
        "image": Image.fromarray(_generator.integers(0, 255, (20 + 8 * number, 40, 3), dtype=np.uint8)),
        "answer": answer,
        "choices": ["yes", "no", "a small red star", "the circle"],
    }
    for number, (question, answer) in enumerate(
        [
            ("What color is the circle?", "red"),
            ("yes?", "no"),
            ("How many shapes are there in it?", "two"),
            ("a", "a star"),
            ("no no no no", "the circle"),
        ]
    )
]


@pytest.fixture(autouse=True)
def lmms_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one if it is installed, else the stub."""
    if not INSTALLED:
        spec = importlib.util.spec_from_file_location("lmms_stub", Path(__file__).with_name("lmms_eval_stub.py"))
        assert spec is not None and spec.loader is not None
        stub = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "lmms_stub", stub)
        spec.loader.exec_module(stub)
        for name, module in stub.modules().items():
            monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers differ by question and picture."""
    conftest = importlib.util.spec_from_file_location("tiny", ROOT / "tests" / "conftest.py")
    assert conftest is not None and conftest.loader is not None
    tiny = importlib.util.module_from_spec(conftest)
    conftest.loader.exec_module(tiny)
    model = tiny.make_tiny_moe_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.copy_(0.25 * torch.randn(weight.shape, generator=generator))
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    """The same model, opened by our own function."""
    return sv.load(model_folder)


def _build(model_folder: Path, arguments: str = "", batch_size: Any = 4, simple: bool = False) -> Any:
    """As lmms-eval's evaluator does."""
    registry = importlib.import_module("lmms_eval.models.registry_v2").ModelRegistryV2()
    for manifest in registry._coerce_payload_to_manifests(adapter.manifest):
        registry.register_manifest(manifest, overwrite=True)
    model_class = registry.get_model_class("symphony_vlm", simple)
    more = {"batch_size": batch_size, "max_batch_size": None, "device": None}
    found = model_class.create_from_arg_string(f"pretrained={model_folder}{arguments}", more)
    found.task_dict["task"] = {"test": DOCUMENTS}
    return found


def _messages(document: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": document["image"]}, {"type": "text", "text": document["question"]}]
    return [{"role": "user", "content": content}]


def _visuals(document: dict[str, Any]) -> list[Any]:
    return [document["image"]]


def _text_message(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": document["question"]}]}]


def _request(kind: str, *arguments: Any, doc_id: int = 0) -> Any:
    instance = importlib.import_module("lmms_eval.api.instance").Instance
    metadata = {"task": "task", "doc_id": doc_id, "repeats": 1}
    return instance(request_type=kind, arguments=arguments, idx=0, metadata=metadata)


def _ask(doc_id: int, messages: Callable[[dict[str, Any]], list[dict[str, Any]]] = _messages, **generation: Any) -> Any:
    settings = {"max_new_tokens": NEW_TOKENS} | generation
    context = DOCUMENTS[doc_id]["question"]
    return _request("generate_until", context, messages, settings, doc_id, "task", "test", doc_id=doc_id)


def _rank(doc_id: int, continuation: Any) -> Any:
    context = DOCUMENTS[doc_id]["question"]
    return _request("loglikelihood", context, continuation, _visuals, doc_id, "task", "test", doc_id=doc_id)


# Being found.


def test_the_package_names_the_entry_point() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["lmms_eval.models"]["symphony_vlm"].split(":")
    assert getattr(importlib.import_module(module), name) is adapter.manifest
    assert project["optional-dependencies"]["lmms-eval"] == ["lmms_eval>=0.7.2,<0.8"]


def test_the_manifest_names_a_chat_class_that_passes_the_registrys_checks(model_folder: Path) -> None:
    manifest = adapter.manifest()
    assert manifest.model_id == "symphony_vlm"
    assert manifest.chat_class_path == "symphony_vlm.integrations.lmms_eval.SymphonyVLM"
    built = _build(model_folder)
    base = importlib.import_module("lmms_eval.api.model").lmms
    assert isinstance(built, base)
    assert (built.is_simple, built.rank, built.world_size) == (False, 0, 1)
    assert type(built) is adapter.SymphonyVLM
    assert built.device == built._model.device


def test_nothing_imports_lmms_eval_before_it_is_asked_for() -> None:
    script = (
        "import sys; from symphony_vlm.integrations import lmms_eval as a; assert 'lmms_eval' not in sys.modules\n"
        "sys.modules['lmms_eval'] = None\n"
        "try: a.SymphonyVLM\n"
        "except Exception as e: print(type(e).__name__, e)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("InputError SymphonyVLM: lmms-eval cannot be imported")
    assert 'pip install "symphony-vlm[lmms-eval]"' in done.stdout


# Answers.


def test_answers_are_the_models_own_in_the_order_of_the_requests(model_folder: Path, model: Any) -> None:
    expected = [model.chat(d["question"], d["image"], max_new_tokens=NEW_TOKENS) for d in DOCUMENTS]
    assert len(set(expected)) >= 4
    order = [3, 0, 4, 2, 1]
    for batch_size in (1, 2, 4, "8"):
        built = _build(model_folder, batch_size=batch_size)
        assert built.generate_until([_ask(i) for i in order]) == [expected[i] for i in order]


def test_questions_without_a_picture_and_other_settings_share_a_call(model_folder: Path, model: Any) -> None:
    requests = [_ask(0), _ask(1, _text_message), _ask(2, max_new_tokens=2), _ask(3, num_beams=2), _ask(4)]
    answers = _build(model_folder).generate_until(requests)
    chat = lambda i, images=True, **more: model.chat(  # noqa: E731
        DOCUMENTS[i]["question"], DOCUMENTS[i]["image"] if images else None, **({"max_new_tokens": NEW_TOKENS} | more)
    )
    assert answers == [chat(0), chat(1, False), chat(2, max_new_tokens=2), chat(3, num_beams=2), chat(4)]


def test_the_simple_kind_gives_the_same_answers_and_likelihoods(model_folder: Path) -> None:
    """lmms-eval ranks continuations with it alone."""
    chat, simple = _build(model_folder), _build(model_folder, simple=True)
    assert (type(simple) is adapter.SimpleSymphonyVLM, simple.is_simple) == (True, True)
    requests = [
        _request("generate_until", d["question"], {"max_new_tokens": NEW_TOKENS}, _visuals, i, "task", "test")
        for i, d in enumerate(DOCUMENTS)
    ]
    assert simple.generate_until(requests) == chat.generate_until([_ask(i) for i in range(len(DOCUMENTS))])
    ranked = [_rank(2, choice) for choice in DOCUMENTS[2]["choices"]]
    assert simple.loglikelihood(ranked) == chat.loglikelihood(ranked)


def test_conversations_of_several_turns_keep_roles_and_places_of_pictures(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = _build(model_folder)
    seen: list[Any] = []
    encode = built._model.processor.encode_prompts
    monkeypatch.setattr(
        built._model.processor,
        "encode_prompts",
        lambda messages, counts: seen.append(messages) or encode(messages, counts),
    )
    picture = DOCUMENTS[0]["image"]

    def messages(document: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {
                "role": "user",
                "content": [
                    {"type": "image", "url": picture},
                    {"type": "image", "url": picture},
                    {"type": "text", "text": "yes?"},
                ],
            },
            {"role": "assistant", "content": "no"},
            {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "image", "url": picture}]},
        ]

    built.generate_until([_ask(0, messages)])
    assert seen == [
        [
            (
                Message(role="system", parts=(TextPart(text="Be brief."),)),
                Message(role="user", parts=(ImagePart(index=0), ImagePart(index=1), TextPart(text="\nyes?"))),
                Message(role="assistant", parts=(TextPart(text="no"),)),
                Message(role="user", parts=(TextPart(text="and"), ImagePart(index=2))),
            )
        ]
    ]


def test_an_answer_ends_where_the_task_says(model_folder: Path) -> None:
    built = _build(model_folder)
    whole = built.generate_until([_ask(0)])[0]
    end = whole[len(whole) // 2]
    cut = whole.split(end)[0].strip()
    assert cut != whole
    assert built.generate_until([_ask(0, until=[end])]) == [cut]
    assert built.generate_until([_ask(0, until=end)]) == [cut]
    assert built.generate_until([_ask(0, until=["", "\n\n\n"])])[0] == whole


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ({}, {"max_new_tokens": 1024, "do_sample": False}),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False},
         {"max_new_tokens": 16, "num_beams": 1, "do_sample": False}),
        ({"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 9},
         {"max_new_tokens": 9, "temperature": 0.7, "top_p": 0.9, "do_sample": True}),
        ({"temperature": 0, "do_sample": True}, {"max_new_tokens": 1024, "do_sample": False}),
        ({"temperature": 0.7, "do_sample": False}, {"max_new_tokens": 1024, "do_sample": False}),
    ],
)  # fmt: skip
def test_generation_arguments_become_those_of_generate(given: dict[str, Any], passed: dict[str, Any]) -> None:
    assert adapter._generation(given) == (passed, [])


def test_arguments_without_effect_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            adapter._generation({"image_aspect_ratio": "original", "max_new_tokens": 2})
    assert [r.message for r in caplog.records] == ["generation arguments without effect here: image_aspect_ratio"]


# Likelihoods.


def _reference(model: Any, document: dict[str, Any], answer: str, with_picture: bool = True) -> tuple[float, bool]:
    """Token by token, one forward pass each, without padding: prompt of `chat`, then the answer's own tokens."""
    pixels = [np.asarray(document["image"])] if with_picture else []
    parts = tuple(ImagePart(index=i) for i in range(len(pixels)))
    text = TextPart(text=("\n" if pixels else "") + document["question"])
    ids = model.processor.encode_prompts([[Message(role="user", parts=(*parts, text))]])["input_ids"]
    pictures = dict(model.processor.image_processor(pixels)) if pixels else {}
    total, greedy = 0.0, True
    for token in model.processor.tokenizer.encode(answer, add_special_tokens=False):
        with torch.no_grad():
            scores = model(input_ids=ids, **pictures, use_cache=False).logits[0, -1].log_softmax(-1)
        total += float(scores[token])
        greedy &= int(scores.argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return total, greedy


@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_are_those_of_a_token_by_token_loop(model_folder: Path, model: Any, batch_size: int) -> None:
    """Sums of up to ten fp32 log probabilities of size 10, in another order: 1e-4 is ten times what was seen."""
    requests, expected = [], []
    for doc_id in (2, 0):
        for choice in DOCUMENTS[doc_id]["choices"]:
            requests.append(_rank(doc_id, f" {choice}"))
            expected.append(_reference(model, DOCUMENTS[doc_id], choice))
    found = _build(model_folder, batch_size=batch_size).loglikelihood(requests)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    torch.testing.assert_close(
        torch.tensor([total for total, _ in found]), torch.tensor([total for total, _ in expected]), rtol=0, atol=1e-4
    )


def test_the_target_may_be_a_function_and_the_question_may_be_missing(model_folder: Path, model: Any) -> None:
    built = _build(model_folder)
    by_function, by_text = built.loglikelihood([_rank(1, lambda document: document["answer"]), _rank(1, "no")])
    assert by_function == by_text
    alone = built.loglikelihood([_request("loglikelihood", "", "the circle")])[0]
    expected = _reference(model, {"question": ""}, "the circle", with_picture=False)
    assert alone[0] == pytest.approx(expected[0], abs=1e-4)
    assert alone[0] != by_text[0]


def test_the_greedy_answer_is_recognised(model_folder: Path, model: Any) -> None:
    """Many questions, as a random model's first token is seldom a text that reads as the same token again."""
    documents = [{"question": f"{n} shapes?", "image": DOCUMENTS[0]["image"]} for n in range(40)]
    said = [model.chat(d["question"], d["image"], max_new_tokens=1) for d in documents]
    known = [i for i, text in enumerate(said) if text and _reference(model, documents[i], text)[1]]
    assert known
    built = _build(model_folder)
    built.task_dict["task"]["test"] = documents
    requests = [
        _request("loglikelihood", documents[i]["question"], said[i], _visuals, i, "task", "test") for i in known
    ]
    assert [greedy for _, greedy in built.loglikelihood(requests)] == [True] * len(known)


def test_a_likelihood_reaches_the_task_as_a_pair(model_folder: Path) -> None:
    """By way of the function through which lmms-eval passes every response."""
    unwrap = importlib.import_module("lmms_eval.api.instance").unwrap_generation_output
    result = _build(model_folder).loglikelihood([_rank(0, "red")])[0]
    total, greedy = result
    assert unwrap(result) == ((total, greedy), None)
    assert isinstance(result, tuple) and result == (total, greedy)


def test_an_empty_answer_has_no_likelihood(model_folder: Path) -> None:
    with pytest.raises(InputError, match="empty|no supervised"):
        _build(model_folder).loglikelihood([_rank(0, " ")])


# Corruptions.


def test_a_corruption_acts_on_every_picture_as_the_runners_functions_do(model_folder: Path, model: Any) -> None:
    built = _build(model_folder, ",corruption=gaussian_noise,severity=5,corruption_seed=7")
    assert built.perturbation == {
        "corruption": "gaussian_noise",
        "severity": 5,
        "seed": 7,
        "corrupt_at": "native",
    }
    expected = []
    for document in DOCUMENTS:
        pixels = np.asarray(document["image"])
        noisy = corrupt(pixels, "gaussian_noise", 5, corruption_rng(image_key(pixels), "gaussian_noise", 5, 7))
        expected.append(model.chat(document["question"], Image.fromarray(noisy), max_new_tokens=NEW_TOKENS))
    requests = [_ask(i) for i in range(len(DOCUMENTS))]
    assert built.generate_until(requests) == expected
    assert built.generate_until(requests[::-1]) == expected[::-1]
    assert _build(model_folder).generate_until(requests) != expected
    other_seed = _build(model_folder, ",corruption=gaussian_noise,severity=5,corruption_seed=8,corrupt_at=native")
    likelihoods = [b.loglikelihood([_rank(0, "yes")])[0][0] for b in (_build(model_folder), built, other_seed)]
    assert len(set(likelihoods)) == 3


def test_corruptions_act_where_they_are_told_to(model_folder: Path, model: Any) -> None:
    question, pixels = DOCUMENTS[0]["question"], np.asarray(DOCUMENTS[0]["image"])

    def noisy(part: np.ndarray) -> np.ndarray:
        return corrupt(part, "gaussian_noise", 5, corruption_rng(image_key(pixels), "gaussian_noise", 5, 0))

    # 20 x 40 pixels are the middle 16 of 32 rows that the model sees.
    assert pixels.shape == (20, 40, 3)
    seen = model.processor.image_processor.prepare(Image.fromarray(pixels)).copy()
    seen[8:24] = noisy(seen[8:24])
    for place, expected in (("long_side:24", noisy(at_long_side(pixels, 24))), ("model_input", seen)):
        built = _build(model_folder, f",corruption=gaussian_noise,severity=5,corrupt_at={place}")
        assert built.perturbation["corrupt_at"] == place
        assert np.array_equal(built._perturb(pixels), expected)
        answer = model.chat(question, Image.fromarray(expected), max_new_tokens=NEW_TOKENS)
        assert built.generate_until([_ask(0)]) == [answer]


@pytest.mark.parametrize("arguments", ["", ",corruption=none", ",corruption=none,severity=0"])
def test_no_corruption_is_recorded_as_none(model_folder: Path, arguments: str) -> None:
    perturbation = _build(model_folder, arguments).perturbation
    assert perturbation == {"corruption": "none", "severity": 0, "seed": 0, "corrupt_at": "native"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (",corruption=fgo,severity=1", "unknown corruption 'fgo'; did you mean 'fog'"),
        (",corruption=fog", "severity=None of 'fog' is not one of 1, 2, 3, 4, 5"),
        (",corruption=fog,severity=6", "severity=6 of 'fog' is not one of"),
        (",corruption=fog,severity=1.5", "severity=1.5 of 'fog' is not one of"),
        (",severity=3", "severity=3 without a corruption"),
        (",corruption=common,severity=1", "'common' are 15; one process evaluates one"),
        (",corruption=fog,severity=1,corruption_seed=x", "corruption_seed='x' is no integer"),
        (",corruption=fog,severity=1,corrupt_at=model", "'model' is none of native, model_input, long_side:N"),
    ],
)
def test_wrong_arguments_are_named(model_folder: Path, arguments: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        _build(model_folder, arguments)


def test_a_batch_size_that_is_no_number_and_a_missing_model_are_named(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--batch_size: 'auto' is no number of requests"):
        _build(model_folder, batch_size="auto")
    with pytest.raises(InputError, match="no such model folder"):
        _build(tmp_path / "nothing")


# What it does not do.


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"type": "video", "url": "a.mp4"}, "task/test/0: content of type 'video', expected text or image"),
        ({"type": "image", "url": b"bytes"}, "task/test/0: a picture is a bytes, expected a Pillow image or a file"),
        ({"type": "image", "url": "missing.png"}, "task/test/0: image 'missing.png': the file does not exist"),
    ],
)
def test_content_that_cannot_be_shown_stops_the_run_and_names_the_question(
    model_folder: Path, content: dict[str, Any], complaint: str
) -> None:
    """An empty answer in its place would be scored as one."""
    with pytest.raises(InputError, match=complaint):
        _build(model_folder).generate_until([_ask(0, lambda document: [{"role": "user", "content": [content]}])])


def test_several_rounds_are_not_offered(model_folder: Path) -> None:
    with pytest.raises(NotImplementedError, match="one round"):
        _build(model_folder).generate_until_multi_round([])


# Our records as their samples.


def test_records_become_samples(model_folder: Path, tmp_path: Path) -> None:
    generate_scenes(tmp_path / "scenes", train=1, test=2)
    next(iter(sorted((tmp_path / "scenes" / "images" / "test").glob("*.png")))).write_bytes(b"")
    plan = EvaluationPlan(model=str(model_folder), tasks=("scenes",), data=tmp_path / "scenes", max_new_tokens=3)
    evaluate(plan, tmp_path / "out", console=Console(quiet=True))
    records = read_records(tmp_path / "out" / "predictions" / "scenes.none.0.jsonl")
    samples = adapter.samples(records)
    assert len(samples) == len(records) == 16
    for record, sample in zip(records, samples, strict=True):
        assert (sample["doc_id"], sample["target"]) == (record["item_id"], record["answer"])
        if record["error"]:
            assert (sample["resps"], sample["filtered_resps"], sample["error"]) == ([], [], record["error"])
            assert "score" not in sample
        else:
            assert sample["resps"] == [[record["prediction"]]]
            assert (sample["filtered_resps"], sample["score"]) == ([record["prediction"]], record["score"])
    assert sum("error" in sample for sample in samples) == 8
    json.dumps(samples)
