"""Reading data files: each format gives the same samples, each fault names record, field and remedy."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from symphony_vlm.data.datasets import SampleSource, check_samples, open_samples, split_by_image
from symphony_vlm.data.sample import ImagePart, Message, TextPart
from symphony_vlm.errors import InputError

Record = dict[str, Any]


def record(question: str = "<image>\nWhat?", answer: Any = "A cat.", **fields: Any) -> Record:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "a7", "image": "a.png", "conversations": turns} | fields


def turns(*pairs: tuple[Any, Any]) -> Record:
    return {"id": "a7", "conversations": [{"from": role, "value": value} for role, value in pairs]}


def write_json(folder: Path, records: Any, name: str = "train.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def write_image(path: Path, color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), color).save(path)
    return path


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return buffer.getvalue()


def parts(message: Message) -> list[str | int]:
    return [part.index if isinstance(part, ImagePart) else part.text for part in message.parts]


@pytest.fixture
def write_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes rows with pyarrow; ``datasets`` keeps its cache inside the test's folder."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(rows: list[Record], name: str = "train.parquet") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path

    return write


class TestLlavaRecords:
    def test_a_record_becomes_a_sample(self, tmp_path: Path) -> None:
        sample = open_samples(write_json(tmp_path, [record(source="coco", label=3)]))[0]
        assert (sample.id, sample.origin) == ("a7", "train.json: record 0 (id 'a7')")
        assert [message.role for message in sample.messages] == ["user", "assistant"]
        assert sample.messages[0].parts == (ImagePart(index=0), TextPart(text="\nWhat?"))
        assert sample.messages[1].parts == (TextPart(text="A cat."),)
        assert (sample.images[0].path, sample.images[0].name) == (tmp_path / "a.png", "a.png")
        assert sample.meta == {"source": "coco", "label": 3}

    def test_interleaved_images_keep_their_order(self, tmp_path: Path) -> None:
        value = "First <image> then <image><image>\n?"
        sample = open_samples(write_json(tmp_path, [record(value, image=["c.png", "a.png", "b.png"])]))[0]
        assert parts(sample.messages[0]) == ["First ", 0, " then ", 1, 2, "\n?"]
        assert [image.name for image in sample.images] == ["c.png", "a.png", "b.png"]

    def test_markers_in_later_turns(self, tmp_path: Path) -> None:
        value = turns(("human", "<image>A?"), ("gpt", "1"), ("human", "B<image>?"), ("gpt", "2"))
        sample = open_samples(write_json(tmp_path, [value | {"image": ["a", "b"]}]))[0]
        assert [parts(message) for message in sample.messages] == [[0, "A?"], ["1"], ["B", 1, "?"], ["2"]]

    @pytest.mark.parametrize(("image", "first"), [("a.png", [0, "\nWhat?"]), (["a", "b"], [0, 1, "\nWhat?"])])
    def test_images_without_marker_go_first(self, tmp_path: Path, image: Any, first: list[str | int]) -> None:
        value = turns(("system", "Be brief."), ("human", "What?"), ("gpt", "A"), ("human", "B?"), ("gpt", "C"))
        sample = open_samples(write_json(tmp_path, [value | {"image": image}]))[0]
        assert [parts(message) for message in sample.messages] == [["Be brief."], first, ["A"], ["B?"], ["C"]]

    @pytest.mark.parametrize("fields", [{}, {"image": None}, {"image": []}])
    def test_text_only(self, tmp_path: Path, fields: Record) -> None:
        sample = open_samples(write_json(tmp_path, [turns(("user", "Hi"), ("assistant", "Hello")) | fields]))[0]
        assert sample.images == () and parts(sample.messages[0]) == ["Hi"]

    def test_marker_in_an_answer_is_text_when_the_questions_match(self, tmp_path: Path) -> None:
        sample = open_samples(write_json(tmp_path, [record(answer="It shows <image>.")]))[0]
        assert parts(sample.messages[1]) == ["It shows <image>."]

    @pytest.mark.parametrize(("given", "expected"), [(None, "0"), (5, "5"), ("x", "x")])
    def test_id(self, tmp_path: Path, given: Any, expected: str) -> None:
        sample = open_samples(write_json(tmp_path, [record(id=given)]))[0]
        assert sample.id == expected and ("(id" in sample.origin) == (given is not None)

    def test_image_folder_absolute_paths_and_data_urls(self, tmp_path: Path) -> None:
        folder = tmp_path / "images"
        absolute = write_image(folder / "b.png")
        url = "data:image/png;base64,iVBORw0KGgo="
        path = write_json(tmp_path, [record(image="b.png"), record(image=str(absolute)), record(image=url)])
        source = open_samples(path, image_folder=folder)
        assert source[0].images[0].path == absolute == source[1].images[0].path
        assert source[2].images[0].data == b"\x89PNG\r\n\x1a\n"


SHORT_OF_MARKERS = record("<image><image> and <image>?", image=["a", "b"])


class TestLlavaFaults:
    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ("text", r"record 1: is 'text'; a record must be an object"),
            ({"id": "a7"}, r"\(id 'a7'\): field 'conversations' is missing.*Fields of this record: id"),
            (record(conversations="x"), r"field 'conversations' is 'x'; it must be a list"),
            (record(conversations=[]), r"field 'conversations' is \[\]"),
            (record(conversations=["x"]), r"'conversations\[0\]' is 'x'"),
            (
                record(conversations=[{"speaker": "user", "text": "x"}]),
                r"must be \{\"from\": \"human\".* or \{\"role\"",
            ),
            (turns(("bot", "x")), r"'conversations\[0\]\.from' is 'bot'; it must be one of human, user, gpt"),
            (turns(("tool", "x")), r"'conversations\[0\]' is part of a tool call"),
            (turns((["human"], "x")), r"'conversations\[0\]\.from' is \['human'\]"),
            (turns(("gpt", "x")), r"conversations\[0\]\.from' is 'gpt' where human"),
            (turns(("human", "x"), ("human", "y")), r"conversations\[1\]\.from' is 'human' where gpt"),
            (
                turns(("human", "x"), ("gpt", "y"), ("system", "z")),
                r"conversations\[2\]\.from' is 'system' where human",
            ),
            (turns(("human", "x")), r"last of 1 turns is from 'human'; a conversation must end with an answer"),
            (turns(("system", "x")), r"last of 1 turns is from 'system'"),
            (record(answer=" \n"), r"conversations\[1\]\.value' is ' \\n'; an answer must not be empty"),
            (record(answer=5), r"conversations\[1\]\.value' is 5; it must be a string"),
            (record(answer=None), r"conversations\[1\]\.value' is None; it must be a string"),
            (record(answer="\ud800"), r"conversations\[1\]\.value' has half a surrogate pair at character 0"),
            (SHORT_OF_MARKERS, r"3 <image> marker\(s\) in the questions but 2 image\(s\)"),
            (record(image=["a", "b"]), r"1 <image> marker\(s\) in the questions but 2 image\(s\).*Give one marker"),
            (record(image=None), r"1 <image> marker\(s\) in the questions but 0 image\(s\)"),
            (
                record("What?", "<image>"),
                r"0 <image> marker\(s\) in the questions \(and 1 in answers.* but 1 image\(s\)",
            ),
            (
                record(image=None, image_path="a"),
                r"0 image\(s\).*'image_path' is not read; images are read from 'image'",
            ),
            (record(images=["b"]), r"has both the fields 'image' and 'images'"),
            (record(messages=[]), r"has both the fields 'conversations' and 'messages'"),
            (record(image=""), r"field 'image' is ''; it must be a path"),
            (record(image=7), r"field 'image' is 7; it must be a path"),
            (record(image=["a", None]), r"field 'image\[1\]' is None"),
            (record(image={"url": "a"}), r"field 'image' is \{'url': 'a'\}"),
            (record(image="https://example.org/a.png"), r"'image' is the web address .*Download"),
            (record(image="data:image/png;base64,?"), r"not valid base64"),
            (record(id=1.5), r"field 'id' is 1\.5; it must be a string or an integer"),
            (record(answer=["x" * 500]), r"value' is \['x+\.\.\.; it must be"),
        ],
    )
    def test_fault_names_record_field_and_requirement(self, tmp_path: Path, bad: Any, message: str) -> None:
        source = open_samples(write_json(tmp_path, [record(), bad]))
        assert source[0].id == "a7"
        with pytest.raises(InputError, match=message) as caught:
            source[1]
        assert str(caught.value).startswith("train.json: record 1") and "\n" not in str(caught.value)


class TestFiles:
    def test_json_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "train.JSONL"
        lines = [json.dumps(record(id=1, source="a\u2028b"), ensure_ascii=False), "", json.dumps(record(id=2)), "{oops"]
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
        source = open_samples(path)
        assert len(source) == 3
        assert source[0].meta["source"] == "a\u2028b"
        assert source[1].origin == "train.JSONL: line 3 (id '2')"
        with pytest.raises(InputError, match=r"train\.JSONL: line 4: is not valid JSON at column 2"):
            source[2]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('[\n {"id": 1},\n {"id": }]', r"not valid JSON at line 3 column 9: Expecting value"),
            ('[{"id": 1} {"id": 2}]', r"line 1 column 12: expecting ',' or '\]'"),
            ('[{"id": 1},', r"line 1 column 12: Expecting value"),
            ('[{"id": 1},]', r"line 1 column 12"),
            ('[{"id": 1}', r"line 1 column 11: expecting ','"),
            ("[{}] []", r"line 1 column 6: extra data"),
            ("[", r"line 1 column 2"),
            ("", r"line 1 column 1"),
            ('[{"id": "cut', r"line 1 column 9: Unterminated string"),
            ("[" * 100_000, r"nested too deeply"),
            ('{"id": 1}\n{"id": 2}', r"begins with an object with the fields id.*name the file \.jsonl"),
            ('"text"', r"begins with 'text'; a \.json file must be one list"),
            ("[ ]", r"holds no records"),
        ],
    )
    def test_invalid_json_has_line_and_column(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "train.json"
        path.write_text(text)
        with pytest.raises(InputError, match=message) as caught:
            open_samples(path)
        assert "train.json" in str(caught.value)

    def test_json_list_in_any_layout(self, tmp_path: Path) -> None:
        path = tmp_path / "train.json"
        for text in (json.dumps([record(id=1), record(id=2)]), json.dumps([record(id=1), record(id=2)], indent=3)):
            path.write_text(f" \n{text}\n ")
            assert [sample.id for sample in open_samples(path)] == ["1", "2"]

    def test_not_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "train.json"
        path.write_bytes(b'["\xff"]')
        with pytest.raises(InputError, match=r"train\.json: is not UTF-8 text.*at byte 2"):
            open_samples(path)

    def test_missing_unknown_and_wrong_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no\.json.*does not exist"):
            open_samples(tmp_path / "no.json")
        (tmp_path / "train.csv").touch()
        with pytest.raises(InputError, match=r"extension '\.csv'.*\.jsonl.*\.parquet"):
            open_samples(tmp_path / "train.csv")
        path = write_json(tmp_path, [record()])
        with pytest.raises(InputError, match="image folder .*is not a folder"):
            open_samples(path, image_folder=tmp_path / "nowhere")
        with pytest.raises(InputError, match=r"holds neither \*\.parquet, .* nor a data set saved"):
            open_samples(tmp_path)

    def test_sequence_fingerprint_and_pickle(self, tmp_path: Path) -> None:
        path = write_json(tmp_path, [record(id=number) for number in range(5)])
        source = open_samples(path)
        assert (len(source), source.path) == (5, path)
        assert source.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
        assert [sample.id for sample in source] == ["0", "1", "2", "3", "4"]
        assert source[-1].id == "4" and [sample.id for sample in source[1:3]] == ["1", "2"]
        with pytest.raises(IndexError):
            source[5]
        assert pickle.loads(pickle.dumps(source))[3] == source[3]

    def test_import_is_light(self) -> None:
        code = (
            "import sys, symphony_vlm.data.datasets\n"
            "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'symphony_vlm.model', 'symphony_vlm.training'}\n"
            "sys.exit(', '.join(heavy & set(sys.modules)) or None)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestTables:
    def test_question_rows(self, tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
        rows: list[Record] = [
            {
                "id": "q1",
                "image": {"bytes": png(), "path": "cat.png"},
                "question": "What?",
                "answer": "cat",
                "label": 3,
            },
            {"id": None, "image": {"bytes": png(), "path": None}, "question": "<image>Q", "answer": "dog", "label": 4},
            {"id": "q3", "image": {"bytes": None, "path": "b.png"}, "question": "What?", "answer": "fox", "label": 5},
            {"id": "q4", "image": None, "question": "What?", "answer": "owl", "label": 6},
        ]
        path = write_parquet(rows)
        source = open_samples(path)
        assert source.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
        assert [parts(sample.messages[0]) for sample in source] == [[0, "\nWhat?"], [0, "Q"], [0, "\nWhat?"], ["What?"]]
        assert [parts(sample.messages[1]) for sample in source] == [["cat"], ["dog"], ["fox"], ["owl"]]
        assert [sample.id for sample in source] == ["q1", "1", "q3", "q4"]
        assert source[0].images[0].data == png() and source[0].images[0].name == "cat.png"
        assert source[1].images[0].name == "row 1" and source[1].origin == "train.parquet: row 1"
        assert source[2].images[0].path == tmp_path / "b.png"
        assert source[0].meta == {"label": 3}
        assert pickle.loads(pickle.dumps(source))[0] == source[0]

    @pytest.mark.parametrize(("image", "data"), [(png(), png()), ("b.png", None)], ids=["bytes", "path"])
    def test_image_as_bytes_or_path(self, image: Any, data: bytes | None, write_parquet: Callable[..., Path]) -> None:
        ref = open_samples(write_parquet([{"image": image, "question": "Q", "answer": "A"}]))[0].images[0]
        assert ref.data == data and (ref.path is None) == (data is not None)

    @pytest.mark.parametrize(
        ("answer", "expected"),
        [("x", "x"), (3, "3"), (2.5, "2.5"), (["b", "a", "a"], "a"), (["b", "a"], "b"), (["", "", "a"], "a")],
    )
    def test_answers(self, answer: Any, expected: str, write_parquet: Callable[..., Path]) -> None:
        sample = open_samples(write_parquet([{"question": "Q", "answer": answer}]))[0]
        assert sample.messages[1].text == expected
        assert sample.meta == ({"answers": answer} if isinstance(answer, list) else {})

    @pytest.mark.parametrize("answer", [None, "", [], [" "], True, float("nan"), [1, 2], {"text": "x"}])
    def test_unusable_answers(self, answer: Any, write_parquet: Callable[..., Path]) -> None:
        source = open_samples(write_parquet([{"question": "Q", "answer": answer}]))
        with pytest.raises(InputError, match=r"train\.parquet: row 0: field 'answer'"):
            source[0]

    def test_llava_rows(self, write_parquet: Callable[..., Path]) -> None:
        row = record() | {"image": [{"bytes": png(), "path": None}]}
        sample = open_samples(write_parquet([row]))[0]
        assert parts(sample.messages[0]) == [0, "\nWhat?"] and sample.images[0].data == png()
        assert sample.images[0].name == "row 0, image[0]"

    def test_image_column_of_datasets_stays_encoded_and_saved_folder(
        self, tmp_path: Path, write_parquet: Callable[..., Path]
    ) -> None:
        import datasets

        features = datasets.Features(
            {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
        )
        rows = {"image": [{"bytes": b"not an image", "path": None}], "question": ["Q"], "answer": ["A"]}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(tmp_path / "a.parquet"))
        table.save_to_disk(str(tmp_path / "saved"))
        datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "dict"))
        sources = [open_samples(tmp_path / name) for name in ("a.parquet", "saved", "dict/train")]
        assert [source[0].images[0].data for source in sources] == [b"not an image"] * 3
        assert all(len(source.fingerprint) == 64 for source in sources)
        assert sources[1].image_folder == tmp_path / "saved"
        with pytest.raises(InputError, match=r"several splits \(test, train\).*with split"):
            open_samples(tmp_path / "dict")

    def test_folder_of_parquet_files(self, tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
        for number in range(2):
            row = {"question": f"Q{number}", "answer": "A"}
            write_parquet([row], f"parts [v1]/train-{number:05}-of-00002.parquet")
        folder = tmp_path / "parts [v1]"
        source = open_samples(folder)
        assert [sample.messages[0].text for sample in source] == ["Q0", "Q1"]
        before = source.fingerprint
        (folder / "train-00001-of-00002.parquet").rename(folder / "train-00002-of-00002.parquet")
        assert open_samples(folder).fingerprint != before
        write_parquet([{"question": "Q", "answer": "A"}], "parts [v1]/test-00000-of-00001.parquet")
        with pytest.raises(InputError, match=r"several splits \(test, train\)"):
            open_samples(folder)

    def test_unreadable_and_wrong_columns(self, tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
        (tmp_path / "bad.parquet").write_bytes(b"not parquet")
        with pytest.raises(InputError, match=r"bad\.parquet: cannot be read as parquet"):
            open_samples(tmp_path / "bad.parquet")
        with pytest.raises(
            InputError, match=r"has the columns question, reply; it must have either conversations, or messages, or"
        ):
            open_samples(write_parquet([{"question": "Q", "reply": "A"}]))
        (tmp_path / "saved").mkdir()
        (tmp_path / "saved/state.json").write_text("{}")
        with pytest.raises(InputError, match=r"state\.json does not describe"):
            open_samples(tmp_path / "saved")


class TestPreflight:
    @pytest.fixture
    def source(self, tmp_path: Path) -> SampleSource:
        """Eight records over three good images, with four faults of three kinds."""
        for color in ("red", "green", "blue"):
            write_image(tmp_path / f"{color}.png", color)
        (tmp_path / "cut.png").write_bytes((tmp_path / "red.png").read_bytes()[:45])
        (tmp_path / "zero.png").touch()
        images: list[Any] = [
            "red.png",
            "green.png",
            "red.png",
            "cut.png",
            "zero.png",
            "x/../red.png",
            "no.png",
            "blue.png",
        ]
        records = [record(id=f"r{number}", image=image) for number, image in enumerate(images)]
        records[7]["conversations"][1]["value"] = ""
        return open_samples(write_json(tmp_path, records))

    def test_error_names_faults_total_and_setting(self, source: SampleSource) -> None:
        with pytest.raises(InputError) as caught:
            check_samples(source)
        text = str(caught.value)
        assert text.startswith("4 of 8 records cannot be used: (1) train.json: record 3 (id 'r3')")
        assert all(
            word in text for word in ("cut.png", "truncated", "zero.png", "no.png", "record 7", "on_bad_sample: skip")
        )

    def test_an_image_above_the_limit_on_pixels_is_a_fault(self, tmp_path: Path) -> None:
        Image.new("RGB", (20, 10)).save(tmp_path / "large.png")
        Image.new("RGB", (4, 4)).save(tmp_path / "small.png")
        path = write_json(tmp_path, [record(image="large.png"), record(image="small.png")])
        report = check_samples(open_samples(path), on_bad_sample="skip", max_pixels=199)
        assert report.usable == (1,)
        assert "20 x 10 = 200 pixels; the limit is 199" in report.faults[0].reason

    def test_skip_reports(self, source: SampleSource) -> None:
        calls: list[tuple[int, int]] = []
        report = check_samples(source, on_bad_sample="skip", progress=lambda done, total: calls.append((done, total)))
        assert (report.n_records, report.n_images, report.n_image_uses) == (8, 5, 7)
        assert report.usable == (0, 1, 2, 5)
        assert [(fault.index, fault.id) for fault in report.faults] == [(3, "r3"), (4, "r4"), (6, "r6"), (7, "r7")]
        assert calls == [(done, 8) for done in range(1, 9)]

    def test_without_decoding_only_presence_is_checked(self, source: SampleSource) -> None:
        report = check_samples(source, on_bad_sample="skip", decode_images=False)
        assert [fault.index for fault in report.faults] == [4, 6, 7]

    def test_each_distinct_image_is_decoded_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        opened: list[Any] = []
        real_open = Image.open

        def counting_open(stream: Any) -> Image.Image:
            opened.append(stream)
            return real_open(stream)

        monkeypatch.setattr(Image, "open", counting_open)
        write_image(tmp_path / "a.png")
        report = check_samples(open_samples(write_json(tmp_path, [record()] * 20)))
        assert len(opened) == report.n_images == 1 and report.n_image_uses == 20

    def test_only_five_faults_are_named(self, tmp_path: Path) -> None:
        source = open_samples(write_json(tmp_path, [record(id=number) for number in range(12)]))
        with pytest.raises(InputError, match=r"^12 of 12 .*\(5\) train\.json: record 4.*; and 7 more\. ") as caught:
            check_samples(source)
        assert "record 5" not in str(caught.value)

    def test_skipping_everything_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="1 of 1 records.*None is left"):
            check_samples(open_samples(write_json(tmp_path, [record()])), on_bad_sample="skip")


class TestSplit:
    @staticmethod
    def source(folder: Path, images: list[Any]) -> SampleSource:
        records = [
            record("Q" if image is None else "<image>" * len(image), id=f"r{number}", image=image)
            for number, image in enumerate(images)
        ]
        return open_samples(write_json(folder, records))

    def test_no_image_is_on_both_sides_and_the_share_is_met(self, tmp_path: Path) -> None:
        source = self.source(tmp_path, [[f"{number % 100}.png"] for number in range(300)])
        train, validation = split_by_image(source, range(300), fraction=0.1, seed=0)
        assert len(validation) == 30 and sorted(train + validation) == list(range(300))
        assert not {index % 100 for index in train} & {index % 100 for index in validation}
        assert split_by_image(source, range(300), fraction=0.1, seed=0) == (train, validation)
        assert split_by_image(source, range(300), fraction=0.1, seed=1)[1] != validation

    def test_independent_of_order_and_of_the_folder(self, tmp_path: Path) -> None:
        images: list[Any] = [[f"{number}.png"] for number in range(50)]
        chosen = []
        for name, order in (("a", images), ("b", images[::-1])):
            (tmp_path / name).mkdir()
            source = self.source(tmp_path / name, order)
            _, validation = split_by_image(source, range(50), fraction=0.2, seed=3)
            chosen.append({source[index].images[0].name for index in validation})
        assert chosen[0] == chosen[1] and len(chosen[0]) == 10

    def test_records_linked_through_other_records_stay_together(self, tmp_path: Path) -> None:
        source = self.source(tmp_path, [["a", "b"], ["b", "c"], ["d"], ["x/../c", "e"], ["f"]])
        for seed in range(20):
            train, validation = split_by_image(source, range(5), fraction=0.4, seed=seed)
            assert {0, 1, 3} <= set(train) and validation

    def test_usable_only_and_text_only_by_id(self, tmp_path: Path) -> None:
        source = self.source(tmp_path, [["a"], None, None, ["b"], None])
        train, validation = split_by_image(source, [1, 2, 3], fraction=0.34, seed=0)
        assert sorted(train + validation) == [1, 2, 3] and len(validation) == 1

    def test_one_of_each_if_there_are_two_groups(self, tmp_path: Path) -> None:
        source = self.source(tmp_path, [["a"], ["a"], ["a"], ["b"]])
        assert split_by_image(source, range(4), fraction=0.001, seed=0) == ([0, 1, 2], [3])
        train, validation = split_by_image(source, range(4), fraction=0.99, seed=0)
        assert train and validation
        assert split_by_image(source, [0, 1, 2], fraction=0.5, seed=0) == ([0, 1, 2], [])
        assert split_by_image(source, range(4), fraction=0, seed=0) == ([0, 1, 2, 3], [])
        assert split_by_image(source, [], fraction=0.5, seed=0) == ([], [])

    @pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
    def test_fraction_out_of_range(self, tmp_path: Path, fraction: float) -> None:
        with pytest.raises(InputError, match="at least 0 and below 1"):
            split_by_image(self.source(tmp_path, [["a"]]), [0], fraction=fraction, seed=0)

    def test_rows_with_the_same_bytes_stay_together(self, write_parquet: Callable[..., Path]) -> None:
        colors = ["red", "green", "red", "blue", "red"]
        rows = [{"image": png(color), "question": str(number), "answer": "A"} for number, color in enumerate(colors)]
        train, validation = split_by_image(open_samples(write_parquet(rows)), range(5), fraction=0.5, seed=0)
        assert {0, 2, 4} <= set(train) and validation == [1, 3]


class TestRealData:
    @pytest.fixture
    def shared(self) -> Path:
        default = Path(__file__).resolve().parents[3] / "shared" / "data"
        folder = Path(os.environ.get("SYMPHONY_VLM_SHARED_DATA", default))
        if not (folder / "instruct" / "stage2.json").is_file():
            pytest.skip(f"no development data in {folder} (set SYMPHONY_VLM_SHARED_DATA)")
        return folder

    def test_stage_two_is_whole(self, shared: Path) -> None:
        source = open_samples(shared / "instruct" / "stage2.json", image_folder=shared / "instruct" / "images")
        report = check_samples(source)
        assert (report.n_records, report.n_images, report.faults) == (15_721, 6_645, ())
        train, validation = split_by_image(source, report.usable, fraction=0.02, seed=0)
        assert (len(train), len(validation)) == (15_407, 314)
        names = [{source[index].images[0].name for index in side} for side in (train, validation)]
        assert not names[0] & names[1]

    @pytest.mark.parametrize(
        ("name", "n_records", "n_images"),
        [("stage1.json", 4_429, 3_232), ("stage2/daquar_train_multiturn.json", 794, 794)],
    )
    def test_counts(self, shared: Path, name: str, n_records: int, n_images: int) -> None:
        source = open_samples(shared / "instruct" / name, image_folder=shared / "instruct" / "images")
        report = check_samples(source, decode_images=False)
        assert (report.n_records, report.n_images) == (n_records, n_images)

    def test_parquet_opens_lazily(self, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        source = open_samples(shared / "cifar10" / "train.parquet")
        assert len(source) == 30_000 and source[-1].messages[1].text and source[29_999].images[0].data
