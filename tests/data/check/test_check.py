"""The pass over the data: every seeded fault and nothing else, exact counts, duplicates, tokens, memory."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from array import array
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from symphony_vlm.data.check.fault_log import FaultLog
from symphony_vlm.data.check.faults import KINDS, Fault
from symphony_vlm.data.check.images import ImageLimits
from symphony_vlm.data.check.keys import KeyColumn
from symphony_vlm.data.check.report import CheckReport
from symphony_vlm.data.check.run import CheckOptions, check_data, choose_views
from symphony_vlm.data.check.spans import view_sample
from symphony_vlm.data.check.tokens import TokenCheck, Tokenization, percentiles
from symphony_vlm.data.conversation import IGNORE_INDEX
from symphony_vlm.data.datasets import open_samples
from symphony_vlm.data.templates import get_template

REPOSITORY = Path(__file__).parents[3]


def _record(number: int, image: Any = "a.png", answer: str = "red", **changes: Any) -> dict[str, Any]:
    question = "<image>\nWhat color?" if image else "What is up?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    record = {"id": f"r{number}", "conversations": turns} | ({"image": image} if image else {}) | changes
    return {key: value for key, value in record.items() if value is not None}


def _check(folder: Path, records: Any, **settings: Any) -> CheckReport:
    path = folder / "train.json"
    path.write_text(json.dumps(records))
    return check_data([open_samples(path)], **settings)


def _found(report: CheckReport) -> list[tuple[int, str, str]]:
    return [(fault.index, fault.id, fault.kind) for fault in report.faults]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures a.png to d.png, of which d is a copy of a."""
    for number, name in enumerate("abc"):
        Image.new("RGB", (8 + number, 6), (number * 60, 0, 0)).save(tmp_path / f"{name}.png")
    (tmp_path / "d.png").write_bytes((tmp_path / "a.png").read_bytes())
    return tmp_path


# Seeded faults.


def _assert_all_found(seeded: Any, report: CheckReport) -> None:
    expected = [(fault.index, fault.id, fault.kind) for fault in seeded.faults]
    assert _found(report) == expected
    for fault, seed in zip(report.faults, seeded.faults, strict=True):
        assert f"record {seed.index}" in fault.reason
        assert seed.id == str(seed.index) or repr(seed.id) in fault.reason
        assert fault.file == seeded.data.name


def test_every_seeded_fault_is_found_with_its_kind_and_nothing_else(
    clean: Path, injector: ModuleType, tmp_path: Path
) -> None:
    n_faults = len(injector.FAULTS)
    assert n_faults >= 20
    seeded = injector.inject(clean, clean.parent, tmp_path / "broken", n_faults=n_faults, seed=1)
    assert {fault.name for fault in seeded.faults} == set(injector.FAULTS)
    source = open_samples(seeded.data, image_folder=seeded.image_folder)
    report = check_data([source])
    _assert_all_found(seeded, report)
    assert report.faults.by_kind == Counter(fault.kind for fault in seeded.faults)
    assert set(report.faults.by_kind) <= set(KINDS)
    assert list(check_data([source]).faults) == list(report.faults)


def test_clean_data_has_no_faults_and_exact_counts(clean: Path) -> None:
    records = json.loads(clean.read_text())
    report = check_data([open_samples(clean)])
    assert _found(report) == []
    assert report.n_records == len(records)
    assert len(report.ledger) == len({record["image"] for record in records})
    assert report.n_image_uses == len(records)
    assert report.modalities == {"text_only": 0, "one_image": len(records), "several_images": 0}


def test_a_line_that_is_no_json_is_a_fault_of_that_line(folder: Path) -> None:
    lines = [json.dumps(_record(0)), '{"id": "r1", "conv', "", json.dumps(_record(2, "b.png"))]
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines))
    report = check_data([open_samples(path)])
    assert _found(report) == [(1, "1", "invalid_json")]
    assert "line 2" in next(iter(report.faults)).reason


def test_each_broken_image_of_a_record_is_a_fault_and_a_shared_one_is_a_fault_of_each_record(folder: Path) -> None:
    both = _record(0, ["no1.png", "a.png", "no2.png", "no1.png"])
    both["conversations"][0]["value"] = "<image>" * 4
    report = _check(folder, [both, _record(1, "no2.png"), _record(2)])
    assert _found(report) == [(0, "r0", "image_missing")] * 2 + [(1, "r1", "image_missing")]
    assert report.faults.n_faulty_records == 2
    assert [f"no{n}.png" in fault.reason for n, fault in zip((1, 2, 2), report.faults, strict=True)] == [True] * 3


def test_reasons_of_shared_images_come_back_after_they_were_forgotten(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("symphony_vlm.data.check.scan._REMEMBERED_REASONS", 2)
    names = [f"no{number % 5}.png" for number in range(40)]
    report = _check(folder, [_record(number, name, str(number)) for number, name in enumerate(names)])
    assert [(fault.index, fault.kind) for fault in report.faults] == [(n, "image_missing") for n in range(40)]
    assert all(name in fault.reason for name, fault in zip(names, report.faults, strict=True))


@pytest.mark.parametrize(
    ("limits", "kinds"),
    [
        (ImageLimits(max_pixels=48), ["image_pixels", "image_pixels"]),
        (ImageLimits(max_bytes=10), ["image_bytes"] * 3),
        (ImageLimits(max_aspect_ratio=1.6), ["image_shape"]),
        (ImageLimits(min_side=6), []),
        (ImageLimits(min_side=7), ["image_shape"] * 3),
    ],
)
def test_the_limits_on_pictures_are_inclusive_settings(folder: Path, limits: ImageLimits, kinds: list[str]) -> None:
    """8 x 6, 9 x 6 and 10 x 6 pixels."""
    report = _check(
        folder, [_record(n, f"{name}.png") for n, name in enumerate("abc")], options=CheckOptions(limits=limits)
    )
    assert [fault.kind for fault in report.faults] == kinds


def test_the_default_limits_are_those_of_the_command(folder: Path) -> None:
    import typer

    from symphony_vlm.cli import app

    command: Any = typer.main.get_command(app)
    given = {p.name: p.default for p in command.commands["data"].commands["check"].params}
    limits = CheckOptions().limits
    assert given["max_pixels"] == limits.max_pixels
    assert given["max_file_bytes"] == limits.max_bytes
    assert given["max_aspect_ratio"] == limits.max_aspect_ratio
    assert given["min_side"] == limits.min_side


def test_truncated_pictures_are_faults_even_if_another_library_made_pillow_lenient(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "c.png")
    data = (folder / "c.png").read_bytes()
    (folder / "c.png").write_bytes(data[: len(data) // 2])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert _found(_check(folder, [_record(0, "c.png")])) == [(0, "r0", "image_damaged")]
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


# Duplicates.


def test_the_later_of_two_records_with_one_id_is_a_fault_or_a_note(folder: Path) -> None:
    records = [_record(0), _record(1, "b.png"), _record(0, "c.png"), _record(1, "b.png"), _record(0)]
    report = _check(folder, records)
    assert _found(report) == [(2, "r0", "duplicate_id"), (3, "r1", "duplicate_record"), (4, "r0", "duplicate_record")]
    assert "record 0" in next(iter(report.faults)).reason
    noted = _check(folder, records, options=CheckOptions(duplicate_ids="note"))
    assert [index for index, _, _ in _found(noted)] == [3, 4]
    assert {note.kind: note.count for note in noted.notes} == {"duplicate_id": 1}


def test_a_question_asked_again_under_another_id_is_a_note(folder: Path) -> None:
    report = _check(folder, [_record(0), _record(1), _record(2, "b.png")])
    assert _found(report) == []
    (note,) = report.notes
    assert (note.kind, note.count) == ("repeated_conversation", 1)
    assert "'r1'" in note.examples[0] and "record 0" in note.examples[0]


def test_records_without_ids_are_compared_whole(folder: Path) -> None:
    records = [_record(0, id=None, row=number) for number in (0, 1, 0)]
    assert _found(_check(folder, records)) == [(2, "2", "duplicate_record")]


def test_ids_that_are_numbers_of_other_records_do_not_collide_with_those_that_stand_in(folder: Path) -> None:
    records = [_record(0, "a.png", id=None), _record(1, "b.png", id=0), _record(2, "c.png", id=2)]
    assert _found(_check(folder, records)) == []


def test_a_picture_under_two_names_is_a_note(folder: Path) -> None:
    report = _check(folder, [_record(n, f"{name}.png") for n, name in enumerate("abcd")])
    assert _found(report) == []
    (note,) = report.notes
    assert (note.kind, note.count, note.examples) == ("duplicate_image", 1, ("a.png = d.png",))


def test_repeated_keys_are_those_of_a_dictionary() -> None:
    rng = np.random.default_rng(0)
    keys = [hashlib.blake2b(bytes([v]), digest_size=16).digest() for v in rng.integers(0, 60, 200)]
    owners = np.cumsum(rng.integers(1, 4, 200)).tolist()
    column, first, expected = KeyColumn(), dict[bytes, int](), []
    for key, owner in zip(keys, owners, strict=True):
        column.add(key, owner)
        if key in first:
            expected.append((owner, first[key]))
        else:
            first[key] = owner
    later, before = column.repeats()
    assert list(zip(later.tolist(), before.tolist(), strict=True)) == expected
    groups = {first[k]: [o for o, other in zip(owners, keys, strict=True) if other == k] for k in first}
    shared = [group for _, group in sorted(groups.items()) if len(group) > 1]
    assert list(column.groups(5)) == shared[:5]
    assert [len(values) for values in KeyColumn().repeats()] == [0, 0]


def test_the_log_of_faults_keeps_order_and_few_examples() -> None:
    log, other = FaultLog(), FaultLog()
    for index in (0, 2, 2, 5):
        other.add(Fault(index=index, id="é\u2028", reason="r", kind="tokens", file="f"))
    log.add_merged(other, [Fault(index=1, id="x", reason="r", kind="duplicate_id", file="f")])
    assert [fault.index for fault in log] == [0, 1, 2, 2, 5]
    assert (len(log), log.n_faulty_records) == (5, 4)
    for index in range(100):
        log.add(Fault(index=10 + index, id="x", reason="r", kind="tokens", file="f"))
    assert len(log.examples["tokens"]) == 20
    assert [json.loads(line)["index"] for line in log.lines()][:6] == [0, 1, 2, 2, 5, 10]


# Tokens.


def _tokenization(tokenizer: Any, **settings: Any) -> Tokenization:
    values = {"template": get_template("compact"), "num_image_tokens": 4, **settings}
    return Tokenization(tokenizer=tokenizer, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), **values)


def test_token_counts_are_those_of_the_encoded_records(folder: Path, tiny_tokenizer: Any) -> None:
    made = _tokenization(tiny_tokenizer)
    tokens = TokenCheck(made)
    records = [_record(n, image, "yes " * (n + 1)) for n, image in enumerate(["a.png", None, "b.png"])]
    report = _check(folder, records, tokens=tokens)
    encoded = [made.encode(open_samples(folder / "train.json")[n]) for n in range(3)]
    assert list(tokens.lengths) == [len(e.input_ids) for e in encoded]
    supervised = sum(label != IGNORE_INDEX for e in encoded for label in e.labels)
    assert tokens.supervised_share == supervised / sum(tokens.lengths)
    assert tokens.n_image_tokens == 8
    assert report.to_dict()["supervised_tokens_share"] == round(supervised / sum(tokens.lengths), 6)
    assert _found(report) == []


def test_a_limit_that_cuts_is_noted_and_one_that_leaves_nothing_is_a_fault(folder: Path, tiny_tokenizer: Any) -> None:
    two = _record(2, ["a.png", "b.png"])
    two["conversations"][0]["value"] = "<image> and then, after some words: <image>"
    records = [_record(0, None, "yes no " * 30), _record(1, None), two]
    records[1]["conversations"][0]["value"] = "What color is the circle? " * 10
    tokens = TokenCheck(_tokenization(tiny_tokenizer, max_length=24))
    report = _check(folder, records, tokens=tokens)
    assert _found(report) == [(1, "r1", "nothing_supervised"), (2, "r2", "image_cut")]
    assert tokens.n_truncated == 3
    assert {note.kind: note.count for note in report.notes} == {"longer_than_max_length": 3}


def test_percentiles_are_values_that_occur() -> None:
    assert percentiles(array("I")) == {}
    stats = percentiles(array("I", range(1, 101)))
    expected = {"mean": 50.5, "min": 1.0, "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
    assert stats == expected


def test_spans_cover_every_token_once_and_say_what_it_is(folder: Path, tiny_tokenizer: Any) -> None:
    made = _tokenization(tiny_tokenizer)
    record = _record(0, ["a.png", "b.png"], "a naïve 猫 <|user|>")
    record["conversations"][0]["value"] = "<image><image>Why 🦊?"
    (folder / "train.json").write_text(json.dumps([record]))
    sample = open_samples(folder / "train.json")[0]
    encoded = made.encode(sample)
    view = view_sample(sample, "train.json", 0, made)
    counts = [4 if span.kind == "image" else len(span.ids) for span in view.spans]
    assert sum(counts) == len(encoded.input_ids) == view.n_tokens
    assert [span.text for span in view.spans if span.kind == "image"] == ["[image x 4]"] * 2
    texts = {
        kind: "".join(s.text for s in view.spans if s.kind == kind) for kind in ("context", "supervised", "marker")
    }
    assert texts["context"] == "Why 🦊?"
    assert texts["supervised"] == "a naïve 猫 <|user|><|end|>"
    assert texts["marker"] == "<|user|><|assistant|>"
    cut = view_sample(sample, "train.json", 0, _tokenization(tiny_tokenizer, max_length=12))
    assert sum(len(s.ids) for s in cut.spans if s.kind == "cut") == len(encoded.input_ids) - 12


def test_samples_are_spread_and_unreadable_records_give_way(folder: Path) -> None:
    records: list[Any] = [_record(n, None) for n in range(10)]
    records[5] = "broken"
    (folder / "train.json").write_text(json.dumps(records))
    source = open_samples(folder / "train.json")
    assert [view.index for view in choose_views([source], 2, None)] == [0, 6]
    assert [view.index for view in choose_views([source], 99, None)] == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert choose_views([source], 0, None) == []


# Real data and size.


@pytest.mark.slow
def test_the_shared_stage_is_clean_with_exact_counts_in_a_minute(shared: Path) -> None:
    path, images = shared / "instruct" / "stage2.json", shared / "instruct" / "images"
    started = time.perf_counter()
    report = check_data([open_samples(path, image_folder=images)])
    assert time.perf_counter() - started < 60
    assert (report.n_records, len(report.ledger), _found(report)) == (15_721, 6_645, [])
    records = json.loads(path.read_text())
    hashes = Counter(hashlib.sha256((images / name).read_bytes()).digest() for name in {r["image"] for r in records})
    contents = Counter(json.dumps([r["image"], r["conversations"]]) for r in records)
    assert {note.kind: note.count for note in report.notes} == {
        "duplicate_image": sum(hashes.values()) - len(hashes),
        "repeated_conversation": sum(contents.values()) - len(contents),
    }


@pytest.mark.slow
def test_500_faults_seeded_into_the_shared_stage_are_500_faults(
    shared: Path, injector: ModuleType, tmp_path: Path
) -> None:
    instruct = shared / "instruct"
    seeded = injector.inject(instruct / "stage2.json", instruct / "images", tmp_path / "broken", n_faults=500)
    report = check_data([open_samples(seeded.data, image_folder=seeded.image_folder)])
    assert len(report.faults) == 500
    _assert_all_found(seeded, report)


MILLION = """
import json, sys
from pathlib import Path
from symphony_vlm.cli import main

path = Path(sys.argv[1]) / "many.jsonl"
with path.open("w") as file:
    for index in range(1_000_000):
        name = f"missing/{index}.png" if index % 4 else f"{index % 3}.png"
        turns = [{"from": "human", "value": f"<image>Question {index}?"}, {"from": "gpt", "value": "yes"}]
        file.write(json.dumps({"id": f"r{index}", "image": name, "conversations": turns}) + "\\n")
try:
    main(["data", "check", "--data", str(path), "--json"])
finally:
    # The high-water mark of this program; getrusage would give the parent's, if that was larger.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(peak.split()[1], "torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_million_records_most_of_them_broken_fit_into_half_a_gigabyte(tmp_path: Path) -> None:
    """The whole command, reading included: 750,000 faults are found and listed."""
    for number in range(3):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    with (tmp_path / "out").open("w+") as out:
        command = [sys.executable, "-c", MILLION, str(tmp_path)]
        result = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
        assert result.returncode == 1, result.stderr
        out.seek(0)
        summary = json.loads(out.read().splitlines()[-1])
    assert (summary["records"], summary["images"], summary["n_faults"]) == (1_000_000, 750_003, 750_000)
    assert len(summary["faults"]) == 750_000
    peak_kb, torch = result.stderr.split()[-2:]
    assert torch == "False"
    assert int(peak_kb) * 1024 < 500e6
