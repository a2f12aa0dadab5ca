"""Checkpoints on disk: whole or not there, checked before use, kept in number, left out when the disk is full."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from symphony_vlm.errors import SavingError
from symphony_vlm.files import replacing_folder, write_text
from symphony_vlm.training.checkpoints import Checkpoints
from symphony_vlm.training.manifest import find_damage, write_manifest
from symphony_vlm.training.writing import attempt, size_text

SIZE = 100_000


class Stage:
    """A stage's folder, and what was said and reported about it."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.said: list[str] = []
        self.saved: list[int] = []
        self.folder = folder
        self.checkpoints = Checkpoints(folder, keep=keep, report=self.said.append, saved=self.saved.append)

    def write(self, step: int) -> None:
        folder = self.checkpoints.staging / f"checkpoint-{step}"
        (folder / "shards").mkdir(parents=True)
        save_file({"step": torch.full((SIZE // 4,), float(step))}, folder / "model.safetensors")
        (folder / "shards" / "0.pt").write_bytes(b"x" * 50)

    def save(self, step: int, **settings: Any) -> bool:
        return self.checkpoints.save(step, lambda: self.write(step), size=SIZE, **settings)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


def step_inside(checkpoint: Path) -> int:
    assert find_damage(checkpoint) is None
    values = load_file(checkpoint / "model.safetensors")["step"].unique()
    assert len(values) == 1
    return int(values)


@contextmanager
def files_no_larger_than(number: int) -> Iterator[None]:
    """The kernel refuses to write more, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Whole or not there.


def test_a_checkpoint_has_its_name_only_when_all_is_written(tmp_path: Path) -> None:
    stage = Stage(tmp_path)

    def write() -> None:
        stage.write(4)
        assert stage.names() == [".saving"]

    assert stage.checkpoints.save(4, write, size=0)
    assert stage.names() == ["checkpoint-4"]
    assert stage.checkpoints.last() == tmp_path / "checkpoint-4"
    assert (stage.saved, stage.said) == ([4], [])


def test_everything_is_flushed_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    renamed: list[tuple[str, set[int]]] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        flushed.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def note_rename(source: Any, target: Any, **settings: Any) -> None:
        renamed.append((Path(target).name, set(flushed)))
        rename(source, target, **settings)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    Stage(tmp_path).save(4)
    before = dict(renamed)["checkpoint-4"]
    everything = [*(tmp_path / "checkpoint-4").rglob("*"), tmp_path / "checkpoint-4"]
    assert len(everything) == 5
    assert [path for path in everything if path.stat().st_ino not in before] == []
    assert flushed[-1] == tmp_path.stat().st_ino, "the folder that has the new name"


CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")
"""Calls through which folders change, and those between which files are written."""


def killed_before_change(number: int, work: Callable[[], None]) -> bool:
    """Runs `work` in a process that is killed at that change; False if it has fewer and ends."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    count = 0

    def killing(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **settings)

        return call

    for name in CHANGES:
        setattr(os, name, killing(getattr(os, name)))
    try:
        work()
    finally:
        os._exit(0)


def killed_before_each_change(work: Callable[[], None], prepare: Callable[[], None], check: Callable[[], None]) -> int:
    """Runs `work` in processes that are killed at their first change, their second, and so on. Returns their number."""
    for number in range(1, 1000):
        prepare()
        killed = killed_before_change(number, work)
        check()
        if not killed:
            return number - 1
    raise AssertionError("it never ended")


def test_a_kill_at_any_change_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    """With one kept, so that the old one is removed too."""
    found: list[int] = []

    def prepare() -> None:
        shutil.rmtree(tmp_path / "stage", ignore_errors=True)
        assert Stage(tmp_path / "stage").save(4)

    def check() -> None:
        stage = Stage(tmp_path / "stage")
        for path in stage.folder.glob("checkpoint-*"):
            assert step_inside(path) == int(path.name.split("-")[1])
        last = stage.checkpoints.last()
        assert last is not None
        found.append(step_inside(last))
        assert not stage.checkpoints.staging.exists()
        assert stage.said == []

    changes = killed_before_each_change(lambda: void(Stage(tmp_path / "stage", keep=1).save(8)), prepare, check)
    assert changes > 15
    assert found == sorted(found)
    assert set(found) == {4, 8}


def void(_: object) -> None: ...


def test_a_kill_at_any_change_leaves_the_old_model_or_the_new_one(tmp_path: Path) -> None:
    folder = tmp_path / "stage" / "model"

    def replace(text: str) -> None:
        with replacing_folder(folder) as temporary:
            temporary.mkdir(parents=True)
            for name in "ab":
                (temporary / name).write_text(text)

    def prepare() -> None:
        shutil.rmtree(tmp_path / "stage", ignore_errors=True)
        replace("old")

    found: list[str] = []

    def check() -> None:
        complete = [path for path in (folder, folder.with_name(".model.old")) if path.exists()]
        texts = {(path / name).read_text() for path in complete[:1] for name in "ab"}
        assert len(texts) == 1
        found.append(texts.pop())
        # The next start gets the same place, whatever is left.
        with pytest.raises(RuntimeError), replacing_folder(folder):
            raise RuntimeError
        assert {path.name for path in folder.parent.iterdir()} == {"model"}
        assert {(folder / name).read_text() for name in "ab"} == {found[-1]}

    assert killed_before_each_change(lambda: replace("new"), prepare, check) > 8
    assert found == sorted(found, reverse=True)
    assert set(found) == {"old", "new"}


def test_a_text_file_that_cannot_be_written_leaves_no_half_beside_the_old_one(tmp_path: Path) -> None:
    write_text(tmp_path / "state.json", "old")
    with files_no_larger_than(1000), pytest.raises(OSError):
        write_text(tmp_path / "state.json", "x" * 5000)
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    assert (tmp_path / "state.json").read_text() == "old"


# Checked before use.


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model.safetensors", 5000)


def zero(checkpoint: Path) -> None:
    (checkpoint / "shards" / "0.pt").write_bytes(bytes(50))


def zero_the_end(checkpoint: Path) -> None:
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(4096))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, r"model.safetensors has 5000 bytes and not 100\d\d\d"),
        (zero, "shards/0.pt is not what was written"),
        (zero_the_end, "model.safetensors is not what was written"),
        (lambda path: (path / "shards" / "0.pt").unlink(), "shards/0.pt is missing"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path / "manifest.json").write_text('{"processes"'), "manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_set_aside(
    tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    stage = Stage(tmp_path)
    for step in (9, 100):
        stage.save(step)
    damage(tmp_path / "checkpoint-100")
    before = sorted(path.name for path in (tmp_path / "checkpoint-100").rglob("*"))
    assert stage.checkpoints.last() == tmp_path / "checkpoint-9"
    assert len(stage.said) == 1
    assert re.search(reason, stage.said[0]), stage.said[0]
    assert str(tmp_path / "checkpoint-100") in stage.said[0]
    assert stage.names() == ["checkpoint-9", "damaged-checkpoint-100"]
    assert sorted(path.name for path in (tmp_path / "damaged-checkpoint-100").rglob("*")) == before
    # Reached once more, and damaged once more.
    stage.save(100)
    damage(tmp_path / "checkpoint-100")
    assert stage.checkpoints.last() == tmp_path / "checkpoint-9"
    assert stage.names() == ["checkpoint-9", "damaged-checkpoint-100", "damaged-checkpoint-100.2"]


def test_damage_at_the_end_of_a_large_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(os.urandom(5 << 20))
    write_manifest(tmp_path, processes=1)
    assert find_damage(tmp_path) is None
    with (tmp_path / "large").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert find_damage(tmp_path) == "large is not what was written"


def test_without_a_usable_checkpoint_there_is_none(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    assert Stage(tmp_path / "missing").checkpoints.last() is None
    for step in (1, 2):
        stage.save(step)
        truncate(tmp_path / f"checkpoint-{step}")
    assert stage.checkpoints.last() is None
    assert len(stage.said) == 2


def test_another_number_of_processes_is_said(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.save(4)
    (tmp_path / "checkpoint-4" / "manifest.json").unlink()
    write_manifest(tmp_path / "checkpoint-4", processes=8)
    assert stage.checkpoints.last() == tmp_path / "checkpoint-4"
    assert "written by 8 processes, continued by 1" in stage.said[0]


# Kept in number.


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay(tmp_path: Path, keep: int) -> None:
    stage = Stage(tmp_path, keep=keep)
    (tmp_path / "checkpoint-notes").mkdir()
    for number, step in enumerate((2, 9, 10, 11, 100)):
        stage.save(step)
        assert len(list(tmp_path.glob("checkpoint-*[0-9]"))) == min(keep, number + 1)
    expected = ["checkpoint-10", "checkpoint-11", "checkpoint-100"][-keep:]
    assert stage.names() == sorted([*expected, "checkpoint-notes"])


# A full disk.


def write_tensors(folder: Path) -> None:
    save_file({"a": torch.zeros(SIZE)}, folder / "a.safetensors")


def write_pickle(folder: Path) -> None:
    torch.save({"a": torch.zeros(SIZE)}, folder / "a.pt")


def write_bytes(folder: Path) -> None:
    (folder / "a").write_bytes(bytes(SIZE))


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (write_tensors, "File too large"),
        (write_pickle, "a file could not be written whole"),
        (write_bytes, "File too large"),
    ],
)
def test_every_librarys_failure_to_write_is_recognised(
    tmp_path: Path, write: Callable[[Path], None], reason: str
) -> None:
    with files_no_larger_than(1000):
        assert reason in (attempt(lambda: write(tmp_path)) or "")
    assert attempt(lambda: write(tmp_path)) is None


def test_a_fault_of_the_program_is_no_failure_of_writing() -> None:
    for error in (ValueError("x"), RuntimeError("size mismatch"), KeyError("x")):

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)):
            attempt(fail)


def test_a_checkpoint_that_does_not_fit_is_left_out_and_the_earlier_ones_stay(tmp_path: Path) -> None:
    stage = Stage(tmp_path, keep=1)
    stage.save(4)
    with files_no_larger_than(SIZE // 2):
        assert not stage.save(8)
    assert stage.names() == ["checkpoint-4"]
    assert step_inside(tmp_path / "checkpoint-4") == 4
    assert stage.saved == [4]
    assert len(stage.said) == 1
    for part in (
        str(tmp_path),
        "checkpoint-8 could not be saved (File too large",
        "takes about 100.",
        "kB",
        "GB are free",
    ):
        assert part in stage.said[0]
    assert "checkpoint-4 stays. Training goes on; the next save point tries again. Free some space" in stage.said[0]
    assert stage.save(12)
    assert stage.names() == ["checkpoint-12"]


def test_nothing_is_written_where_it_would_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the size of the checkpoint before, or else by that of the weights."""
    stage = Stage(tmp_path)
    monkeypatch.setattr("symphony_vlm.training.checkpoints.free_bytes", lambda folder: SIZE + 90)
    assert stage.checkpoints.save(4, lambda: stage.write(4), size=SIZE)
    assert not stage.checkpoints.save(8, lambda: pytest.fail("written"), size=10)
    assert "(not enough space): it takes about 100." in stage.said[0]
    assert "100.1 kB are free" in stage.said[0]


def test_where_processes_wait_for_each_other_a_failure_ends_the_run(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.save(4)
    with files_no_larger_than(SIZE // 2), pytest.raises(SavingError, match="checkpoint-4 stays. Run the same command"):
        stage.save(8, collective=True)
    assert stage.checkpoints.last() == tmp_path / "checkpoint-4"


def test_sizes_are_readable() -> None:
    assert [size_text(n) for n in (None, 999, 10**6, 15 * 10**8)] == ["unknown", "1.0 kB", "1.0 MB", "1.5 GB"]


# Nothing is executed.


def test_a_pickle_in_a_checkpoint_is_not_executed(tiny_run: Any, tmp_path: Path, quiet: Any) -> None:
    from symphony_vlm.config.loading import load_recipe
    from symphony_vlm.training.run import train

    run = tmp_path / "run"
    shutil.copytree(tiny_run.folder, run, symlinks=True)
    state = json.loads((run / "state.json").read_text())
    state["stages"]["instruct"]["status"] = "running"
    (run / "state.json").write_text(json.dumps(state))
    shutil.rmtree(run / "instruct" / "checkpoint-12")
    checkpoint = run / "instruct" / "checkpoint-8"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        good = (checkpoint / name).read_bytes()
        torch.save(Evil(), checkpoint / name)
        (checkpoint / "manifest.json").unlink()
        write_manifest(checkpoint, processes=1)
        with pytest.raises(pickle.UnpicklingError):
            train(load_recipe("tiny"), run, console=quiet)
        assert not (tmp_path / "executed").exists()
        (checkpoint / name).write_bytes(good)
