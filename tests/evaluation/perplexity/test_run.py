"""The whole evaluation against a plain loop of transformers' guide, and what it writes and refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from symphony_vlm import cli
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.perplexity.lines_file import read_line_records
from symphony_vlm.evaluation.perplexity.plan import PerplexityPlan
from symphony_vlm.evaluation.perplexity.run import evaluate_perplexity
from symphony_vlm.evaluation.perplexity.scoring import log_probabilities
from symphony_vlm.evaluation.perplexity.texts import Attack, attacked
from symphony_vlm.evaluation.perplexity.windows import sliding_windows

SETTINGS: dict[str, Any] = {"context": 32, "stride": 12, "batch_size": 5}


@torch.no_grad()
def guide(model: Any, ids: torch.Tensor, context: int, stride: int) -> tuple[float, float, int]:
    """The loop of transformers' guide "Perplexity of fixed-length models".

    Returns:
        Its literal mean, the exact mean, and the number of scored tokens. The guide weighs a window's mean with one
        label less than took part, where the window is not the first.
    """
    previous = 0
    literal, exact, literal_tokens, tokens = 0.0, 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + context, ids.shape[1])
        target_length = end - previous
        input_ids = ids[:, begin:end]
        target_ids = input_ids.clone()
        target_ids[:, :-target_length] = -100
        loss = float(model(input_ids, labels=target_ids).loss)
        valid = int((target_ids != -100).sum())
        literal, literal_tokens = literal + loss * (valid - 1), literal_tokens + valid - 1
        shifted = int((target_ids[:, 1:] != -100).sum())
        exact, tokens = exact + loss * shifted, tokens + shifted
        previous = end
        if end == ids.shape[1]:
            break
    return literal / literal_tokens, exact / tokens, tokens


def without_router_losses(folder: Path) -> Any:
    """A model whose loss is cross entropy alone: the guide's loop takes it for that."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if getattr(model, "routing", None) is not None:
        model.routing.weighted_loss = lambda losses: torch.zeros(())
    return model


def run(arguments: list[str]) -> None:
    """A command that ends well."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0


@pytest.mark.parametrize("folder", ["sparse_folder", "stock_folder"])
@pytest.mark.parametrize(("context", "stride"), [(32, 12), (64, 32), (16, 16)])
def test_perplexity_is_that_of_the_guides_loop(
    folder: str, context: int, stride: int, text_file: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(folder)
    ids = AutoTokenizer.from_pretrained(path)(text_file.read_text(), return_tensors="pt")["input_ids"]
    literal, exact, tokens = guide(without_router_losses(path), ids, context, stride)
    plan = PerplexityPlan(model=str(path), text=str(text_file), context=context, stride=stride, batch_size=5)
    [cell] = evaluate_perplexity(plan, None).cells
    assert cell.n_tokens_scored == tokens
    # fp32 log-probabilities of order 10 are rounded to 1e-6 each, without bias: their mean is far closer.
    assert cell.values["nats_per_token"][0] == pytest.approx(exact, abs=1e-6)
    if stride == context:
        assert literal == exact and tokens < ids.shape[1] - 1
    else:
        # The guide's own weights, a label less per window, move the mean a little.
        assert literal == pytest.approx(exact, abs=0.01) and tokens == ids.shape[1] - 1


def test_single_steps_give_every_token_the_longest_context(sparse_folder: Path, text_file: Path) -> None:
    ids = AutoTokenizer.from_pretrained(sparse_folder)(text_file.read_text(), return_tensors="pt")["input_ids"][:, :100]
    _, exact, _ = guide(without_router_losses(sparse_folder), ids, 16, 1)
    model = AutoModelForCausalLM.from_pretrained(sparse_folder).eval()
    scores = log_probabilities(model, ids[0], sliding_windows(100, context=16, stride=1), batch_size=7)
    assert np.isnan(scores[0]) and -scores[1:].mean() == pytest.approx(exact, abs=1e-6)


def test_clean_and_attacked_figures_lines_and_pairs(sparse_folder: Path, text_file: Path, tmp_path: Path) -> None:
    attacks = (Attack(rate=0.05), Attack(rate=0.4))
    plan = PerplexityPlan(model=str(sparse_folder), text=str(text_file), attacks=attacks, **SETTINGS)
    summary = evaluate_perplexity(plan, tmp_path / "out")
    assert [cell.name for cell in summary.cells] == ["clean", "word_swap@0.05", "word_swap@0.4"]
    assert summary.settings["interval_by"] == "article" and summary.settings["n_clusters"] == 12
    assert summary.settings["token_in_vocabulary"] is False
    records = read_line_records(tmp_path / "out")
    lines = text_file.read_text().split("\n")[:-1]
    for cell in summary.cells:
        own = records[cell.name].values()
        nats = -sum(record["log_probability"] for record in own)
        assert cell.values["perplexity"][0] == pytest.approx(math.exp(nats / cell.n_tokens_scored), rel=1e-12)
        # Word-level tokens are the words.
        assert cell.n_words == cell.n_tokens_scored == sum(len(line.split()) + 1 for line in lines) - 1
        assert cell.values["word_perplexity"] == cell.values["perplexity"] and cell.coverage < 1
        low, value, high = (cell.values["perplexity"][i] for i in (1, 0, 2))
        assert low < value < high
    clean, _, strong = summary.cells
    assert clean.values["perplexity_without_swapped"] == clean.values["perplexity"]
    text = attacked(lines, attacks[1])
    assert strong.n_swapped == text.n_swapped and strong.text_sha256 == text.sha256
    assert sum(r["n_tokens"] - r["n_tokens_kept"] for r in records[strong.name].values()) == text.n_swapped
    pair = summary.pairs[1]
    assert (pair["first"], pair["second"]) == ("clean", "word_swap@0.4")
    by_token = strong.values["nats_per_token"][0] - clean.values["nats_per_token"][0]
    assert pair["nats_per_word"] == pytest.approx(by_token) and pair["nats_per_token"] == by_token
    assert pair["ci_low"] < pair["nats_per_word"] < pair["ci_high"] and 0 < pair["p_value"] <= 1
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    row = next(r for r in document["results"] if r["metric"] == "perplexity" and r["severity"] == 0.4)
    assert row["router"] == "symphony_smoe" and row["corruption"] == "word_swap" and not row["higher_is_better"]
    assert row["value"] == strong.values["perplexity"][0] and document["provenance"]["plan"]["context"] == 32


def test_inputs_and_targets_are_attacked(sparse_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """The attacked figure is that of the attacked file, evaluated as a text of its own."""
    lines = text_file.read_text().split("\n")[:-1]
    file = tmp_path / "attacked.txt"
    file.write_text(attacked(lines, Attack(rate=0.2)).text)
    attack = PerplexityPlan(model=str(sparse_folder), text=str(text_file), attacks=(Attack(rate=0.2),), **SETTINGS)
    plain = PerplexityPlan(model=str(sparse_folder), text=str(file), **SETTINGS)
    first, second = evaluate_perplexity(attack, None).cells[1], evaluate_perplexity(plain, None).cells[0]
    assert first.values["perplexity"] == second.values["perplexity"]


def test_two_models_of_other_tokenizers_are_compared_by_word(
    sparse_folder: Path, stock_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    for name, folder in (("a", sparse_folder), ("b", stock_folder)):
        evaluate_perplexity(PerplexityPlan(model=str(folder), text=str(text_file), **SETTINGS), tmp_path / name)
    plan = PerplexityPlan(model=str(stock_folder), text=str(text_file), **SETTINGS)
    same = evaluate_perplexity(plan, None, against=tmp_path / "b").pairs[-1]
    assert same["nats_per_word"] == 0 and same["p_value"] == 1
    other = evaluate_perplexity(plan, None, against=tmp_path / "a").pairs[-1]
    first, second = read_line_records(tmp_path / "a")["clean"], read_line_records(tmp_path / "b")["clean"]
    shared = [line for line in first if first[line]["n_words"] == second[line]["n_words"]]
    words = sum(first[line]["n_words"] for line in shared)
    difference = sum(first[line]["log_probability"] - second[line]["log_probability"] for line in shared) / words
    assert other["nats_per_word"] == pytest.approx(difference) and other["n_lines"] == len(shared)


def test_the_streams_of_the_published_evaluation_lose_tokens_and_say_so(sparse_folder: Path, text_file: Path) -> None:
    plan = PerplexityPlan(model=str(sparse_folder), text=str(text_file), streams=6, **SETTINGS)
    [cell] = evaluate_perplexity(plan, None).cells
    assert 0.8 < cell.coverage < 0.99


def test_the_language_model_of_a_vision_language_model(tiny_model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("What color is the circle?\nred\n" * 20)
    [cell] = evaluate_perplexity(PerplexityPlan(model=str(tiny_model_folder), text=str(file)), None).cells
    assert math.isfinite(cell.values["perplexity"][0]) and cell.n_words <= 20 * 8


def test_the_command_keeps_the_contract(
    sparse_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["perplexity", "--model", str(sparse_folder), "--text", str(text_file), "--attack", "word_swap"]
    run([*arguments, "--rate", "0.1,0.3", "--limit", "40", "--output", str(tmp_path / "out"), "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"perplexity", "nats_per_token", "n_tokens", "attack", "realised_rate", "ci_low", "ci_high"} <= set(found)
    assert found["attack"] == "word_swap" and found["rate"] == 0.3 and found["context"] == 64
    assert [cell["rate"] for cell in found["results"]] == [0.0, 0.1, 0.3] and found["interval_by"] == "line"
    run(arguments[:5])
    assert "coverage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--attack", "word_swop"], "did you mean 'word_swap'"),
        (["--attack", "word_swap", "--rate", "2"], "above 0 and at most 1"),
        (["--attack", "word_swap", "--rate", "x"], "above 0 and at most 1"),
        (["--attack", "word_swap", "--token", "A A"], "must be one word"),
        (["--context", "65"], "more than the model's 64 positions"),
        (["--stride", "65"], "must be from 1 to the context"),
        (["--interval-by", "page"], "none of auto, article, line"),
        (["--against", "nowhere"], "no lines.jsonl"),
    ],
)
def test_bad_options_get_one_line(
    more: list[str], message: str, sparse_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["perplexity", "--model", str(sparse_folder), "--text", str(text_file), *more])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_what_is_no_model_or_text_is_refused(sparse_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model folder"):
        evaluate_perplexity(PerplexityPlan(model="./nowhere", text=str(text_file)), None)
    (tmp_path / "blank.txt").write_text("\n\n")
    with pytest.raises(InputError, match="holds no text"):
        evaluate_perplexity(PerplexityPlan(model=str(sparse_folder), text=str(tmp_path / "blank.txt")), None)
    AutoModelForCausalLM.from_pretrained(sparse_folder).save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="has no tokenizer"):
        evaluate_perplexity(PerplexityPlan(model=str(tmp_path / "bare"), text=str(text_file)), None)
