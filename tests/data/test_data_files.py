"""Tables on disk and on the hub: Arrow files, splits, formats of folders, names of hub data sets."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from symphony_vlm.data.data_files import find_data_files
from symphony_vlm.data.datasets import open_samples
from symphony_vlm.data.hub import is_hub_id, open_hub_table
from symphony_vlm.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(*questions: str) -> Any:
    import pyarrow as pa

    return pa.table({"question": list(questions), "answer": ["A"] * len(questions)})


def write_parquet(path: Path, *questions: str) -> Path:
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table(*questions or (path.stem,)), path)
    return path


def write_arrow(path: Path, *questions: str, stream: bool) -> Path:
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    content = table(*questions)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), content.schema) as writer:
        writer.write_table(content, max_chunksize=2)
    return path


def questions(*args: Any, **options: Any) -> list[str]:
    return [sample.messages[0].text for sample in open_samples(*args, **options)]


class TestArrow:
    @pytest.mark.parametrize("stream", [True, False])
    def test_file(self, stream: bool, tmp_path: Path) -> None:
        source = open_samples(write_arrow(tmp_path / "a.arrow", *"abcde", stream=stream))
        assert [sample.messages[0].text for sample in source] == list("abcde")
        assert source[3].origin == "a.arrow: row 3" and source.image_folder == tmp_path
        assert list(pickle.loads(pickle.dumps(source))) == list(source)

    @pytest.mark.parametrize("second", [True, False])
    def test_folder(self, second: bool, tmp_path: Path) -> None:
        write_arrow(tmp_path / "x [v1]/p0.arrow", *"abc", stream=True)
        write_arrow(tmp_path / "x [v1]/p1.arrow", *"de", stream=second)
        assert questions(tmp_path / "x [v1]") == list("abcde")

    def test_streams_are_read_in_place(self, tmp_path: Path) -> None:
        open_samples(write_arrow(tmp_path / "a.arrow", "a", stream=True))
        assert not (tmp_path / "cache").exists()

    def test_damaged(self, tmp_path: Path) -> None:
        path = write_arrow(tmp_path / "a.arrow", *"abcde", stream=True)
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(InputError, match=r"a\.arrow: cannot be read as arrow"):
            list(open_samples(path))


class TestSplits:
    @pytest.mark.parametrize(
        ("names", "split", "expected"),
        [
            (["a", "b"], None, ["a", "b"]),
            (["train-00000-of-00002", "train-00001-of-00002"], None, ["train-00000-of-00002", "train-00001-of-00002"]),
            (["test-00000-of-00001", "train-00000-of-00001"], "train", ["train-00000-of-00001"]),
            (["test_a", "train"], "test", ["test_a"]),
            (["cc-train-01", "cc-val-01"], "validation", ["cc-val-01"]),
            (["train_gen-00000-of-00001", "train_sft-00000-of-00001"], "train_sft", ["train_sft-00000-of-00001"]),
            (["x-train-00000-of-00001", "x-dev-00000-of-00001"], "train", ["x-train-00000-of-00001"]),
            (["contest", "latest", "trainer"], None, ["contest", "latest", "trainer"]),
        ],
    )
    def test_files_of_a_split(self, names: list[str], split: str | None, expected: list[str], tmp_path: Path) -> None:
        for name in names:
            (tmp_path / f"{name}.tar").touch()
        file_format, files = find_data_files(tmp_path, split)
        assert file_format == "tar" and [file.stem for file in files] == expected

    @pytest.mark.parametrize(
        ("names", "split", "message"),
        [
            (["test", "train"], None, r"several splits \(test, train\)\. Choose one with split"),
            (["test", "extra"], None, r"several splits \(files without the name of a split, test\)"),
            (["test", "train"], "validation", r"has no split 'validation'\. Found: test, train"),
            (["a", "b"], "train", r"has no split 'train'\. Found: files without the name of a split"),
            (
                ["train_gen-00000-of-00001", "train_sft-00000-of-00001"],
                "train",
                r"no split 'train'.*train_gen, train_s",
            ),
        ],
    )
    def test_ambiguous_and_missing(self, names: list[str], split: str | None, message: str, tmp_path: Path) -> None:
        for name in names:
            (tmp_path / f"{name}.parquet").touch()
        with pytest.raises(InputError, match=message):
            find_data_files(tmp_path, split)

    def test_repository_of_the_hub(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").touch()
        for split in ("train", "test"):
            write_parquet(tmp_path / f"data/{split}-00000-of-00001.parquet", split)
        assert questions(tmp_path, split="test") == ["test"]

    def test_saved_splits(self, tmp_path: Path) -> None:
        import datasets

        splits = {name: datasets.Dataset.from_dict({"question": [name], "answer": ["A"]}) for name in ("train", "val")}
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "two"))
        datasets.DatasetDict({"train": splits["train"]}).save_to_disk(str(tmp_path / "one"))
        assert questions(tmp_path / "two", split="validation") == ["val"]
        assert questions(tmp_path / "one") == ["train"]
        with pytest.raises(InputError, match=r"is a data set of one split, but split 'x'"):
            open_samples(tmp_path / "two/val", split="x")
        shutil.rmtree(tmp_path / "one/train")
        with pytest.raises(InputError, match=r"dataset_dict\.json does not describe saved splits"):
            open_samples(tmp_path / "one")

    def test_single_files(self, tmp_path: Path) -> None:
        assert questions(write_parquet(tmp_path / "train.parquet", "Q"), split="train") == ["Q"]
        (tmp_path / "a.json").write_text("[{}]")
        with pytest.raises(InputError, match=r"a\.json: is one file and has no splits, but split 'train'"):
            open_samples(tmp_path / "a.json", split="train")
        with pytest.raises(InputError, match="is on this machine and has no subset 'x'"):
            open_samples(tmp_path / "a.json", subset="x")

    def test_several_formats_and_compressed_files(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").touch()
        (tmp_path / "a.tar").touch()
        with pytest.raises(InputError, match=r"several formats \(\*\.parquet, \*\.tar\)"):
            open_samples(tmp_path)
        (tmp_path / "a.tar.gz").touch()
        with pytest.raises(InputError, match=r"extension '\.gz'.*Decompress it"):
            open_samples(tmp_path / "a.tar.gz")


class TestHub:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("org/name", True),
            ("HuggingFaceM4/the_cauldron", True),
            ("a-b/c.d-1.5", True),
            ("name", False),
            ("org/name/more", False),
            ("org/name.json", False),
            ("org/NAME.JSONL", False),
            ("../name", False),
            ("/org/name", False),
            ("org/", False),
            ("~/name", False),
            ("a b/c", False),
        ],
    )
    def test_ids(self, name: str, expected: bool) -> None:
        assert is_hub_id(name) == expected

    def test_a_local_path_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_parquet(tmp_path / "org/name/a.parquet", "local")
        monkeypatch.chdir(tmp_path)
        assert questions("org/name") == ["local"]

    def test_offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets
        import huggingface_hub

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        for options in ({}, {"split": "train"}):
            with pytest.raises(InputError) as caught:
                open_samples("nobody/no-such-set", **options)
            message = str(caught.value)
            assert message.startswith("'nobody/no-such-set' (no such path, so a hub data set): cannot be opened: ")
            assert "hf download nobody/no-such-set --repo-type dataset --local-dir no-such-set" in message
            assert str(Path.cwd()) in message and "\n" not in message

    def test_the_real_path_through_a_local_repository(self, tmp_path: Path) -> None:
        """`load_dataset` takes a folder where it takes a name; only the download is left out."""
        for split in ("train", "test"):
            write_parquet(tmp_path / f"repo/data/{split}-00000-of-00001.parquet", f"{split} 0", f"{split} 1")
        name = str(tmp_path / "repo")
        rows = open_hub_table(name, subset=None, split="test")
        assert [rows[index]["question"] for index in range(len(rows))] == ["test 0", "test 1"]
        part = open_hub_table(name, subset=None, split="test[:1]")
        assert len(part) == 1 and len({rows.fingerprint, part.fingerprint}) == 2
        assert pickle.loads(pickle.dumps(rows))[1] == rows[1]
        with pytest.raises(InputError, match=r"has several splits \((train, test|test, train)\)\. Choose one"):
            open_hub_table(name, subset=None, split=None)
        with pytest.raises(InputError, match=r'cannot be opened: Unknown split "x".*Choose among these'):
            open_hub_table(name, subset=None, split="x")
        with pytest.raises(InputError, match=r"cannot be opened: BuilderConfig 'y' not found.*Choose among these"):
            open_hub_table(name, subset="y", split="test")
        (tmp_path / "repo/data/test-00000-of-00001.parquet").unlink()
        assert len(open_hub_table(name, subset=None, split=None)) == 2

    @pytest.fixture
    def fake_hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
        """Stands in for the two functions of `datasets` that reach out; returns the calls."""
        import datasets

        rows = datasets.Dataset.from_dict({"question": ["Q"], "answer": ["A"], "image": ["a.png"]})
        rows.save_to_disk(str(tmp_path / "hub"))

        def install(error: Exception | None = None, columns: dict[str, str] | None = None) -> list[Any]:
            calls: list[Any] = []

            def load_dataset(path: str, **options: Any) -> Any:
                calls.append((path, options))
                if error is not None:
                    raise error
                return datasets.load_from_disk(str(tmp_path / "hub")).rename_columns(columns or {})

            def builder(path: str, name: str | None) -> Any:
                return SimpleNamespace(info=SimpleNamespace(splits={"train": None}), config=None)

            monkeypatch.setattr(datasets, "load_dataset", load_dataset)
            monkeypatch.setattr(datasets, "load_dataset_builder", builder)
            return calls

        return install

    def test_what_is_asked_for(self, fake_hub: Callable[..., list[Any]], tmp_path: Path) -> None:
        calls = fake_hub()
        source = open_samples("org/name", image_folder=tmp_path, subset="s")
        assert calls == [("org/name", {"name": "s", "split": "train", "keep_in_memory": False})]
        assert source[0].origin == "name: row 0" and source[0].images[0].path == tmp_path / "a.png"
        assert source.path == Path("org/name")

    @pytest.mark.parametrize(
        ("error", "remedy"),
        [
            (
                "Dataset 'org/name' is a gated dataset on the Hub.",
                r"Accept its terms at .*/datasets/org/name and log in",
            ),
            ("Dataset 'org/name' doesn't exist on the Hub", r"run 'hf download org/name"),
        ],
    )
    def test_gated_and_missing(self, error: str, remedy: str, fake_hub: Callable[..., list[Any]]) -> None:
        import datasets

        fake_hub(datasets.exceptions.DatasetNotFoundError(error))
        with pytest.raises(InputError, match=f"'org/name'.*{error}.*{remedy}"):
            open_samples("org/name")

    def test_wrong_columns(self, fake_hub: Callable[..., list[Any]]) -> None:
        fake_hub(columns={"answer": "reply"})
        with pytest.raises(InputError, match="org/name: has the columns question, reply, image; it must have either"):
            open_samples("org/name")
