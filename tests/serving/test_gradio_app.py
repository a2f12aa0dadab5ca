"""The chat page's server, driven as a program would: `tests/browser` looks at the page itself."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from symphony_vlm.errors import InputError
from symphony_vlm.serving import gradio_app, page_style, uploads
from symphony_vlm.serving.chat import ChatSession

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def url(tiny_model_folder: Path) -> Iterator[str]:
    app = gradio_app.launch(str(tiny_model_folder), port=0, block=False)
    yield app.local_url
    app.close(verbose=False)


@pytest.fixture
def client(url: str) -> Any:
    from gradio_client import Client

    return Client(url, verbose=False)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


def ask(client: Any, text: str, *files: Path, length: int = 8) -> list[dict[str, Any]]:
    """The conversation as the page shows it after the answer."""
    from gradio_client import handle_file

    message = {"text": text, "files": [handle_file(file) for file in files]}
    chat: list[dict[str, Any]] = client.predict(message, length, 0.0, api_name="/ask")[0]
    return chat


def text_of(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def test_question_with_a_picture(client: Any, tiny_model_folder: Path, picture: Path) -> None:
    import html

    import symphony_vlm

    chat = ask(client, "What color?", picture)
    assert [message["role"] for message in chat] == ["user", "assistant"]
    assert [part["type"] for part in chat[0]["content"]] == ["file", "text"]
    session = ChatSession(symphony_vlm.load(tiny_model_folder))
    session.add_image(picture)
    assert text_of(chat[1]) == html.escape(session.ask("What color?", max_new_tokens=8), quote=False)
    # The model remembers the first turn.
    chat = ask(client, "And the shape?")
    assert text_of(chat[3]) == html.escape(session.ask("And the shape?", max_new_tokens=8), quote=False)


def test_answer_comes_in_pieces(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(self: ChatSession, text: str, **settings: Any) -> Iterator[str]:
        for piece in ("one ", "two ", "three"):
            yield piece
            threading.Event().wait(0.2)

    monkeypatch.setattr(ChatSession, "stream", stream)
    job = client.submit({"text": "Count.", "files": []}, 8, 0.0, api_name="/ask")
    seen = [text_of(update[0][-1]) for update in job]
    assert "one " in seen
    assert "one two " in seen
    assert seen[-1] == "one two three"


def test_two_visitors_never_see_each_other(client: Any, url: str) -> None:
    from gradio_client import Client

    other = Client(url, verbose=False)
    ask(client, "my secret")
    assert "my secret" not in str(ask(other, "hello"))
    assert len(ask(client, "again")) == 4
    assert client.predict(api_name="/new_chat")[0] == []
    assert len(ask(client, "fresh")) == 2
    assert len(ask(other, "still here")) == 4


def test_words_are_shown_letter_by_letter(client: Any) -> None:
    chat = ask(client, "<img src=x onerror=alert(1)> **bold** <image> & 1 < 2")
    assert text_of(chat[0]) == "&lt;img src=x onerror=alert(1)&gt; **bold** &lt;image&gt; &amp; 1 &lt; 2"


def test_a_broken_upload_is_named_and_the_next_question_works(client: Any, picture: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    chat = ask(client, "What color?", picture, broken)
    fault = text_of(chat[-1])
    assert chat[-1]["metadata"]["title"].endswith("Not answered")
    assert fault.startswith("Image 'broken.png' is not an image")
    assert "Choose another picture" in fault
    assert "on_bad_sample" not in fault
    assert os.environ["GRADIO_TEMP_DIR"] not in fault
    chat = ask(client, "And without it?")
    assert not chat[-1]["metadata"]
    # Nothing of the failed turn reached the model: its picture would have shifted every later one.
    assert [message["role"] for message in chat] == ["user", "assistant"] * 2


def test_an_empty_question_and_a_too_long_one(client: Any) -> None:
    assert text_of(ask(client, "   ")[-1]) == "The question is empty. Write a question."
    assert "512 positions" in text_of(ask(client, "colors " * 600)[-1])


def test_our_own_faults_are_short_in_the_page_and_complete_in_the_log(
    client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stream(self: ChatSession, text: str, **settings: Any) -> Iterator[str]:
        yield "so far"
        raise RuntimeError("matrix of /secret/folder is made of cheese\nsecond line")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(ChatSession, "stream", stream)
        chat = ask(client, "What?")
    so_far, fault = (text_of(message) for message in chat[1:])
    assert so_far == "so far"
    said = re.fullmatch(r"RuntimeError: matrix of … is made of cheese \(Reference (\w{6})\)", fault)
    assert said is not None
    assert f"reference {said[1]}" in caplog.text
    assert "Traceback" in caplog.text
    assert "second line" in caplog.text
    assert not ask(client, "And now?")[-1]["metadata"]


def test_too_many_pixels(client: Any, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    Image.new("1", (8000, 8000)).save(large)
    assert large.stat().st_size < 100_000
    assert "64,000,000 pixels; the limit is 50,000,000" in text_of(ask(client, "What?", large)[-1])


def test_too_many_bytes(url: str) -> None:
    sent = {"files": ("big.png", b"x" * (uploads.MAX_UPLOAD_BYTES + 1))}
    assert httpx.post(f"{url}gradio_api/upload", files=sent).status_code == 413


@pytest.mark.parametrize("secret", ["/etc/passwd", str(ROOT / "pyproject.toml")])
def test_only_uploads_can_be_read(url: str, secret: str) -> None:
    assert httpx.get(f"{url}gradio_api/file={secret}").status_code in (403, 404)
    file = {"path": secret, "meta": {"_type": "gradio.FileData"}}
    body = {"data": [{"text": "What?", "files": [file]}, 8, 0.0, 1.0, None], "session_hash": "stranger"}
    event = httpx.post(f"{url}gradio_api/call/ask", json=body).json()["event_id"]
    answer = httpx.get(f"{url}gradio_api/call/ask/{event}", timeout=30).text
    assert "event: error" in answer
    assert "assistant" not in answer
    assert "Traceback" not in answer


def test_page_names_the_model_and_its_router(url: str, tiny_model_folder: Path) -> None:
    config = httpx.get(f"{url}config").json()
    header = next(c for c in config["components"] if c["props"].get("elem_id") == "header")["props"]["value"]
    assert f"<h1>{tiny_model_folder.name}</h1>" in header
    assert "symphony_smoe, 2 of 4 experts" in header
    assert str(tiny_model_folder.parent) not in str(config)
    assert config["analytics_enabled"] is False
    assert config["title"] == "tiny · symphony_vlm"


def test_examples_are_drawn_pictures_with_questions(url: str) -> None:
    config = httpx.get(f"{url}config").json()
    chat = next(c for c in config["components"] if c["props"].get("elem_id") == "chat")["props"]
    assert len(chat["examples"]) == 4
    for example in chat["examples"]:
        assert example["text"].endswith(("?", "."))
        assert httpx.get(example["icon"]["url"]).headers["content-type"] == "image/png"


def test_uploads_go_to_a_private_folder(url: str) -> None:
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert folder.stat().st_mode & 0o077 == 0


def test_a_taken_port_is_one_clear_error(url: str, tiny_model_folder: Path) -> None:
    port = httpx.URL(url).port
    assert port is not None
    with pytest.raises(InputError, match=rf"127.0.0.1:{port}: cannot listen there.*--port"):
        gradio_app.launch(str(tiny_model_folder), port=port, block=False)
    with pytest.raises(InputError, match="cannot listen there"):
        gradio_app.launch(str(tiny_model_folder), host="256.1.1.1", port=0, block=False)


@pytest.mark.parametrize(
    ("name", "title"),
    [("run", "run"), ("run/model", "run"), ("run/model/", "run"), ("other", "other"), ("org/name", "org/name")],
)
def test_title(name: str, title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "finetune" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model").symlink_to("finetune/model")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert page_style.page_title(name) == title


def test_a_second_model_is_opened_and_named(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no config.json"):
        gradio_app.build_app(str(tiny_model_folder), str(tmp_path))
    app = gradio_app.build_app(str(tiny_model_folder), str(tiny_model_folder))
    assert app.title == "tiny (A) and tiny (B) · symphony_vlm"


def test_import_is_cheap() -> None:
    code = "import sys, symphony_vlm.serving.gradio_app; print({'gradio', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_demo_entry_point(tmp_path: Path) -> None:
    assert len((ROOT / "demo" / "app.py").read_text().splitlines()) <= 40
    environment = {key: value for key, value in os.environ.items() if key != "SYMPHONY_VLM_MODEL"}
    command = [sys.executable, "-m", "demo.app", "--port", "0"]
    for extra, message in (([], "give --model DIR"), (["--model", str(tmp_path)], "no config.json")):
        done = subprocess.run(
            [*command, *extra], capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment
        )
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_demo_ends_politely_and_leaves_nothing_behind(
    stop: signal.Signals, tiny_model_folder: Path, tmp_path: Path
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "GRADIO_TEMP_DIR"}
    command = [sys.executable, "-m", "demo.app", "--model", str(tiny_model_folder), "--port", "0"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**environment, "TMPDIR": str(tmp_path)}
    ) as server:
        assert server.stderr is not None
        said = ""
        while "Open http://127.0.0.1:" not in said:
            line = server.stderr.readline()
            assert line, said
            said += line
        assert list(tmp_path.glob("symphony_vlm-*"))
        server.send_signal(stop)
        said += server.communicate(timeout=60)[1]
    assert server.returncode == 0
    assert "Traceback" not in said
    assert not list(tmp_path.glob("symphony_vlm-*"))
