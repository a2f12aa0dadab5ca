"""`symphony-vlm inspect`: what it says is what the model's routers do."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from symphony_vlm import cli
from symphony_vlm.data.datasets import open_samples
from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.inspection import (
    Inspection,
    LayerFacts,
    inspect_model,
    measure_load,
    summary,
    table,
    write_inspection,
)
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import expert_graphs

QUIET = Console(quiet=True)
LAYER = "language_model.model.layers.{}.mlp"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six records of scenes."""
    return generate_scenes(tmp_path_factory.mktemp("scenes"), train=6, test=1).train_json


def _save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder


def _log_entry(step: int, *, load: list[float], drift: float, stage: str = "instruct") -> dict[str, Any]:
    layer = {"load": load, "load_cv": 0.5, "gate_entropy": 1.0, "token_entropy": 0.9, "tokens": 100}
    graphs = {f"{LAYER.format(i)}.router.expert_graph": {"drift": drift * (i + 1)} for i in range(2)}
    return {"stage": stage, "step": step, "layers": {"0": layer, "1": layer}, "graphs": graphs}


# What is measured.


def test_measured_load_is_that_of_every_token_of_every_record(tiny_moe_model: Any, scenes: Path) -> None:
    """Against one record at a time, without padding, and the router's choices counted one by one."""
    model, samples = tiny_moe_model, open_samples(scenes)
    found = measure_load(model, samples, batch_size=4, console=QUIET)
    slots = {layer: [0] * 4 for layer in (0, 1)}
    entropy, tokens = {0: 0.0, 1: 0.0}, 0
    for sample in samples:
        encoded = model.processor.encode(sample.messages)
        pixels = model.processor.image_processor([Image.open(ref.path) for ref in sample.images])["pixel_values"]
        with torch.no_grad():
            model(input_ids=torch.tensor([encoded.input_ids]), pixel_values=pixels)
        tokens += len(encoded.input_ids)
        for layer, output in model.routing.outputs.items():
            for expert in output.indices_TK.flatten().tolist():
                slots[layer][expert] += 1
            entropy[layer] += float(torch.distributions.Categorical(logits=output.logits_TE).entropy().sum())
    for layer in (0, 1):
        facts = found[str(layer)]
        assert facts["tokens"] == tokens
        # A close race may end otherwise in a batch, where the products are rounded in another order: some slots.
        assert np.abs(np.array(facts["load"]) - np.array(slots[layer]) / (2 * tokens)).max() <= 4 / tokens
        assert facts["token_entropy"] == pytest.approx(entropy[layer] / tokens, rel=1e-5)


def test_measuring_changes_nothing_in_the_model(tiny_moe_model: Any, scenes: Path) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_moe_model.state_dict().items()}
    measure_load(tiny_moe_model, open_samples(scenes), console=QUIET)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_moe_model.state_dict().items())
    assert not any(graph.take_counts().any() for _, graph in expert_graphs(tiny_moe_model))


def test_the_graph_described_is_the_one_in_the_model(tiny_moe_model: Any, tmp_path: Path, scenes: Path) -> None:
    matrix = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.3, 0.7, 0.0, 0.0], [0.0, 0.0, 0.9, 0.1], [0.0, 0.0, 0.1, 0.9]])
    for _, graph in expert_graphs(tiny_moe_model):
        graph.adjacency_EE.copy_(matrix)
        graph.num_updates.fill_(17)
    found = inspect_model(_save(tiny_moe_model, tmp_path / "model"), data=scenes, console=QUIET)
    assert [layer.layer for layer in found.layers] == ["0", "1"]
    assert found.router == "symphony_smoe"
    for layer in found.layers:
        assert (layer.num_experts, layer.num_experts_per_tok) == (4, 2)
        assert layer.graph is not None
        np.testing.assert_allclose(layer.graph["adjacency"], matrix, atol=1e-6)
        assert layer.graph["self_weight"] == pytest.approx(0.8)
        # Two communities that nothing connects.
        assert layer.graph["spectral_gap"] == pytest.approx(0.0, abs=1e-6)
        assert {edge[:2] for edge in layer.graph["top_edges"]} >= {(0, 1), (1, 0)}
        assert layer.graph["num_updates"] == 17
        assert layer.graph["drift"] is None, "there is no log"


def test_a_limit_takes_records_from_all_over_the_file(tiny_model_folder: Path, scenes: Path) -> None:
    half = inspect_model(tiny_model_folder, data=scenes, limit=3, console=QUIET)
    assert half.load_source == f"3 records of {scenes}"
    samples = open_samples(scenes)
    chosen = [samples[0], samples[2], samples[4]]
    tokens = sum(layer.load["tokens"] for layer in half.layers[:1])
    from symphony_vlm.model.loading import load

    processor = load(tiny_model_folder).processor
    assert processor is not None
    assert tokens == sum(len(processor.encode(sample.messages).input_ids) for sample in chosen)


# Where load and drift come from without data.


def test_without_data_load_and_drift_are_those_of_the_training_log(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    entries = [
        _log_entry(80, load=[0.1, 0.2, 0.3, 0.4], drift=0.5, stage="pretrain"),
        _log_entry(20, load=[0.1, 0.2, 0.3, 0.4], drift=0.003),
        _log_entry(40, load=[0.4, 0.3, 0.2, 0.1], drift=0.001),
    ]
    (folder / "training.json").write_text(json.dumps({"routing": entries}))
    found = inspect_model(folder, console=QUIET)
    assert found.load_source == "the training log up to step 40"
    assert [layer.load["load"] for layer in found.layers] == [[0.4, 0.3, 0.2, 0.1]] * 2
    assert [layer.graph["drift"] for layer in found.layers if layer.graph] == [0.001, 0.002]
    # The earlier stage made another model and counts its own steps.
    assert found.drift == {
        "0": {"step": [20.0, 40.0], "drift": [0.003, 0.001]},
        "1": {"step": [20.0, 40.0], "drift": [0.006, 0.002]},
    }


def test_in_a_checkpoint_they_are_those_saved_with_it(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-40"
    shutil.copytree(tiny_model_folder, folder)
    entry = _log_entry(40, load=[0.4, 0.3, 0.2, 0.1], drift=0.001)
    del entry["stage"]
    (folder / "routing.json").write_text(json.dumps(entry))
    found = inspect_model(folder, console=QUIET)
    assert found.load_source == "the training log up to step 40"
    assert found.drift["0"] == {"step": [40.0], "drift": [0.001]}


def test_without_data_and_log_scenes_are_drawn_and_run(tiny_model_folder: Path) -> None:
    found = inspect_model(tiny_model_folder, console=QUIET)
    assert found.load_source == "32 generated scenes"
    for layer in found.layers:
        # At least the picture's 16 tokens each.
        assert layer.load["tokens"] > 32 * 16
        assert 0 < layer.load["token_entropy"] <= layer.load["gate_entropy"] <= math.log(4) + 1e-6


def test_a_log_of_other_layers_is_not_taken_for_this_models(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    entry = _log_entry(20, load=[0.25] * 4, drift=0.1)
    del entry["layers"]["1"]
    (folder / "training.json").write_text(json.dumps({"routing": [entry]}))
    assert inspect_model(folder, console=QUIET).load_source == "32 generated scenes"


# Bad input.


def test_a_dense_model_has_nothing_to_inspect(tiny_model: Any, tmp_path: Path, scenes: Path) -> None:
    folder = _save(tiny_model, tmp_path / "dense")
    with pytest.raises(InputError, match=r"dense: the model has no mixture-of-experts layers.* upcycle: true"):
        inspect_model(folder, data=scenes, console=QUIET)


@pytest.mark.parametrize(("option", "value"), [("limit", 4), ("image_folder", Path())])
def test_options_of_the_data_need_data(option: str, value: Any, tiny_model_folder: Path) -> None:
    with pytest.raises(InputError, match=f"--{option.replace('_', '-')}: is given without data"):
        inspect_model(tiny_model_folder, console=QUIET, **{option: value})


def test_bad_data_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(InputError, match="holds no records"):
        inspect_model("no/such/model", data=tmp_path / "data.json", console=QUIET)


# What is shown and written.


def made_up(
    *, layers: int, experts: int, k: int = 2, graph: bool = True, steps: tuple[int, ...] = (10, 20, 30)
) -> Inspection:
    """An inspection with random figures."""
    rng = np.random.default_rng(layers)
    facts = []
    for index in range(layers):
        load = rng.dirichlet(np.full(experts, 3.0))
        off = rng.random((experts, experts)) ** 3
        np.fill_diagonal(off, 0)
        matrix = 0.5 * np.eye(experts) + 0.5 * off / np.maximum(off.sum(1, keepdims=True), 1e-9)
        described = {
            "adjacency": matrix.tolist(),
            "self_weight": 0.5,
            "spectral_gap": 0.25,
            "top_edges": [(experts - 1, 0, 0.4), (0, experts - 1, 0.3), (0, 1, 0.2)] if experts > 1 else [],
            "num_updates": 123456,
            "drift": 1.5e-3,
        }
        facts.append(
            LayerFacts(
                layer=str(index),
                name=LAYER.format(index),
                num_experts=experts,
                num_experts_per_tok=k,
                expert_distance=0.125,
                load={
                    "load": load.tolist(),
                    "load_cv": float(load.std() / load.mean()),
                    "gate_entropy": 1.25,
                    "token_entropy": 0.75,
                    "tokens": 100,
                },
                graph=described if graph else None,
            )
        )
    curve = {"step": [float(step) for step in steps], "drift": [1 / step for step in steps]}
    return Inspection(
        model="runs/a/model",
        router="symphony_smoe" if graph else "smoe",
        load_source="12 records of a.json",
        layers=tuple(facts),
        drift={fact.layer: curve for fact in facts} if graph else {},
    )


def _shown(inspection: Inspection, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(table(inspection))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("experts", [4, 64])
def test_the_table_has_every_figure_in_80_columns(experts: int) -> None:
    inspection = made_up(layers=2, experts=experts)
    shown = _shown(inspection, 80)
    assert "…" not in shown, "something was cut"
    for layer in inspection.layers:
        row = next(line for line in shown.splitlines() if line.startswith(layer.layer + " "))
        figures = row.split()
        assert figures[:2] == [layer.layer, f"{experts}/2"]
        assert figures[2:4] == ["0.12", f"{layer.load['load_cv']:.3f}"]
        assert figures[4:8] == ["1.250", "0.750", "0.500", "0.250"]
        # Row 'experts - 1' of the matrix takes from expert 0.
        assert figures[8] == f"0→{experts - 1}:0.40"
        assert figures[9:] == ["123456", "1.5e-03"]
    text = " ".join(shown.split())
    assert "12 records of a.json" in text
    assert f"ln E = {math.log(experts):.3f}" in text
    assert "No token is dropped" in text


def test_the_table_of_a_plain_router_says_nothing_of_graphs() -> None:
    shown = _shown(made_up(layers=2, experts=4, graph=False), 80)
    assert "entropy" in shown
    for word in ("eigen", "heaviest", "drift", "Edges"):
        assert word not in shown


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (2, 4), (7, 16), (24, 8), (3, 64), (1, 1)])
def test_figures_of_all_sizes_are_drawn_without_overlap(layers: int, experts: int, tmp_path: Path) -> None:
    """The layout engine warns when something does not fit, and warnings are errors here."""
    import warnings

    inspection = made_up(layers=layers, experts=experts, k=min(2, experts))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = write_inspection(inspection, tmp_path)
    expected = ["inspect.json", "load.png", "adjacency.png", "drift.png"]
    if experts == 1:
        expected.remove("adjacency.png")
    assert [path.name for path in paths] == expected
    for path in paths[1:]:
        with Image.open(path) as image:
            assert image.format == "PNG"
            # A4 at 150 dots per inch is 1240 x 1754; a screen scrolls at most some of these.
            assert 500 < image.width < 4000 and 250 < image.height < 4000
            assert len(image.convert("RGB").getcolors(2**24) or []) > 20, "an empty picture"


def test_equal_inspections_give_equal_files(tmp_path: Path) -> None:
    for name in "ab":
        write_inspection(made_up(layers=2, experts=4), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_graph_that_never_moved_and_a_log_of_one_line_can_be_drawn(tmp_path: Path) -> None:
    inspection = made_up(layers=1, experts=4, steps=(10,))
    (layer,) = inspection.layers
    assert layer.graph is not None
    still = replace(layer, graph=layer.graph | {"adjacency": np.eye(4).tolist(), "top_edges": []})
    paths = write_inspection(replace(inspection, layers=(still,)), tmp_path)
    assert [path.name for path in paths] == ["inspect.json", "load.png", "adjacency.png"]
    assert " 123456 " in _shown(replace(inspection, layers=(still,)), 80)


def test_the_json_file_has_everything_and_the_summary_all_but_the_matrices(tmp_path: Path) -> None:
    inspection = made_up(layers=2, experts=4)
    paths = write_inspection(inspection, tmp_path)
    written = json.loads((tmp_path / "inspect.json").read_text())
    assert written["drift"] == inspection.drift
    assert written["layers"][1]["graph"]["adjacency"] == inspection.layers[1].graph["adjacency"]  # type: ignore[index]
    short = summary(inspection, paths)
    assert short["files"] == [str(path) for path in paths]
    assert short["layers"][1]["load"] == written["layers"][1]["load"]
    assert set(written["layers"][1]["graph"]) - set(short["layers"][1]["graph"]) == {"adjacency"}
    assert inspection.layers[0].graph is not None and "adjacency" in inspection.layers[0].graph, "left as it was"


def test_the_command_prints_the_table_or_the_summary(
    tiny_model_folder: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["inspect", "--model", str(tiny_model_folder), "--data", str(scenes), "--limit", "2"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--output", str(tmp_path / "out")])
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert "symphony_smoe" in shown and "eigen" in shown
    assert shown.splitlines()[-1] == str(tmp_path / "out" / "adjacency.png")
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--json"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["load_source"] == f"2 records of {scenes}"
    assert [layer["layer"] for layer in last["layers"]] == ["0", "1"]
    assert last["files"] == []


@pytest.mark.parametrize("modules", [("language", "vision")])
def test_layers_outside_the_decoder_are_named_by_their_part(
    modules: tuple[str, ...], tiny_model_factory: Callable[..., Any], tmp_path: Path, scenes: Path
) -> None:
    model = tiny_model_factory(moe=MoEConfig(num_experts=4, router="symphony_smoe", modules=modules))
    found = inspect_model(_save(model, tmp_path / "model"), data=scenes, limit=2, console=QUIET)
    assert {layer.layer.split(".")[0] for layer in found.layers} >= {"vision", "0", "1"}
    for layer in found.layers:
        assert layer.load["tokens"] > 0
        assert layer.graph is not None
