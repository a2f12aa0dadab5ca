"""Sizes of batches, and speeds from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from symphony_vlm.data.collator import ConversationCollator, EncodedSample
from symphony_vlm.data.packing import PackedCollator
from symphony_vlm.data.placeholders import placeholder_like
from symphony_vlm.training import throughput
from symphony_vlm.training.batch_sizes import BatchSizes
from symphony_vlm.training.consumption import NOTES, TaggedCollator
from symphony_vlm.training.flops import TrainingFlops
from symphony_vlm.training.throughput import Throughput, short_figures, with_prefix
from symphony_vlm.training.trainer import StageTrainer


def _sample(length: int, supervised: int, images: int = 0) -> EncodedSample:
    ids = np.arange(10, 10 + length, dtype=np.int32)
    labels = np.where(np.arange(length) >= length - supervised, ids, -100).astype(np.int32)
    squares = [np.zeros((4, 4, 3), dtype=np.uint8)] * images
    return {"input_ids": ids, "labels": labels, "images": squares, "image_sizes": [(4, 4)] * images}


ROWS = ConversationCollator(0, lambda images: torch.zeros(len(images), 3, 4, 4))


def test_a_padded_batch_is_counted_without_its_padding_and_placeholders() -> None:
    samples: list[Any] = [_sample(10, 4, images=1), _sample(6, 2, images=2)]
    samples.append(placeholder_like(samples[0], 0))
    sizes = TaggedCollator(ROWS)(samples)[NOTES]["sizes"]
    assert sizes == BatchSizes(samples=2, tokens=17, supervised=6, places=30, images=3, tiles=3, lengths=(10, 6, 1))


def test_conversations_that_share_a_row_are_samples_and_sequences_of_their_own() -> None:
    rows = [[_sample(10, 4, images=1), _sample(6, 2)], [_sample(5, 5)]]
    sizes = TaggedCollator(PackedCollator(ROWS))(rows)[NOTES]["sizes"]
    # The first token of the third has a label, but nothing stands before it.
    assert sizes == BatchSizes(samples=3, tokens=21, supervised=10, places=32, images=1, tiles=1, lengths=(10, 6, 5))


def test_tiles_are_more_than_images() -> None:
    sample = _sample(10, 4)
    sample["images"], sample["image_sizes"] = [np.zeros((5, 4, 4, 3), dtype=np.uint8)], [(4, 16)]
    rows = ConversationCollator(0, lambda images: torch.zeros(5, 3, 4, 4))
    sizes = TaggedCollator(rows)([sample])[NOTES]["sizes"]
    assert (sizes.images, sizes.tiles) == (1, 5)


def test_blocks_of_text_have_no_padding_and_captions_no_tokens_to_count() -> None:
    block = torch.arange(8)
    text = TaggedCollator(lambda items: {k: torch.stack([i[k] for i in items]) for k in items[0]})
    sizes = text([{"input_ids": block, "labels": block}] * 3)[NOTES]["sizes"]
    assert sizes == BatchSizes(samples=3, tokens=24, supervised=21, places=24, lengths=(8, 8, 8))
    captions = TaggedCollator(lambda items: {"pixel_values": torch.zeros(2, 3, 4, 4), "captions": block[None]})
    assert captions([_sample(4, 4, images=1)] * 2)[NOTES]["sizes"] == BatchSizes(samples=2, images=2, tiles=2)


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


def _step(counter: Throughput, clock: Clock, sizes: BatchSizes, *, waiting: float, computing: float) -> None:
    with counter.loading():
        clock.now += waiting
    counter.take([sizes])
    clock.now += computing
    counter.step_done()


def test_speeds_are_of_the_time_in_steps_alone(clock: Clock) -> None:
    flops = TrainingFlops(token=2e9)
    counter = Throughput(flops, 4.0, torch.device("cpu"))
    sizes = BatchSizes(samples=4, tokens=750, supervised=100, places=1000, images=2)
    for _ in range(2):
        _step(counter, clock, sizes, waiting=0.1, computing=0.4)
        clock.now += 60.0  # an evaluation, which does not count
    figures = counter.read()
    memory = figures.pop("runtime/memory_gib")
    assert 0.05 < memory < 100
    assert figures == {
        "runtime/samples_per_second": 8.0,
        "runtime/tokens_per_second": 1500.0,
        "runtime/supervised_tokens_per_second": 200.0,
        "runtime/images_per_second": 4.0,
        "runtime/step_seconds": 0.5,
        "runtime/data_share": 0.2,
        "runtime/model_tflops": 3.0,
        "runtime/mfu": 0.75,
        "padding_share": 0.25,
        "supervised_tokens": 200.0,
    }
    assert counter.read() == {}, "the next interval is empty"


def test_without_a_known_peak_there_is_no_utilisation(clock: Clock) -> None:
    counter = Throughput(TrainingFlops(token=1.0), None, torch.device("cpu"))
    _step(counter, clock, BatchSizes(tokens=1, places=1), waiting=0.0, computing=1.0)
    assert "runtime/mfu" not in counter.read()


def test_figures_for_a_terminal() -> None:
    assert [with_prefix(v) for v in (0.5, 9.996, 412.4, 999.4, 999.6, 4123, 41234, 999499, 1.24e6)] == [
        "0.50", "10", "412", "999", "1.00k", "4.12k", "41.2k", "999k", "1.24M",
    ]  # fmt: skip
    assert short_figures({"runtime/samples_per_second": 12.0, "runtime/mfu": 0.0042}) == ["12 samples/s", "MFU 0.4 %"]


def test_every_module_s_learning_rate_is_logged_under_its_name(tmp_path: Path, tiny_run: Any) -> None:
    entries = [entry for entry in tiny_run.log("instruct") if "loss" in entry]
    for entry in entries:
        rates = {name: entry[f"learning_rate/{name}"] for name in ("vision_tower", "projector", "language_model")}
        assert set(rates.values()) == {entry["learning_rate"]}


def test_rates_of_modules_keep_their_ratio_under_the_schedule(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    model = torch.nn.ModuleDict({"tower": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = StageTrainer(model=model, args=arguments, rates={"tower": 1e-4, "head": 1e-3})
    trainer.create_optimizer_and_scheduler(10)
    assert trainer.optimizer is not None and trainer.lr_scheduler is not None
    for _ in range(5):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    logs = {"loss": 1.0, "learning_rate": trainer._get_learning_rate()}
    trainer.log(logs)
    current = sorted({group["lr"] for group in trainer.optimizer.param_groups})
    assert [logs["learning_rate/tower"], logs["learning_rate/head"]] == pytest.approx(current)
    assert logs["learning_rate/head"] == pytest.approx(10 * logs["learning_rate/tower"])


def test_the_log_of_a_run_has_every_figure(tiny_run: Any) -> None:
    """MFU is missing: a CPU's peak is not known."""
    entry = [entry for entry in tiny_run.log("instruct") if "loss" in entry][-1]
    for name in ("samples", "tokens", "supervised_tokens", "images"):
        assert entry[f"runtime/{name}_per_second"] > 0
    for name in ("runtime/step_seconds", "runtime/memory_gib", "runtime/model_tflops", "grad_norm", "cross_entropy"):
        assert entry[name] > 0
    assert 0 <= entry["padding_share"] < 1 and 0 <= entry["runtime/data_share"] < 1
    assert 0.5 <= entry["router/largest_share"] <= 1 and 0 < entry["router/entropy_min"] <= 1
    assert "runtime/mfu" not in entry
    text = [entry for entry in tiny_run.log("language") if "loss" in entry][-1]
    assert text["padding_share"] == 0 and "router/largest_share" not in text
