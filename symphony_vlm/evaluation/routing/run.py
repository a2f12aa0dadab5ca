"""The routing of a whole evaluation: what the runner asks for before, during and after its cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.opening import OpenedModel
from symphony_vlm.evaluation.options import Options
from symphony_vlm.evaluation.plan import EvaluationPlan
from symphony_vlm.evaluation.predictor import AnswersItems, EncodesPictures
from symphony_vlm.evaluation.records import drop_records, read_records
from symphony_vlm.evaluation.routing.capture import PromptCapture
from symphony_vlm.evaluation.routing.cell_routing import CleanRouting, DriftRouting, is_clean, stem_of
from symphony_vlm.evaluation.routing.patches import patch_samples
from symphony_vlm.evaluation.routing.predictor import RoutedPredictor
from symphony_vlm.evaluation.routing.results import task_block
from symphony_vlm.evaluation.routing.shards import ShardReader, merge_shards, shard_paths
from symphony_vlm.files import write_json

__all__ = ["RoutingRun"]


@dataclass(frozen=True, kw_only=True)
class _RoutedModel(OpenedModel):
    """A model whose predictors record."""

    capture: PromptCapture
    sink: CleanRouting | DriftRouting

    def predictor(
        self,
        *,
        batch_size: int,
        max_new_tokens: int,
        options: Callable[[EvaluationItem], Options | None] | None = None,
        encoder: EncodesPictures | None = None,
    ) -> AnswersItems:
        return RoutedPredictor(
            self.model,
            capture=self.capture,
            sink=self.sink,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            encoder=encoder,
            **({} if options is None else {"options": options}),
        )


class RoutingRun:
    """Records and compares the routing of one model's cells, in the folder ``routing``.

    Args:
        model: of ours, with sparse layers.
        output: the evaluation's folder.
        rank: of this process.
    """

    def __init__(self, model: OpenedModel, output: Path, rank: int) -> None:
        self._model = model
        self._capture = PromptCapture(model.model)
        self._output = output
        self._folder = output / "routing"
        self._rank = rank

    @classmethod
    def of(
        cls, plan: EvaluationPlan, model: OpenedModel, output: Path, rank: int, console: Console
    ) -> RoutingRun | None:
        """None if the plan does not ask for it, or, with a note, if the model is dense.

        Raises:
            InputError: the model is not one of ours, or has experts where their drift is not measured.
        """
        if not plan.routing:
            return None
        if model.is_stock:
            raise InputError(
                "a model of transformers has no routers of ours to record",
                where="--routing",
                remedy="Leave --routing out.",
            )
        if model.router == "dense":
            if rank == 0:
                console.print("--routing: the model is dense, so there is no routing to record")
            return None
        return cls(model, output, rank)

    def forget_unrouted(self, cells: Sequence[Cell]) -> None:
        """Drops records without routing, so that their items are answered again. No one may be writing.

        Such are the records of an evaluation that was started without ``--routing``, or whose files are lost.
        """
        for cell in cells:
            path = self._output / "predictions" / cell.file_name
            routed = ShardReader(shard_paths(self._folder, stem_of(cell)))
            lost = {
                record["item_id"]
                for record in read_records(path)
                if record["error"] is None
                and (
                    "routing" not in record
                    or (record["routing"].get("comparable", True) and record["item_id"] not in routed)
                )
            }
            drop_records(path, lost)

    def of_cell(self, cell: Cell) -> OpenedModel:
        """The model with predictors that record this cell; the clean one must have been answered before the others."""
        sink: CleanRouting | DriftRouting = (CleanRouting if is_clean(cell) else DriftRouting)(
            self._folder, cell, self._rank
        )
        own = {field.name: getattr(self._model, field.name) for field in fields(self._model)}
        return _RoutedModel(**own, capture=self._capture, sink=sink)

    def finish(self, cell: Cell, items: Sequence[str]) -> None:
        """Makes one file of a corrupted cell's; the clean cell's, which are large, stay as they are."""
        if not is_clean(cell):
            merge_shards(self._folder, stem_of(cell), items)

    def results(
        self, cells: Sequence[Cell], items: Mapping[str, Sequence[EvaluationItem]], model: str, *, seed: int
    ) -> dict[str, Any]:
        """What results.json gains: ``{"routing_drift": [...]}``, a block for each task with a cell to compare.

        Writes ``routing/samples.json`` beside, pictures and maps of a few samples for the report.

        Args:
            cells: all, answered and finished.
            items: by task.
            model: its name in the results.
            seed: of the bootstrap.
        """
        names, selected = self._capture.layer_names, self._capture.num_experts_per_tok
        facts = {
            "model": model,
            "router": self._model.router,
            "layers": names,
            "n_experts_per_tok": selected,
            "expert_graph": self._capture.has_graph,
        }
        by_task: dict[str, list[Cell]] = {}
        for cell in cells:
            by_task.setdefault(cell.task.name, []).append(cell)
        compared = {task: listed for task, listed in by_task.items() if len(listed) > 1}
        samples = {
            task: patch_samples(self._model.model, listed, items[task], self._output, len(names) * selected)
            for task, listed in compared.items()
        }
        write_json(self._folder / "samples.json", samples)
        blocks = [task_block(listed, self._output, names, facts, seed=seed) for listed in compared.values()]
        return {"routing_drift": blocks}
