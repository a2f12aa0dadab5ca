"""The scripts in docs/examples run, and print what they claim to show."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


def _run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", [name, str(folder)])
    capsys.readouterr()
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_a_language_model_is_upcycled_inside_a_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = _run("upcycle_language_model.py", tmp_path / "model", monkeypatch, capsys)
    (difference,) = re.findall(r"largest difference of the logits (\S+)", printed)
    assert float(difference) < 1e-5  # the bound of `upcycle_` itself
    dense, sparse, again = (float(value) for value in re.findall(r"loss (\d\.\d+)", printed))
    assert sparse < dense < 5.0  # ln 256 = 5.55 knows nothing
    assert again == sparse
    assert "after 60 steps" in printed
    rows = [[float(value) for value in line.split()] for line in re.findall(r"^\d\.\d\d .*$", printed, re.MULTILINE)]
    assert len(rows) == 4 and all(sum(row) == pytest.approx(1.0, abs=0.03) for row in rows)  # two decimals each
    assert any(row[column] > 0 for number, row in enumerate(rows) for column in range(4) if column != number)


def test_two_routers_are_compared_on_noisy_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = _run("compare_routers.py", tmp_path / "run", monkeypatch, capsys)
    clean = dict(re.findall(r"^(\w+) \{'short_answer/none/0': (\d\.\d+)", printed, re.MULTILINE))
    noisy = dict(re.findall(r"^(\w+) \{.*'short_answer/gaussian_noise/5': (\d\.\d+)", printed, re.MULTILINE))
    assert set(clean) == set(noisy) == {"smoe", "symphony_smoe"}
    for router, score in clean.items():
        assert float(score) > 0.5  # one of six colours: guessing gives 0.17
        assert float(noisy[router]) < float(score)
    (verdict,) = re.findall(r"^On short_answer, .*$", printed, re.MULTILINE)
    assert re.search(r"p = \d\.\d+, 80 images; on clean images symphony_smoe minus smoe", verdict)
    assert (tmp_path / "run/comparison/comparison.html").is_file()
