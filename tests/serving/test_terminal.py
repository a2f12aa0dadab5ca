"""The terminal chat, driven through standard input and output."""

from __future__ import annotations

import builtins
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from symphony_vlm.errors import InputError
from symphony_vlm.serving.chat import ChatSession
from symphony_vlm.serving.terminal import _printable, run_terminal_chat

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
        run_terminal_chat(str(tiny_model_folder), images or [], None, max_new_tokens=8)
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

    run_terminal_chat(str(tiny_model_folder), [picture], "What color?", max_new_tokens=8)
    captured = capfd.readouterr()
    session = ChatSession(symphony_vlm.load(tiny_model_folder))
    session.add_image(picture)
    assert captured.out == _printable(session.ask("What color?", max_new_tokens=8)) + "\n"
    assert "loading" in captured.err


def test_a_bad_picture_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        run_terminal_chat(str(tmp_path / "no_model"), [tmp_path / "no.png"], "What?", max_new_tokens=8)


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
