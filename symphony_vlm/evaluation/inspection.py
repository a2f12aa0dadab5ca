"""What the routers of a saved model do: load and entropy by layer, the expert graphs, and how far these moved."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from symphony_vlm.data.collator import ConversationCollator, ConversationDataset
from symphony_vlm.data.datasets import open_samples
from symphony_vlm.data.sample import Sample
from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.errors import InputError
from symphony_vlm.files import write_json
from symphony_vlm.model.loading import load, resolve_model_folder

if TYPE_CHECKING:
    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["Inspection", "LayerFacts", "inspect_model", "measure_load", "summary", "table", "write_inspection"]

SCENES = 32
"""Pictures drawn where there is neither data nor a training log."""
RECORDS = 256
"""Records of a data file that are run unless a limit is given: some ten thousand tokens, steady to a few per mille."""


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """One sparse layer."""

    layer: str
    """`SparseMoE.key`: the decoder layer's index, elsewhere with the module in front."""
    name: str
    """Module name."""
    num_experts: int
    num_experts_per_tok: int
    expert_distance: float
    """Between the experts' weights, as `expert_distance` gives it: 0 for copies, near 1.41 for unrelated ones."""
    load: dict[str, Any]
    """As `LoadStatistics.read` gives it."""
    graph: dict[str, Any] | None
    """As `graph_statistics` gives it, with the logged ``drift`` (None if there is no log); None: a plain router."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect_model` found."""

    model: str
    router: str
    load_source: str
    """What the load and the entropies were measured on."""
    layers: tuple[LayerFacts, ...]
    drift: dict[str, dict[str, list[float]]]
    """By layer: ``step`` and ``drift`` of every line of the routing log of the model's last stage."""


def inspect_model(
    name: str | Path,
    *,
    data: Path | None = None,
    image_folder: Path | None = None,
    limit: int | None = None,
    console: Console | None = None,
) -> Inspection:
    """Describes every sparse layer of a model.

    Load and entropy are measured on `data`; without it they are those of the training log's last line, or, if the
    model came without its log, measured on a few generated scenes.

    Args:
        name: folder of a model or of a finished run, or a hub name.
        data: conversations in a format that `open_samples` knows.
        image_folder: what the data's relative image paths are relative to.
        limit: records of `data` to run, evenly spread over it.
        console: where progress goes; default: standard error.

    Raises:
        InputError: no such model, or it has no sparse layers; the data cannot be used.
    """
    from symphony_vlm.moe.recording import sparse_layers
    from symphony_vlm.moe.statistics import expert_distance, graph_statistics

    console = console or Console(stderr=True)
    if data is None and (image_folder is not None or limit is not None):
        option = "--limit" if image_folder is None else "--image-folder"
        raise InputError("is given without data", where=option, remedy="Add --data FILE.")
    samples = None if data is None else _spread(open_samples(data, image_folder=image_folder), limit or RECORDS)
    model = load(name)
    layers = dict(sparse_layers(model))
    if not layers:
        raise InputError(
            "the model has no mixture-of-experts layers, so there are no routers to inspect",
            where=str(name),
            remedy="Give a model of a recipe with a model.moe section and a stage with upcycle: true.",
        )
    log = _routing_log(Path(resolve_model_folder(name)))
    last = log[-1] if log else {"layers": {}, "graphs": {}}
    if samples is not None:
        loads, source = measure_load(model, samples, console=console), f"{len(samples)} records of {data}"
    elif all(str(layer.key) in last["layers"] for layer in layers.values()):
        loads, source = last["layers"], f"the training log up to step {last['step']}"
    else:
        loads, source = _measure_scenes(model, console), f"{SCENES} generated scenes"
    graphs = graph_statistics(model)
    facts = []
    for module, layer in layers.items():
        graph = graphs.get(f"{module}.router.expert_graph")
        if graph is not None:
            graph = graph | {"drift": _drift(last, module)}
        config = layer.router.config
        facts.append(
            LayerFacts(
                layer=str(layer.key),
                name=module,
                num_experts=config.num_experts,
                num_experts_per_tok=config.num_experts_per_tok,
                expert_distance=expert_distance(layer.experts),
                load=loads[str(layer.key)],
                graph=graph,
            )
        )
    return Inspection(
        model=str(name),
        router=next(iter(layers.values())).router.config.router,
        load_source=source,
        layers=tuple(facts),
        drift={fact.layer: _drift_curve(log, fact.name) for fact in facts if fact.graph is not None},
    )


def measure_load(
    model: SymphonyVLMForConditionalGeneration,
    samples: Sequence[Sample],
    *,
    batch_size: int = 8,
    console: Console | None = None,
) -> dict[str, dict[str, Any]]:
    """Load statistics by layer of whole conversations: questions, pictures and answers, as in training.

    Raises:
        InputError: a record cannot be used, or there is a layer that no token reached.
    """
    import torch

    from symphony_vlm.moe.recording import sparse_layers
    from symphony_vlm.moe.statistics import LoadStatistics

    processor, routing = model.processor, model.routing
    assert processor is not None and routing is not None
    images = processor.image_processor
    dataset = ConversationDataset(
        samples,
        encode=lambda sample: processor.encode(
            sample.messages,
            num_image_tokens=processor.count_tokens_of_files(sample.images),
            max_length=model.config.text_config.max_position_embeddings,
            origin=sample.origin,
        ),
        to_square=images.prepare,
    )
    collate = ConversationCollator(processor.tokenizer.pad_token_id, images.normalize)
    console = console or Console(stderr=True)
    statistics = LoadStatistics()
    starts = range(0, len(dataset), batch_size)
    for start in track(starts, "running the model", console=console, transient=True, disable=not console.is_terminal):
        batch = collate([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
        del batch["labels"]
        with torch.no_grad():
            # The routers are all that is wanted: logits of one position instead of all.
            model(**{key: value.to(model.device) for key, value in batch.items()}, use_cache=False, logits_to_keep=1)
        for key, output in routing.outputs.items():
            # Layers in front of the language model are named by a string; image features have no padding.
            statistics.add(key, output, routing.token_mask_T if isinstance(key, int) else None)
    loads = {str(key): values for key, values in statistics.read().items()}
    unreached = [str(layer.key) for _, layer in sparse_layers(model) if str(layer.key) not in loads]
    if unreached:
        raise InputError(
            f"no token reached the sparse layers {', '.join(unreached)}; have the records pictures?",
            where="data",
            remedy="Give data with images.",
        )
    return loads


def _measure_scenes(model: SymphonyVLMForConditionalGeneration, console: Console) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        scenes = generate_scenes(Path(folder), train=1, test=SCENES)
        return measure_load(model, open_samples(scenes.test_json), console=console)


def table(inspection: Inspection) -> Table:
    """One row per sparse layer; narrow enough for 80 columns."""
    has_graph = any(layer.graph is not None for layer in inspection.layers)
    uniform = " or ".join(f"{np.log(n):.3f}" for n in sorted({layer.num_experts for layer in inspection.layers}))
    result = Table(
        title=f"{inspection.model}: {inspection.router}",
        caption=(
            f"Load and entropies: {inspection.load_source}. Entropies in nats; a uniform gate has ln E = {uniform}. "
            "No token is dropped: experts have no limit. Apart: distance between experts' weights over their size; "
            "0 for copies, 1.41 for unrelated ones."
            + (" Edges: giving→receiving expert:weight. Drift: mean ‖A_t - A_t-1‖_F." if has_graph else "")
        ),
        title_justify="left",
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
    )
    names = ["layer", "E/K", "apart", "load\nCV", "gate\nentropy", "token\nentropy"]
    if has_graph:
        names += ["self\nweight", "eigen\ngap", "heaviest\nedges", "updates", "drift\na step"]
    for name in names:
        left = name in ("layer", "heaviest\nedges")
        result.add_column(name, justify="left" if left else "right", no_wrap="edges" not in name)
    for layer in inspection.layers:
        load, graph = layer.load, layer.graph
        cells = [layer.layer, f"{layer.num_experts}/{layer.num_experts_per_tok}", f"{layer.expert_distance:.2f}"]
        cells += [f"{load[name]:.3f}" for name in ("load_cv", "gate_entropy", "token_entropy")]
        if graph is not None:
            cells += [f"{graph['self_weight']:.3f}", f"{graph['spectral_gap']:.3f}"]
            cells += [" ".join(f"{giver}→{receiver}:{weight:.2f}" for receiver, giver, weight in graph["top_edges"])]
            cells += [str(graph["num_updates"]), "-" if graph["drift"] is None else f"{graph['drift']:.1e}"]
        result.add_row(*cells)
    return result


def summary(inspection: Inspection, paths: Sequence[Path]) -> dict[str, Any]:
    """The summary of ``--json``: all but the matrices and the curves, which ``inspect.json`` has."""
    facts = asdict(inspection)
    del facts["drift"]
    for layer in facts["layers"]:
        if layer["graph"] is not None:
            del layer["graph"]["adjacency"]
    return {**facts, "files": [str(path) for path in paths]}


def write_inspection(inspection: Inspection, output: Path) -> list[Path]:
    """Writes ``inspect.json`` and the figures; returns all paths."""
    from symphony_vlm.evaluation.inspection_figures import write_figures

    write_json(output / "inspect.json", asdict(inspection))
    return [output / "inspect.json", *write_figures(inspection, output)]


def _spread(samples: Sequence[Sample], limit: int) -> list[Sample]:
    """At most `limit` samples, evenly spread: the parts of a mixture often stand one after the other."""
    count = min(limit, len(samples))
    return [samples[i * len(samples) // count] for i in range(count)]


def _routing_log(folder: Path) -> list[dict[str, Any]]:
    """Lines about the stage that made the model: beside a finished model all of them, in a checkpoint the last one."""
    record, single = folder / "training.json", folder / "routing.json"
    if record.is_file():
        entries: list[dict[str, Any]] = json.loads(record.read_text(encoding="utf-8"))["routing"]
        return [entry for entry in entries if entry["stage"] == entries[-1]["stage"]]
    return [json.loads(single.read_text(encoding="utf-8"))] if single.is_file() else []


def _drift(entry: dict[str, Any], module: str) -> float | None:
    drift: float | None = entry["graphs"].get(f"{module}.router.expert_graph", {}).get("drift")
    return drift


def _drift_curve(log: Sequence[dict[str, Any]], module: str) -> dict[str, list[float]]:
    points = [(float(entry["step"]), drift) for entry in log if (drift := _drift(entry, module)) is not None]
    return {"step": [step for step, _ in points], "drift": [drift for _, drift in points]}
