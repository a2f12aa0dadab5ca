"""Jobs run once, in order, survive failures and signals, and begin anew where something before them changed."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from fake_cells import finish, picture_study, small_study
from rich.console import Console

from symphony_vlm.errors import InputError
from symphony_vlm.study.jobs import Job
from symphony_vlm.study.language import LanguageSetting
from symphony_vlm.study.pictures import PictureSetting
from symphony_vlm.study.runner import run_jobs

QUIET = Console(quiet=True)


def job(folder: Path, name: str, *code: str, needs: tuple[Job, ...] = ()) -> Job:
    commands = {str(number): (sys.executable, "-c", part) for number, part in enumerate(code)}
    return Job(name=name, folder=folder / name, commands=commands, needs=needs)


def test_jobs_run_once_failures_do_not_stop_the_others_and_are_tried_again(tmp_path: Path) -> None:
    count = tmp_path / "count"
    note = f"open({str(count)!r}, 'a').write('x'); import os; assert os.environ['OMP_NUM_THREADS'] == '1'"
    good = job(tmp_path, "good", note, "pass")
    fails = f"import pathlib, sys; sys.exit(0 if pathlib.Path({str(tmp_path / 'mended')!r}).exists() else 'no luck')"
    bad = job(tmp_path, "bad", fails)
    after = job(tmp_path, "after", "pass", needs=(bad, good))
    assert run_jobs([bad, good, after], at_once=2, threads=1, console=QUIET) == {
        "bad": "no luck",
        "after": "waits for jobs that failed",
    }
    assert good.is_done() and not bad.is_done() and not after.is_done() and count.read_text() == "x"
    (tmp_path / "mended").touch()
    assert run_jobs([bad, good, after], at_once=1, threads=1, console=QUIET) == {}
    assert bad.is_done() and after.is_done() and count.read_text() == "x"


def test_a_job_waits_for_what_it_needs_and_reads_its_files(tmp_path: Path) -> None:
    first = job(tmp_path, "first", f"import time; time.sleep(0.5); open({str(tmp_path / 'made')!r}, 'w')")
    read = f"import os; assert os.path.exists({str(tmp_path / 'made')!r}); assert open('x/note').read() == 'hello'"
    second = replace(
        job(tmp_path, "second", f"import os; os.chdir({str(tmp_path)!r}); os.symlink('second', 'x'); {read}"),
        needs=(first,),
        files={"note": "hello"},
    )
    assert run_jobs([second, first], at_once=2, threads=1, console=QUIET) == {}


def test_gpus_are_shared_out(tmp_path: Path) -> None:
    see = "import os, time; open({!r}, 'w').write(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(1.5)"
    jobs = [job(tmp_path, name, see.format(str(tmp_path / f"{name}.txt"))) for name in "ab"]
    assert run_jobs(jobs, at_once=2, threads=1, console=QUIET, gpus=["4", "6"]) == {}
    assert {(tmp_path / f"{name}.txt").read_text() for name in "ab"} == {"4", "6"}


def test_a_signal_ends_the_jobs_and_they_are_not_done(tmp_path: Path) -> None:
    # The job asks its parent to stop, as a job scheduler would, and then takes its time.
    slow = job(tmp_path, "slow", "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)")
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_jobs([slow], at_once=1, threads=1, console=QUIET)
    assert time.monotonic() - start < 50 and not slow.is_done()


def test_a_job_with_other_commands_begins_anew_and_so_does_what_needs_it(tmp_path: Path) -> None:
    first = job(tmp_path, "a", "pass")
    after = job(tmp_path, "b", "pass", needs=(first,))
    for one in (first, after):
        finish(one)
    (first.folder / "run" / "language" / "checkpoint-5").mkdir(parents=True)
    changed = job(tmp_path, "a", "pass # other")
    after_changed = replace(after, needs=(changed,))
    assert first.is_done() and after.is_done() and not changed.is_done() and not after_changed.is_done()
    changed.begin()
    assert not (first.folder / "run").exists()


def test_language_cells_cover_arms_and_seeds_with_whole_comparisons_first(tmp_path: Path) -> None:
    setting = LanguageSetting(small_study(), tmp_path)
    jobs = setting.jobs("test", ["smoe", "symphony"])
    assert [one.name for one in jobs] == [f"wiki/{arm}/seed{s}" for s in (0, 1) for arm in ("smoe", "symphony")]
    train, measure = jobs[1].commands["train"], jobs[1].commands["measure"]
    assert "model.moe.router=symphony_smoe" in train and "seed=0" in train
    assert measure[measure.index("--rate") + 1] == "0.1"
    assert measure[measure.index("--text") + 1].endswith("wiki/test.txt")


def test_a_study_that_chooses_measures_the_validation_part_first(tmp_path: Path) -> None:
    study = small_study(select={"choices": {"best": {"among": ["smoe", "symphony"]}}})
    setting = LanguageSetting(study, tmp_path)
    first = setting.jobs("development", ["smoe"])[0]
    assert not any(word.endswith("test.txt") for command in first.commands.values() for word in command)
    trained, tested = setting.jobs("test", ["smoe"])[:2]
    assert trained == first and tested.needs == (trained,)
    assert any(word.endswith("wiki/test.txt") for word in tested.commands["measure"])


def test_arms_with_pictures_share_data_start_and_measurement(tmp_path: Path) -> None:
    setting = PictureSetting(picture_study(), tmp_path)
    setting.prepare()
    jobs = {one.name: one for one in setting.jobs("test", ["smoe", "symphony"])}
    own = [f"cells/pictures/{arm}/seed0" for arm in ("smoe", "symphony")]
    assert list(jobs)[:5] == ["scenes", "start/seed0", *own, "evaluation/test/seed0"] and len(jobs) == 9
    assert [need.name for need in jobs[own[0]].needs] == ["scenes", "start/seed0"]
    evaluate = jobs["evaluation/test/seed0"].commands["evaluate"]
    assert evaluate.count("--model") == 2 and {need.name for need in jobs["evaluation/test/seed0"].needs} > set(own)
    recipes = [jobs[name].files["recipe.yaml"] for name in own]
    start = tmp_path / "start" / "seed0" / "run" / "pretrain" / "model"
    different = set(recipes[0].splitlines()) ^ set(recipes[1].splitlines())
    assert all(f"start: {start}" in text for text in recipes)
    # The start decodes every picture; the arms need not again.
    assert all("check_images: false" in text for text in recipes)
    assert "check_images: true" in jobs["start/seed0"].files["recipe.yaml"]
    assert {line.strip() for line in different} == {
        *("name: tiny_smoe", "name: tiny_symphony", "router: smoe", "router: symphony_smoe")
    }


def test_files_of_pictures_have_one_folder_of_images(tmp_path: Path) -> None:
    files = {name: str(tmp_path / f"{name}.json") for name in ("train", "test")}
    study = picture_study(pictures={"task": "scenes", **files, "image_folder": str(tmp_path / "images")})
    setting = PictureSetting(study, tmp_path / "study")
    for path in files.values():
        Path(path).write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match=r"pictures\.image_folder: .*images: does not exist"):
        setting.prepare()
    (tmp_path / "images").mkdir()
    setting.prepare()
    jobs = {one.name: one for one in setting.jobs("test", ["smoe", "symphony"])}
    recipe = yaml.safe_load(jobs["cells/pictures/smoe/seed0"].files["recipe.yaml"])
    (source,) = recipe["data"]["train"]
    assert source["path"] == files["train"] and source["image_folder"] == str(tmp_path / "images")
    evaluate = jobs["evaluation/test/seed0"].commands["evaluate"]
    assert evaluate[evaluate.index("--image-folder") + 1] == str(tmp_path / "images")
    assert evaluate[evaluate.index("--data") + 1] == files["test"]
