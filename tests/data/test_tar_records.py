"""Webdataset shards: samples by key, read in place; every broken member is named."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest

from symphony_vlm.data import tar_records
from symphony_vlm.data.datasets import SampleSource, open_samples
from symphony_vlm.data.sample import ImagePart
from symphony_vlm.errors import InputError

TURNS = [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]


def info(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    return member


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


def write_tar(path: Path, *members: tuple[str, Any], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    """Members are bytes, text, anything that becomes JSON, or a ready `TarInfo` (a link)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, value in members:
            if isinstance(value, tarfile.TarInfo):
                tar.addfile(value)
                continue
            data = (
                value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value)).encode()
            )
            tar.addfile(info(name, len(data)), io.BytesIO(data))
    return path


def layout(source: SampleSource, index: int = 0) -> list[str | int]:
    return [part.index if isinstance(part, ImagePart) else part.text for part in source[index].messages[0].parts]


def data(source: SampleSource, index: int = 0) -> list[bytes | None]:
    return [image.data for image in source[index].images]


class TestSamples:
    def test_records_captions_and_their_fields(self, tmp_path: Path) -> None:
        path = write_tar(
            tmp_path / "a.tar",
            ("0001.jpg", b"one"),
            ("0001.json", {"id": "x7", "conversations": TURNS, "source": "s"}),
            ("0002.jpg", b"two"),
            ("0002.txt", "A cat.\n"),
            ("0002.json", {"caption": "A cat.", "url": "https://x", "width": 3}),
            ("0003.json", {"question": "Q", "answer": "A"}),
            ("0003.cls", "7"),
        )
        source = open_samples(path)
        assert [sample.id for sample in source] == ["x7", "0002", "0003"]
        assert [layout(source, index) for index in range(3)] == [[0, "Q"], [0], ["Q"]]
        assert [data(source, index) for index in range(3)] == [[b"one"], [b"two"], []]
        assert source[0].origin == "a.tar: sample '0001' (id 'x7')" and source[0].images[0].name == "0001.jpg"
        assert source[1].messages[1].text == "A cat."
        assert source[1].meta == {"caption": "A cat.", "url": "https://x", "width": 3}
        assert source[0].meta == {"source": "s"}

    def test_images_in_the_order_of_their_numbers(self, tmp_path: Path) -> None:
        members = [(f"a.{number}.png", str(number).encode()) for number in (10, 2, 1)]
        source = open_samples(write_tar(tmp_path / "a.tar", *members, ("a.txt", "Three.")))
        assert data(source) == [b"1", b"2", b"10"] and layout(source) == [0, 1, 2]
        members = [("a.img10.JPG", b"10"), ("a.jpg", b"first"), ("a.img9.webp", b"9")]
        assert data(open_samples(write_tar(tmp_path / "b.tar", *members, ("a.txt", "x")))) == [b"9", b"10", b"first"]

    @pytest.mark.parametrize(
        ("image", "expected"),
        [
            (["a.1.png", "a.0.png"], [b"1", b"0"]),
            (["1.png", "0.png"], [b"1", b"0"]),
            (["coco/x.png", "coco/y.png"], [b"0", b"1"]),
            (None, [b"0", b"1"]),
            ([], [b"0", b"1"]),
        ],
    )
    def test_a_record_may_name_its_images(self, image: Any, expected: list[bytes], tmp_path: Path) -> None:
        record = {"image": image, "question": "<image> or <image>?", "answer": "A"}
        path = write_tar(tmp_path / "a.tar", ("d/a.0.png", b"0"), ("d/a.1.png", b"1"), ("d/a.json", record))
        assert data(open_samples(path)) == expected

    def test_messages_with_places(self, tmp_path: Path) -> None:
        content = [{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "text", "text": " it?"}]
        record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]}
        source = open_samples(write_tar(tmp_path / "a.tar", ("a.png", b"x"), ("a.json", record)))
        assert layout(source) == ["Is ", 0, " it?"] and data(source) == [b"x"]

    def test_keys_reach_over_folders_gaps_and_hidden_files(self, tmp_path: Path) -> None:
        path = write_tar(
            tmp_path / "a.tar",
            ("./x/1.jpg", b"x1"),
            ("x", link("x", tarfile.DIRTYPE)),
            ("y/1.jpg", b"y1"),
            ("y/1.txt", "y"),
            ("./x/._1.jpg", b"mac"),
            ("./x/1.txt", "x"),
        )
        source = open_samples(path)
        assert [(sample.id, sample.images[0].data) for sample in source] == [("./x/1", b"x1"), ("y/1", b"y1")]

    @pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_tar_dialects(self, tar_format: int, tmp_path: Path) -> None:
        name = f"{'n' * 90}/{'m' * 60}" if tar_format == tarfile.USTAR_FORMAT else "\u00e9" + "n" * 200
        path = write_tar(tmp_path / "a.tar", (f"{name}.jpg", b"x"), (f"{name}.txt", "A"), tar_format=tar_format)
        assert open_samples(path)[0].id == name

    def test_a_folder_of_shards(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tar_records, "_OPEN_SHARDS", 2)
        for shard in range(5):
            members = [(f"{n}.{e}", f"{shard}{n}") for n in range(shard) for e in ("jpg", "txt")]
            write_tar(tmp_path / f"s/train-{shard:06}.tar", *members)
        source = open_samples(tmp_path / "s")
        expected = [f"{shard}{n}".encode() for shard in range(5) for n in range(shard)]
        assert len(source) == 10
        for order in (range(10), range(9, -1, -1), [0, 9, 3, 6, 1]):
            assert [source[index].images[0].data for index in order] == [expected[index] for index in order]
        assert source[-1].origin == "s: train-000004.tar: sample '3' (id '3')"
        assert list(pickle.loads(pickle.dumps(source))) == list(source)
        with pytest.raises(IndexError):
            source[10]

    def test_fingerprint_follows_names_and_sizes(self, tmp_path: Path) -> None:
        prints = set()
        for members in (
            [("a.jpg", b"x"), ("a.txt", "A")],
            [("a.jpg", b"xy"), ("a.txt", "A")],
            [("b.jpg", b"x"), ("b.txt", "A")],
        ):
            prints.add(open_samples(write_tar(tmp_path / "a.tar", *members)).fingerprint)
            assert open_samples(tmp_path / "a.tar").fingerprint in prints
        assert len(prints) == 3


RECORD = {"question": "Q", "answer": "A"}


class TestFaults:
    @pytest.mark.parametrize(
        ("members", "message"),
        [
            ([("b.jpg", b"x")], r"neither a record .* nor a caption \(\.txt\) among its files b\.jpg"),
            ([("b.jpg", b"x"), ("b.json", {"url": "x"})], r"among its files b\.jpg, b\.json"),
            ([("b.txt", "A")], r"has a caption \(\.txt\) but no image"),
            ([("b.jpg", b"x"), ("b.txt", " \n")], r"field 'answer' is ''; an answer must not be empty"),
            ([("b.jpg", b"x"), ("b.txt", b"\xff")], r"the member 'b\.txt' is not UTF-8 text at column 1"),
            ([("b.json", "{oops")], r"the member 'b\.json' is not valid JSON at column 2"),
            ([("b.json", "{\n\n  oops")], r"the member 'b\.json' is not valid JSON at line 3 column 3"),
            ([("b.json", b'{"a": "\xff"}')], r"the member 'b\.json' is not UTF-8 text at column 8"),
            ([("b.json", "[1]")], r"the member 'b\.json' is not one JSON object"),
            (
                [("b.jpg", b"x"), ("b.json", {**RECORD, "image": ["a", "b"]})],
                r"2 image\(s\) of its own, but the shard 1",
            ),
            ([("b.jpg", b"x"), ("b.json", {**RECORD, "image": {"path": "a"}})], r"1 image\(s\) of its own"),
            ([("b.jpg", b"x"), ("b.jpg", b"y"), ("b.txt", "A")], r"the member 'b\.jpg' stands twice"),
            ([("b.jpg", link("b.jpg", tarfile.SYMTYPE)), ("b.txt", "A")], r"'b\.jpg' is a link.*--dereference"),
            ([("b.jpg", link("b.jpg", tarfile.LNKTYPE)), ("b.txt", "A")], r"'b\.jpg' is a link"),
            ([("b.jpg", link("b.jpg", tarfile.FIFOTYPE)), ("b.txt", "A")], r"a device"),
            ([("b.jpg", b"x" * 2000), ("b.txt", "A")], r"the member 'b\.jpg' has 2,000 bytes; the limit is 1,000"),
        ],
    )
    def test_are_those_of_one_sample(
        self, members: list[tuple[str, Any]], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tar_records, "MAX_MEMBER_BYTES", 1000)
        path = write_tar(tmp_path / "a.tar", ("a.json", RECORD), *members, ("c.json", RECORD))
        source = open_samples(path)
        assert len(source) == 3 and source[0].id == "a" and source[2].id == "c"
        with pytest.raises(InputError, match=message) as caught:
            source[1]
        assert str(caught.value).startswith("a.tar: sample 'b'") and "\n" not in str(caught.value)

    @pytest.fixture
    def content(self, tmp_path: Path) -> bytes:
        members = [(f"{n}.{e}", b"x" * 600) for n in "abc" for e in ("jpg", "txt")]
        return write_tar(tmp_path / "whole.tar", *members, tar_format=tarfile.USTAR_FORMAT).read_bytes()

    def test_cut_inside_a_member(self, content: bytes, tmp_path: Path) -> None:
        # Each member takes 512 bytes of header and 1,024 of data; the cut is in c.jpg, whose c.txt is lost.
        (tmp_path / "a.tar").write_bytes(content[: 4 * 1536 + 812])
        source = open_samples(tmp_path / "a.tar")
        assert len(source) == 3 and source[1].id == "b"
        with pytest.raises(InputError, match=r"sample 'c': has neither a record .* among its files c\.jpg"):
            source[2]
        (tmp_path / "b.tar").write_bytes(content[: 5 * 1536 + 812])
        with pytest.raises(
            InputError, match=r"b\.tar: sample 'c': the member 'c\.txt' is cut off: 600 .* 300 are there"
        ):
            open_samples(tmp_path / "b.tar")[2]

    @pytest.mark.parametrize("kind", ["header", "cut at a header", "cut in a header"])
    def test_damage_between_members_is_one_fault(self, kind: str, content: bytes, tmp_path: Path) -> None:
        at = 4 * 1536
        damaged = {
            "header": content[:at] + b"\x01" * 512 + content[at + 512 :],
            "cut at a header": content[:at],
            "cut in a header": content[: at + 100],
        }
        (tmp_path / "a.tar").write_bytes(damaged[kind])
        source = open_samples(tmp_path / "a.tar")
        assert [source[index].id for index in range(2)] == ["a", "b"] and len(source) == 3
        with pytest.raises(InputError, match=r"damaged or cut off at byte 6,144.*follows the member 'b\.txt'"):
            source[2]

    def test_no_tar_file(self, tmp_path: Path) -> None:
        import gzip

        whole = write_tar(tmp_path / "whole.tar", ("a.json", RECORD)).read_bytes()
        for content in (b"", b"x" * 2000, gzip.compress(whole)):
            (tmp_path / "a.tar").write_bytes(content)
            with pytest.raises(InputError, match=r"a\.tar: cannot be read as an uncompressed tar file"):
                open_samples(tmp_path / "a.tar")
        with pytest.raises(InputError, match="holds no records"):
            open_samples(write_tar(tmp_path / "empty.tar"))
