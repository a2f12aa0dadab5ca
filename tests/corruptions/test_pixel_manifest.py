"""The committed hashes of corrupted pixels: this machine makes the same, and a difference is named."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from symphony_vlm.cli import main
from symphony_vlm.corruptions import ALL, CORRUPTIONS
from symphony_vlm.corruptions.pixel_manifest import (
    PixelDifference,
    committed_manifest,
    generated_pictures,
    pixel_differences,
    pixel_manifest,
)

REMEDY = "see 'The same pixels everywhere' in docs/corruptions.md"


def test_this_machine_makes_the_committed_pixels(frost_folder: Path | None) -> None:
    names = [name for name in CORRUPTIONS if name != "frost" or frost_folder is not None]
    found, wanted = pixel_manifest(names), committed_manifest()
    versions = {name: (found["versions"][name], wanted["versions"][name]) for name in wanted["versions"]}
    assert pixel_differences(found, wanted) == [], f"versions here and there: {versions}; {REMEDY}"
    assert found["canary"] == wanted["canary"]


def test_everything_is_in_the_committed_manifest() -> None:
    wanted = committed_manifest()
    assert list(wanted["versions"]) == ["numpy", "opencv", "pillow", "scipy", "libjpeg"]
    assert list(wanted["pictures"]) == ["pattern 1x1", "pattern 17x31", "pattern 224x336", "page 160x224"]
    assert set(ALL) < set(CORRUPTIONS)
    for rows in wanted["pictures"].values():
        assert set(rows) == {"clean", *CORRUPTIONS}
        assert all(
            re.fullmatch(r"[0-9a-f]{16}( [0-9a-f]{16}){4}", row) for name, row in rows.items() if name != "clean"
        )
    large = wanted["pictures"]["pattern 224x336"]
    hashes = [large["clean"], *(part for name, row in large.items() if name != "clean" for part in row.split())]
    assert len(set(hashes)) == 1 + 5 * len(CORRUPTIONS), "no two corruptions or severities have the same pixels"


def test_generated_pictures() -> None:
    pictures = generated_pictures()
    for name, picture in pictures.items():
        assert "{}x{}".format(*picture.shape[:2]) == name.split()[1]
    pattern = pictures["pattern 224x336"]
    assert pattern.min() == 0 and pattern.max() == 255 and len({tuple(p) for p in pattern.reshape(-1, 3)}) > 10_000
    assert (pictures["page 160x224"] == 255).all(axis=2).mean() > 0.6, "mostly white"


def test_differences_are_named() -> None:
    wanted = committed_manifest()
    found = copy.deepcopy(wanted)
    del found["pictures"]["page 160x224"]["frost"]
    row = found["pictures"]["page 160x224"]["fog"].split()
    found["pictures"]["page 160x224"]["fog"] = " ".join([*row[:2], "0" * 16, *row[3:]])
    found["pictures"]["pattern 1x1"]["clean"] = "0" * 16
    assert pixel_differences(found, wanted) == [
        PixelDifference("pattern 1x1", "clean", 0),
        PixelDifference("page 160x224", "fog", 3),
    ]


def _command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["verify-corruptions", *arguments])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


def test_the_command_says_what_differs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SYMPHONY_VLM_FROST_DIR", str(tmp_path))
    wanted = committed_manifest()
    module = "symphony_vlm.corruptions.pixel_manifest"
    here = copy.deepcopy(wanted)
    for rows in here["pictures"].values():
        del rows["frost"]
    asked: list[list[str]] = []
    monkeypatch.setattr(f"{module}.pixel_manifest", lambda names: asked.append(list(names)) or here)
    code, out, err = _command(capsys, "--output", str(tmp_path / "here.json"))
    # Four clean pictures and five severities of 20 corruptions each.
    assert (code, out) == (0, "404 of 404 pictures have the committed pixels\n")
    assert "frost is left out" in err and "frost" not in asked[0] and len(asked[0]) == 20
    assert json.loads((tmp_path / "here.json").read_text()) == here

    here["versions"]["opencv"] = "4.0"
    here["pictures"]["page 160x224"]["snow"] = " ".join(["0" * 16] * 5)
    code, out, err = _command(capsys, "--json")
    summary: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert code == 1
    assert (summary["n_pictures"], summary["n_differences"], summary["same_draws"]) == (404, 5, True)
    assert summary["differences"][0] == {"picture": "page 160x224", "corruption": "snow", "severity": 1}
    assert summary["other_versions"] == {"opencv": ["4.0", wanted["versions"]["opencv"]]}
    assert "page 160x224: snow severity 1: other pixels" in err
    assert f"opencv 4.0 is here, {wanted['versions']['opencv']} made the committed hashes" in err
