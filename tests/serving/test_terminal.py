"""The terminal chat, driven through standard input and output."""

from __future__ import annotations

import builtins
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from symphony_vlm.corruptions import corrupt, corruption_rng, image_key
from symphony_vlm.errors import InputError
from symphony_vlm.serving.chat import ChatSession
from symphony_vlm.serving.routing_view import LayerRouting, RoutingView, Word
from symphony_vlm.serving.terminal import _printable, run_terminal_chat
from symphony_vlm.serving.terminal_commands import Commands
from symphony_vlm.serving.terminal_history import line_editing
from symphony_vlm.serving.terminal_routing import share_table

SHORT = {"max_new_tokens": 8}
Talk = Callable[..., tuple[list[str], str]]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


@pytest.fixture
def talk(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Talk:
    """Types lines (or raises what is not a string) and returns the lines of standard output, and standard error."""

    def run(*typed: str | type[BaseException], images: list[Path] | None = None) -> tuple[list[str], str]:
        waiting = iter([*typed, EOFError])

        def read(prompt: str = "") -> str:
            assert prompt == ""
            item = next(waiting)
            if isinstance(item, str):
                return item
            raise item

        monkeypatch.setattr(builtins, "input", read)
        run_terminal_chat(str(tiny_model_folder), images or [], None, settings=SHORT)
        captured = capfd.readouterr()
        return captured.out.splitlines(), captured.err

    return run


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Replaces the model by one that repeats the question; returns what it was asked, with the number of pictures."""
    asked: list[tuple[str, int]] = []

    def stream(self: ChatSession, text: str, **settings: Any) -> Iterator[str]:
        asked.append((text, self.num_pending_images))
        self.drop_images()
        if text == "break":
            raise RuntimeError("out of memory")
        yield from ("you ", "said ", text)
        if text == "interrupt":
            raise KeyboardInterrupt

    monkeypatch.setattr(ChatSession, "stream", stream)
    return asked


def test_one_question_prints_the_answer_alone(
    tiny_model_folder: Path, picture: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import symphony_vlm

    run_terminal_chat(str(tiny_model_folder), [picture], "What color?", settings=SHORT)
    captured = capfd.readouterr()
    session = ChatSession(symphony_vlm.load(tiny_model_folder))
    session.add_image(picture)
    assert captured.out == _printable(session.ask("What color?", max_new_tokens=8)) + "\n"
    assert "loading" in captured.err


def test_a_bad_picture_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        run_terminal_chat(str(tmp_path / "no_model"), [tmp_path / "no.png"], "What?", settings=SHORT)


def test_a_conversation(talk: Talk, echo: list[tuple[str, int]], picture: Path) -> None:
    out, err = talk(
        "first", f"/image '{picture}'", f"/image {picture}", "second", "", "  ", " /slash", "/quit", "never"
    )
    assert out == ["you said first", "you said second", "you said /slash"]
    assert echo == [("first", 0), ("second", 2), ("/slash", 0)]
    assert "1 picture is attached" in err
    assert "2 pictures are attached" in err
    assert err.rstrip().endswith("Goodbye.")


def test_pictures_given_on_the_command_line_go_with_the_first_question(
    talk: Talk, echo: list[tuple[str, int]], picture: Path
) -> None:
    _, err = talk("first", "second", images=[picture])
    assert echo == [("first", 1), ("second", 0)]
    assert "1 picture is attached to your first question" in err


def test_mistakes_are_one_line_and_the_chat_goes_on(talk: Talk, echo: list[tuple[str, int]], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    out, err = talk(f"/image {broken}", "/image nowhere.png", "/image", "/imagine", "break", "still here?")
    errors = [line for line in err.splitlines() if line.startswith(("error:", "failed:"))]
    assert len(errors) == 5
    for line, text in zip(
        errors,
        ["broken.png", "nowhere.png", "Write /image PATH", "'/imagine'", "RuntimeError: out of memory"],
        strict=True,
    ):
        assert text in line
    assert "Traceback" not in err
    assert out == ["you said still here?"]


def test_help_and_reset(talk: Talk, monkeypatch: pytest.MonkeyPatch, picture: Path) -> None:
    resets: list[int] = []
    original = ChatSession.reset
    monkeypatch.setattr(ChatSession, "reset", lambda self: (resets.append(1), original(self))[1])
    _, err = talk("/help", f"/image {picture}", "/reset", f"/image {picture}")
    assert "/image PATH" in err
    assert resets == [1]
    assert "2 pictures" not in err


def test_ctrl_c_stops_an_answer_and_at_the_prompt_the_chat(talk: Talk, echo: list[tuple[str, int]]) -> None:
    out, err = talk("interrupt", "again", KeyboardInterrupt, "never")
    assert out == ["you said interrupt", "you said again"]
    assert "Stopped" in err
    assert err.rstrip().endswith("Goodbye.")


def test_a_real_model_answers_in_the_loop(talk: Talk, picture: Path) -> None:
    out, err = talk(f"/image {picture}", "What color?", "And now?")
    assert out
    assert "error" not in err
    assert "failed" not in err


def test_corrupted_pictures_are_those_of_an_evaluation(
    talk: Talk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    picture = tmp_path / "noise.png"
    Image.effect_noise((48, 40), 80).convert("RGB").save(picture)
    given: list[list[Image.Image]] = []
    replace, add = ChatSession.replace_images, ChatSession.add_image
    monkeypatch.setattr(
        ChatSession, "replace_images", lambda self, images: (given.append(images), replace(self, images))[1]
    )
    monkeypatch.setattr(ChatSession, "add_image", lambda self, image: (given.append([image]), add(self, image))[1])
    _, err = talk(
        f"/image {picture}", "What?", "/corrupt fog 3", "What?", f"/image {picture}", "/corrupt off", "/reset", "What?"
    )
    assert "error" not in err
    assert "From now on the model sees all pictures with fog of severity 3; what was said so far stays." in err
    assert "From now on the model sees all pictures as they are" in err
    clean = np.asarray(Image.open(picture))
    foggy = corrupt(clean, "fog", 3, corruption_rng(image_key(clean), "fog", 3, 0))
    expected = [[clean], [foggy], [foggy], [clean, clean]]
    assert [[np.asarray(image).tolist() for image in images] for images in given] == [
        [image.tolist() for image in images] for images in expected
    ]


def test_mistakes_in_commands_change_nothing(talk: Talk, picture: Path) -> None:
    out, err = talk(
        f"/image '{picture}'", "/corrupt", "/corrupt fog", "/corrupt fog 6", "/corrupt fgo 3", "/corupt fog 3",
        "/routing", "/routing x", "What?", "/routing 7", "/routing -1",
    )  # fmt: skip
    errors = [line for line in err.splitlines() if line.startswith(("error:", "failed:"))]
    for line, words in zip(
        errors,
        [
            *("/corrupt: '' is not", "'fog' is not a corruption and a severity", "'fog 6'", "did you mean 'fog'"),
            *(
                "did you mean '/corrupt'",
                "no answer yet",
                "'x' is not the number",
                "layer 7 has no experts",
                "'-1' is not",
            ),
        ],
        strict=True,
    ):
        assert words in line
    assert len(out) >= 1


def test_routing_of_the_last_answer(talk: Talk, picture: Path) -> None:
    _, err = talk(f"/image '{picture}'", "What color is it?", "/routing", "/routing 1")
    assert "error" not in err
    assert re.search(r"What each expert contributed to the answer's [1-9]\d* words, by layer:", err)
    rows = [line.split() for line in err.splitlines() if line.split()[:1] in (["0"], ["1"]) and "%" in line]
    assert [row[0] for row in rows] == ["0", "1"]
    for row in rows:
        assert len(row) == 5
        # Rounded to whole percent, four shares may miss 100 by two.
        assert abs(sum(int(cell.rstrip("%")) for cell in row[1:] if cell != "·") - 100) <= 2
    words = err.splitlines()[-3:]
    assert any(letter in "".join(words) for letter in "₀₁₂₃")


def test_a_dense_model_has_no_routing(tiny_model: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="dense"):
        Commands(ChatSession(tiny_model), Console(stderr=True)).run("/routing")


def test_many_experts_are_shown_by_the_busiest(capfd: pytest.CaptureFixture[str]) -> None:
    experts = torch.tensor([[0, 1], [63, 2], [63, 2], [63, 5]])
    layer = LayerRouting(
        layer=3, num_experts=64, indices_SK=experts, weights_SK=torch.full((4, 2), 0.5), adjacency_EE=None
    )
    spans = [(0, 1, False), (1, 3, True), (3, 4, True)]
    words = tuple(Word(text="a", start=start, stop=stop, is_answer=answer) for start, stop, answer in spans)
    routing = RoutingView(layers=(layer,), pictures=(), words=words)
    console = Console(width=80)
    console.print(share_table(routing))
    assert "3  63: 50%  2: 33%  5: 17%" in capfd.readouterr().out


def test_what_was_typed_is_kept_for_the_next_chat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    readline = pytest.importorskip("readline")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    file = tmp_path / "state" / "symphony_vlm" / "chat_history"
    try:
        for line in ("one", "two"):
            readline.clear_history()
            with line_editing(keep=True) as problem:
                assert problem is None
                readline.add_history(line)
        assert file.read_text().split() == ["one", "two"]
        assert file.stat().st_mode & 0o777 == 0o600
        readline.clear_history()
        with line_editing(keep=False):
            readline.add_history("three")
            assert readline.get_current_history_length() == 1
        assert "three" not in file.read_text()
        file.unlink()
        file.mkdir()
        with line_editing(keep=True) as problem:
            assert problem is not None
            assert "not kept" in problem
    finally:
        readline.clear_history()


def test_without_a_terminal_nothing_is_kept(talk: Talk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    talk("/help")
    assert list(tmp_path.iterdir()) == []


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert _printable("a\x1b[2Jb\x07\n\tc é 猫 👩‍🚀") == "a[2Jb\n\tc é 猫 👩‍🚀"


def test_command_line_pipes(tiny_model_folder: Path, picture: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "symphony_vlm.cli",
        "chat",
        "--model",
        str(tiny_model_folder),
        "--max-new-tokens",
        "4",
    ]
    done = subprocess.run(
        command, input=f"/image {picture}\nWhat?\n/image no.png\n", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert done.stdout.strip()
    assert "no.png" in done.stderr
    assert "Traceback" not in done.stderr
    failed = subprocess.run(
        [*command, "--image", "no.png", "--prompt", "What?"], capture_output=True, text=True, timeout=120
    )
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.startswith("error: image 'no.png': the file does not exist.")
