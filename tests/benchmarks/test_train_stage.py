"""The benchmark of a stage's steps runs that stage as training does, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def test_it_measures_real_steps_of_the_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY)  # the benchmarks are no part of the installed package
    from benchmarks.train_stage import main

    output, table = tmp_path / "result.json", tmp_path / "profile.txt"
    settings = ["batch_size=2", "global_batch_size=4", "model.moe.router=smoe"]
    main(
        [
            "tiny",
            "instruct",
            "--steps",
            "4",
            "--image-size",
            "64",
            "--json",
            str(output),
            "--profile",
            str(table),
            *settings,
        ]
    )
    found = json.loads(output.read_text())
    assert found["steps"] == len(found["losses"]) == 4
    assert (found["batch_size"], found["gradient_accumulation_steps"]) == (2, 2)
    assert found["losses"][-1] < found["losses"][0]
    assert found["trained_parameters"] == found["parameters"] > 0
    assert found["samples_per_second"] > 0 and found["tokens_per_second"] > 0
    assert "aten::" in table.read_text()
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{\n") :])["samples_per_second"] == found["samples_per_second"]
