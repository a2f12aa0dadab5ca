"""What a stage has trained on so far: records by source, exactly, and records that could not be used.

The numbers travel with the batches (`TaggedCollator`), so they count what has reached an optimizer step and not what
worker processes have prepared in advance. They are kept in the checkpoints, for all processes together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from symphony_vlm.data.collator import ConversationDataset, EncodedSample
from symphony_vlm.data.mixture import SampleList
from symphony_vlm.data.streaming import SKIP_REMEDY
from symphony_vlm.errors import InputError
from symphony_vlm.files import sync_file, write_json
from symphony_vlm.training.batch_sizes import batch_sizes
from symphony_vlm.training.callbacks import cut_log
from symphony_vlm.training.checkpoints import checkpoint_folder

__all__ = ["NOTES", "Consumption", "SourcedConversations", "TaggedCollator"]

NOTES = "notes"
"""Key of a batch under which it says what it is made of; the trainer takes it out before the model sees the batch."""
FILE = "records.json"
_NAMED_FAULTS = 5


class SourcedConversations(ConversationDataset):
    """Samples that say which source they are from: the field ``sources``, a list of one number."""

    def __init__(self, samples: SampleList, **settings: Any) -> None:
        super().__init__(samples, **settings)
        self._source_number = samples.source_number

    def __getitem__(self, index: int) -> EncodedSample:
        return {**super().__getitem__(index), "sources": [self._source_number(index)]}  # type: ignore[typeddict-unknown-key]


class TaggedCollator:
    """A collator whose batches carry notes about their items.

    Args:
        collate: makes the batch; it never sees anything but the items.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        """The batch, and under `NOTES` its records' sources and faults, the stream's position after it, its size."""
        records = [record for item in items for record in (item if isinstance(item, list) else [item])]
        notes = {
            "sources": [source for record in records for source in record.get("sources", [])],
            "faults": [record["fault"] for record in records if record.get("fault")],
            "position": max((record["position"] + 1 for record in records if "position" in record), default=0),
        }
        batch = self._collate(items)
        return {**batch, NOTES: {**notes, "sizes": batch_sizes(records, batch)}}


class Consumption(TrainerCallback):
    """Counts records by source over a stage, through interruptions.

    Args:
        labels: the sources by name.
        folder: the stage's; ``faults.jsonl`` is written there (``faults.rank1.jsonl`` by the second process, ...).
        on_bad_sample: ``error`` stops at a record that cannot be used.
        report: gets a line for each of the first few such records.
    """

    def __init__(
        self, labels: Sequence[str], folder: Path, *, on_bad_sample: str, report: Callable[[str], None]
    ) -> None:
        self._labels = tuple(labels)
        self._folder = folder
        self._on_bad_sample = on_bad_sample
        self._report = report
        self._num_reported = 0
        # By source the records, then the faults; of this process since the totals were last added up.
        self._new = torch.zeros(len(self._labels) + 1, dtype=torch.long)
        self._totals = torch.zeros_like(self._new)
        self.position = 0
        """Of the stream: where a restart goes on. Up to date at log steps and checkpoints, as are the totals."""

    @property
    def records_seen(self) -> dict[str, int]:
        """Records that all processes together have trained on, by source."""
        return dict(zip(self._labels, self._totals.tolist(), strict=False))

    def log_entries(self) -> dict[str, int]:
        """The totals as fields of a line of the log."""
        entries = {f"records_seen/{label}": count for label, count in self.records_seen.items()}
        return entries | ({"records_skipped": int(self._totals[-1])} if self._totals[-1] else {})

    def take(self, batches: Sequence[Mapping[str, Any]], step: int) -> None:
        """Notes what an optimizer step is made of.

        Raises:
            InputError: one of its records cannot be used, under ``on_bad_sample: error``.
        """
        for batch in batches:
            notes = batch.get(NOTES)
            if notes is None:
                continue
            for fault in notes["faults"]:
                self._note(fault, step)
            for source in notes["sources"]:
                self._new[source] += 1
            self.position = max(self.position, notes["position"])

    def _note(self, fault: Mapping[str, Any], step: int) -> None:
        if self._on_bad_sample == "error":
            raise InputError(fault["reason"], remedy=SKIP_REMEDY)
        self._new[-1] += 1
        self._num_reported += 1
        if self._num_reported <= _NAMED_FAULTS:
            self._report(f"step {step}, left out: {fault['reason']}")
        with self._faults_path().open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **fault}, ensure_ascii=False) + "\n")

    def _faults_path(self) -> Path:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return self._folder / (f"faults.rank{rank}.jsonl" if rank else "faults.jsonl")

    def restore(self, checkpoint: Path) -> None:
        """Goes on from the totals in a checkpoint."""
        found = json.loads((checkpoint / FILE).read_text())
        seen = [found["records_seen"][label] for label in self._labels]
        self._totals = torch.tensor([*seen, found["records_skipped"]])
        self._new.zero_()
        self.position = found["position"]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        cut_log(self._faults_path(), lambda entry: entry["step"] <= state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The Trainer's own callback, the first in line, has already decided.
        if not (control.should_log or control.should_save):
            return
        position = torch.tensor([self.position])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            device = args.device
            new, position = self._new.to(device), position.to(device)
            dist.all_reduce(new)
            dist.all_reduce(position, op=dist.ReduceOp.MAX)
            self._totals += new.cpu()
        else:
            self._totals += self._new
        self.position = int(position)
        self._new.zero_()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._faults_path().is_file():
            sync_file(self._faults_path())
        if state.is_world_process_zero:
            values = {"records_seen": self.records_seen, "records_skipped": int(self._totals[-1])}
            write_json(checkpoint_folder(args, state) / FILE, {**values, "position": self.position})
