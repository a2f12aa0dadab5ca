"""The report for programs: ``--json``, ``check.json`` and ``faults.jsonl``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from symphony_vlm.data.check.page import check_page
from symphony_vlm.data.check.report import CheckReport
from symphony_vlm.data.check.spans import SampleView
from symphony_vlm.files import write_json, write_text

__all__ = ["json_line", "write_files"]


def json_line(report: CheckReport) -> Iterator[str]:
    """The summary with every fault as one line of JSON, in pieces: it may be larger than memory should hold."""
    head = json.dumps(report.to_dict())
    yield head[:-1] + ', "faults": ['
    for number, line in enumerate(report.faults.lines()):
        yield (", " if number else "") + line
    yield "]}"


def write_files(report: CheckReport, views: Sequence[SampleView], folder: Path) -> dict[str, Path]:
    """``faults.jsonl`` (a line a fault), ``check.json`` (the rest) and ``check.html``, each whole or not at all.

    Returns:
        Their paths by these names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    faults = folder / "faults.jsonl"
    temporary = folder / ".faults.jsonl.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in report.faults.lines())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(faults)
    paths = {name: folder / name for name in ("check.html", "check.json")}
    write_json(paths["check.json"], report.to_dict())
    write_text(paths["check.html"], check_page(report, views))
    return paths | {"faults.jsonl": faults}
