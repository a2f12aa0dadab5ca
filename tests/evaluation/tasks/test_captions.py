"""Captions: against the libraries on the whole corpus, brute-force CIDEr, weights as copies, and a missing library."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.metrics import metric_intervals
from symphony_vlm.evaluation.rules import captions
from symphony_vlm.evaluation.scoring import Score, score_files
from symphony_vlm.evaluation.task import get_task
from symphony_vlm.files import write_json

REFERENCES = [
    ["A dog runs on the beach.", "The dog is running along a beach"],
    ["Two people, sitting at a table."],
    ["a red bus on a street", "A red, double-decker bus!", "the bus drives down the street"],
]
CAPTIONS = ["a dog is running on the beach", "two people sitting at a table", "A bus."]


@pytest.fixture
def libraries() -> None:
    pytest.importorskip("pycocoevalcap.cider.cider", reason="needs the extra captions")
    pytest.importorskip("sacrebleu", reason="needs the extra captions")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(3)]
    annotations = [{"image_id": i, "id": 0, "caption": text} for i, texts in enumerate(REFERENCES) for text in texts]
    write_json(tmp_path / "captions_val.json", {"images": images, "annotations": annotations})
    return tmp_path / "captions_val.json"


def _scored(data: Path, tmp_path: Path, texts: list[str]) -> Score:
    write_json(tmp_path / "results.json", [{"image_id": i, "caption": text} for i, text in enumerate(texts)])
    return score_files(get_task("captions"), tmp_path / "results.json", annotations=data)


def _brute_force_cider(texts: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr-D by its definition, on tokenized texts."""

    def counted(text: str, n: int) -> Counter[tuple[str, ...]]:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    scores = []
    for text, wanted in zip(texts, references, strict=True):
        total = 0.0
        for n in range(1, 5):
            document = Counter(gram for refs in references for gram in {g for ref in refs for g in counted(ref, n)})

            def vector(one: str, n: int = n, document: Counter[Any] = document) -> dict[Any, float]:
                weight = {gram: math.log(len(references) / max(1, document[gram])) for gram in counted(one, n)}
                return {gram: count * weight[gram] for gram, count in counted(one, n).items()}

            for reference in wanted:
                a, b = vector(text), vector(reference)
                norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
                dot = sum(min(a[gram], b[gram]) * b[gram] for gram in a.keys() & b.keys())
                # The library's length is the number of bigrams.
                gap = len(text.split()) - len(reference.split())
                total += (dot / norm if norm else 0.0) * math.exp(-(gap**2) / 72) / len(wanted)
        scores.append(10 * total / 4)
    return scores


@pytest.mark.usefixtures("libraries")
def test_figures_are_those_of_the_definition_and_of_sacrebleu_on_the_corpus(data: Path, tmp_path: Path) -> None:
    import sacrebleu

    found = _scored(data, tmp_path, CAPTIONS)
    texts = [captions.tokenize(text) for text in CAPTIONS]
    references = [[captions.tokenize(text) for text in wanted] for wanted in REFERENCES]
    assert found.values["cider"] == pytest.approx(np.mean(_brute_force_cider(texts, references)))
    # sacrebleu takes one list per reference, with None where a caption has fewer.
    padded: list[Any] = [[wanted[i] if i < len(wanted) else None for wanted in references] for i in range(3)]
    corpus = sacrebleu.metrics.BLEU(tokenize="none", force=True).corpus_score(texts, padded)
    assert found.values["bleu"] == pytest.approx(corpus.score)
    assert 0 < corpus.score < 100


@pytest.mark.usefixtures("libraries")
def test_perfect_captions_and_none(data: Path, tmp_path: Path) -> None:
    perfect = _scored(data, tmp_path, [wanted[0] for wanted in REFERENCES])
    assert perfect.values["bleu"] == pytest.approx(100.0)
    assert perfect.values["sentence_bleu"] == pytest.approx(1.0)
    nothing = _scored(data, tmp_path, [""])
    assert nothing.values == {"cider": 0.0, "bleu": 0.0, "sentence_bleu": 0.0}
    assert len(nothing.missing) == 2
    assert nothing.n_unparsed == 1


@pytest.mark.usefixtures("libraries")
def test_tokens_are_lower_case_without_punctuation() -> None:
    assert captions.tokenize("A red, double-decker  bus: 3.5 m!\n") == "a red double-decker bus 3.5 m"


@pytest.mark.usefixtures("libraries")
def test_a_weight_is_as_many_copies(data: Path, tmp_path: Path) -> None:
    outcomes = _scored(data, tmp_path, CAPTIONS).outcomes
    metric = next(m for m in get_task("captions").metrics(outcomes) if m.name == "bleu")
    weights = np.array([2, 0, 3])
    copies = [outcome for outcome, n in zip(outcomes, weights, strict=True) for _ in range(n)]
    assert metric.combine(weights @ metric.terms(outcomes)) == pytest.approx(
        metric.combine(metric.terms(copies).sum(0))
    )
    intervals = metric_intervals(get_task("captions").metrics(outcomes), outcomes, seed=0, n_resamples=100)
    assert all(interval is not None and interval.low <= interval.high for interval in intervals.values())


@pytest.mark.usefixtures("libraries")
def test_answers_of_a_conversation_are_references_too(tmp_path: Path) -> None:
    record = {
        "id": "a",
        "image": "a.jpg",
        "conversations": [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": "a red bus"}],
    }
    write_json(tmp_path / "d.json", [record])
    (tmp_path / "p.jsonl").write_text(json.dumps({"question_id": "a", "text": "A red bus."}) + "\n")
    found = score_files(get_task("captions"), tmp_path / "p.jsonl", annotations=tmp_path / "d.json")
    assert found.values["sentence_bleu"] == pytest.approx(1.0)


@pytest.mark.parametrize("module", ["sacrebleu.metrics.bleu", "pycocoevalcap.cider.cider"])
def test_a_missing_library_is_one_error_that_names_the_extra(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    captions._tools.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"not installed. Run: pip install 'symphony-vlm\[captions\]'"):
        _scored(data, tmp_path, CAPTIONS)
    captions._tools.cache_clear()


@pytest.mark.parametrize(
    ("images", "annotations", "message"),
    [
        ([0, 1], [0], "record 1: the picture 1 has no caption"),
        ([0], [0, 5], "image_id 5 is no picture"),
        ([0, 0], [0], "'0' stands twice"),
    ],
)
def test_broken_annotations(tmp_path: Path, images: list[int], annotations: list[int], message: str) -> None:
    content = {
        "images": [{"id": i, "file_name": "a.jpg"} for i in images],
        "annotations": [{"image_id": i, "caption": "c"} for i in annotations],
    }
    write_json(tmp_path / "c.json", content)
    with pytest.raises(InputError, match=message):
        get_task("captions").load(tmp_path / "c.json", None, tmp_path, 0)
