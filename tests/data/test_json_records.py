"""JSON and JSON lines by byte offset: what json.loads says, in any window, at bounded memory, from any process."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from symphony_vlm.data import json_list_scan, json_records
from symphony_vlm.data.datasets import open_samples
from symphony_vlm.data.json_list_scan import ListScanner
from symphony_vlm.data.json_records import read_json_lines, read_json_list
from symphony_vlm.errors import InputError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
LAYOUTS = st.fixed_dictionaries(
    {"indent": st.sampled_from([None, 0, 2]), "ensure_ascii": st.booleans(), "separators": st.just((" ,\r\n", ":\t"))}
)


def scan(data: bytes, block: int) -> list[Any]:
    spans = ListScanner(io.BytesIO(data), name="a.json", digest=hashlib.sha256(), block=block).spans()
    return [json.loads(data[start:end].decode()) for start, end in zip(spans[::2], spans[1::2], strict=True)]


class TestListScanner:
    @given(st.lists(VALUES, max_size=6), LAYOUTS, st.integers(1, 40), st.text(" \t\r\n", max_size=5))
    def test_finds_what_json_loads_finds_in_any_window(
        self, values: list[Any], layout: dict[str, Any], block: int, space: str
    ) -> None:
        assert scan((space + json.dumps(values, **layout) + space).encode(), block) == values

    @given(st.lists(VALUES, min_size=1, max_size=4), LAYOUTS, st.integers(1, 40), st.data())
    def test_refuses_what_json_loads_refuses_at_the_same_place(
        self, values: list[Any], layout: dict[str, Any], block: int, data: st.DataObject
    ) -> None:
        text = json.dumps(values, **layout)
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 3))
        text = text[:at] + data.draw(st.text('[]{}",:\\u0-1.e n\n\x00x\u2028é', max_size=2)) + text[at + cut :]
        try:
            expected = json.loads(text)
        except json.JSONDecodeError as error:
            with pytest.raises(InputError) as caught:
                scan(text.encode(), block)
            # What is no list is refused unread. From Python 3.13 on json points at the comma of "[1,]".
            if text.lstrip(" \t\r\n")[:1] == "[" and not error.msg.startswith("Illegal trailing comma"):
                assert f"at line {error.lineno} column {error.colno}: " in str(caught.value)
        else:
            if isinstance(expected, list):
                assert scan(text.encode(), block) == expected
            else:
                with pytest.raises(InputError, match="must be one list of records"):
                    scan(text.encode(), block)

    @given(st.lists(TEXT, min_size=1, max_size=4), st.integers(1, 40), st.data())
    def test_names_the_byte_that_is_not_utf8(self, values: list[str], block: int, data: st.DataObject) -> None:
        content = json.dumps(values, ensure_ascii=False).encode()
        at = data.draw(st.integers(0, len(content) - 1))
        content = content[:at] + b"\xff" + content[at + 1 :]
        try:
            content.decode()
        except UnicodeDecodeError as error:
            # A broken quote can make the text before that byte invalid JSON, which is met first.
            with pytest.raises(InputError, match=f"at byte {error.start}$|at byte {error.start}\\.|is not valid JSON"):
                scan(content, block)

    def test_time_is_linear_in_the_size_of_long_records(self) -> None:
        data = json.dumps(["short", "x" * 3_000_000, "short"]).encode()
        scanner = ListScanner(io.BytesIO(data), name="a.json", digest=hashlib.sha256(), block=1000)
        seen = []
        decode = scanner._raw_decode

        def counting(text: str, at: int) -> tuple[Any, int]:
            seen.append(len(text) - at)
            return decode(text, at)

        scanner._raw_decode = counting  # type: ignore[method-assign]
        assert len(scanner.spans()) == 6
        # Doubling windows: 1 + 2 + 4 + ... below twice the last one, which is below twice the record.
        assert sum(seen) < 4 * len(data) + 10_000

    def test_an_error_is_found_without_reading_on(self) -> None:
        file = io.BytesIO(b'[{"id": oops}' + b", 1" * 100_000 + b"]")
        with pytest.raises(InputError, match="line 1 column 9: Expecting value"):
            ListScanner(file, name="a.json", digest=hashlib.sha256(), block=100).spans()
        assert file.tell() <= 200

    def test_a_large_object_is_refused_without_being_parsed(self) -> None:
        file = io.BytesIO(b'{"images": [' + b"1, " * 100_000 + b"1]}")
        with pytest.raises(InputError, match="begins with an object; a .json file must be one list"):
            ListScanner(file, name="a.json", digest=hashlib.sha256(), block=100).spans()
        assert file.tell() <= 400


class TestFiles:
    @pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
    def test_too_long_records(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (json_list_scan, json_records):
            monkeypatch.setattr(module, "MAX_RECORD_BYTES", 100)
        monkeypatch.setattr(json_list_scan, "_BLOCK", 50)
        path = tmp_path / name
        records = [json.dumps({"a": "x" * size}) for size in (10, 200, 20)]
        path.write_text("\n".join(records) if name == "a.jsonl" else f"[{', '.join(records)}]")
        if name == "a.json":
            with pytest.raises(InputError, match=r"a\.json: record 1: is longer than the 100 bytes"):
                read_json_list(path)
        else:
            found = read_json_lines(path)
            assert (found[0], found[2]) == ({"a": "x" * 10}, {"a": "x" * 20})
            with pytest.raises(InputError, match=r"line 2: is longer than the 100 bytes .*\(209 bytes\)"):
                found[1]

    @pytest.mark.parametrize("size", [1, 2, 7, 2**20])
    def test_lines_in_any_blocks(self, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(json_records, "_BLOCK", size)
        content = b'\xef\xbb\xbf \r\n{"a": "\xe2\x80\xa8"}\r\n\n\t \n[1]\n\n2'
        (tmp_path / "a.jsonl").write_bytes(content)
        records = read_json_lines(tmp_path / "a.jsonl")
        assert list(records) == [{"a": "\u2028"}, [1], 2]  # type: ignore[call-overload]
        assert [records.label(index) for index in range(3)] == ["line 2", "line 5", "line 7"]
        assert records.fingerprint == hashlib.sha256(content).hexdigest()

    def test_a_line_that_is_not_utf8_is_a_fault_of_that_record(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes('{"a": 1}\n{"é": "'.encode() + b'\xff"}\n{"a": 3}\n')
        records = read_json_lines(tmp_path / "a.jsonl")
        assert (records[0], records[2]) == ({"a": 1}, {"a": 3})
        with pytest.raises(InputError, match=r"a\.jsonl: line 2: is not UTF-8 text at column 8.*byte 0xff"):
            records[1]

    @pytest.mark.parametrize("line", ["[" * 100_000, "9" * 5000, '{"a": NaN', '{"a": "\x01"}', "\ufeff{}"])
    def test_hostile_lines_are_input_errors(self, line: str, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(line, encoding="utf-8")
        with pytest.raises(InputError, match=r"a\.jsonl: line 1: is not valid JSON") as caught:
            read_json_lines(tmp_path / "a.jsonl")[0] if not line.startswith("\ufeff") else self.second_mark(tmp_path)
        assert len(str(caught.value)) < 400

    @staticmethod
    def second_mark(folder: Path) -> None:
        (folder / "a.jsonl").write_text("\ufeff\ufeff{}", encoding="utf-8")
        read_json_lines(folder / "a.jsonl")[0]

    @pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
    def test_utf16_and_unreadable(self, name: str, tmp_path: Path) -> None:
        read = read_json_list if name == "a.json" else read_json_lines
        (tmp_path / name).write_text("[]", encoding="utf-16")
        with pytest.raises(InputError, match="is UTF-16 text.*Save it as UTF-8"):
            read(tmp_path / name)
        with pytest.raises(InputError, match="cannot be read"):
            read(tmp_path / "none" / name)

    def test_a_changed_file_is_noticed(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"a": 1}\n' * 3)
        records = read_json_lines(path)
        path.write_text('{"a": 1234}\n' * 3)
        with pytest.raises(InputError, match="has changed since it was opened"):
            records[0]
        path.unlink()
        with pytest.raises(InputError, match="can no longer be read"):
            records[0]


def write_records(folder: Path, name: str, count: int) -> Path:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "é" * 50}]
    lines = [json.dumps({"id": number, "conversations": turns}, ensure_ascii=False) for number in range(count)]
    text = "\n".join(lines) if name.endswith("l") else f"[{', '.join(lines)}]"
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


class TestProcesses:
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
    def test_forked_processes_have_positions_of_their_own(self, tmp_path: Path) -> None:
        source = open_samples(write_records(tmp_path, "a.jsonl", 400))
        assert source[0].id == "0"  # the file is open before the fork
        children = []
        for step in (1, 7, 11):
            child = os.fork()
            if child == 0:
                wrong = [i for i in range(400) for j in [(i * step) % 400] if source[j].id != str(j)]
                os._exit(1 if wrong else 0)
            children.append(child)
        assert all(source[j].id == str(j) for _ in range(5) for j in range(399, -1, -1))
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]

    def test_spawned_data_loader_workers(self, tmp_path: Path) -> None:
        from torch.utils.data import ConcatDataset, DataLoader

        sources = [open_samples(write_records(tmp_path, name, 30)) for name in ("a.json", "a.jsonl")]
        assert len(pickle.dumps(sources)) < 10_000
        loader: DataLoader[Any] = DataLoader(
            ConcatDataset(sources),  # type: ignore[list-item]
            batch_size=7,
            num_workers=1,
            collate_fn=list,
            multiprocessing_context="spawn",
        )
        assert [sample for batch in loader for sample in batch] == [*sources[0], *sources[1]]


WALK = """
import sys
from pathlib import Path
from symphony_vlm.data.datasets import open_samples
source = open_samples(Path(sys.argv[1]))
turns = sum(len(sample.messages) for sample in source)
# Not ru_maxrss: a child starts with its parent's, and the parent here is a whole test session.
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(len(source), turns, int(peak) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_million_records_are_walked_below_120_mb(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    record = '{"id": "%07d", "image": "%d.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?%s"}, '
    record += '{"from": "gpt", "value": "Number %d."}]}'
    with path.open("w") as file:
        file.write("" if name == "a.jsonl" else "[\n")
        for number in range(1_000_000):
            end = "\n" if name == "a.jsonl" or number == 999_999 else ",\n"
            file.write(record % (number, number, " and why?" * (number % 60), number) + end)
        file.write("" if name == "a.jsonl" else "]")
    assert path.stat().st_size > 350e6
    done = subprocess.run([sys.executable, "-c", WALK, str(path)], check=True, capture_output=True, text=True)
    records, turns, megabytes = map(int, done.stdout.split())
    # 65 were measured for a like file of 445 MB: Python with Pillow takes 38, the index 24. The rest is leeway.
    assert (records, turns) == (1_000_000, 2_000_000) and megabytes < 120
