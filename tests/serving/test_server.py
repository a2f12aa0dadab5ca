"""The command: where it listens, who may ask, how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.serving.listening import listen
from symphony_vlm.serving.request_limits import RequestLimits
from symphony_vlm.serving.server import serve

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "symphony_vlm.cli", "serve"]


@pytest.fixture
def server(tiny_model_folder: Path) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A server of its own process: the process, its address, and the lines it has written."""
    environment = os.environ | {"SYMPHONY_VLM_API_KEY": "from the environment"}
    process = subprocess.Popen(
        [*COMMAND, "--model", str(tiny_model_folder), "--port", "0", "--model-name", "small"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if "http://" in line:
            break
    reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()))
    reader.start()
    yield process, lines[-1].split("at ")[1].split(";")[0], lines
    if process.poll() is None:
        process.kill()
    process.wait()
    reader.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_asked_to_stop_it_finishes_what_runs_and_takes_nothing_new(
    server: tuple[subprocess.Popen[str], str, list[str]], number: int
) -> None:
    process, url, lines = server
    headers = {"Authorization": "Bearer from the environment"}
    assert httpx.get(f"{url}/models").status_code == 401
    assert [model["id"] for model in httpx.get(f"{url}/models", headers=headers).json()["data"]] == ["small"]
    request: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "What?"}], "max_tokens": 400}
    whole = httpx.post(f"{url}/chat/completions", json=request, headers=headers, timeout=60).json()
    text = ""
    streamed = {"json": request | {"stream": True}, "headers": headers, "timeout": 60}
    with httpx.stream("POST", f"{url}/chat/completions", **streamed) as response:
        for line in response.iter_lines():
            if not line or line == "data: [DONE]":
                continue
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            if not text and choice["delta"].get("content"):
                process.send_signal(number)
                wait_until_refused(url)
            text += choice["delta"].get("content", "")
    assert text == whole["choices"][0]["message"]["content"]
    assert choice["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert process.wait(20) == 0
    assert "Traceback" not in "".join(lines)


def wait_until_refused(url: str) -> None:
    for _ in range(200):
        try:
            httpx.get(f"{url}/models", timeout=5)
        except httpx.ConnectError:
            return
    raise AssertionError("new connections are still accepted")


def test_a_taken_port_is_found_before_the_model_is_looked_for() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port}: cannot listen there.*Choose another --port"):
            serve("./nothing", port=port, limits=RequestLimits())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "./nothing: no such model folder"),
        ({"api_key": " "}, "--api-key: the key is empty"),
        ({"api_key": "schlüssel"}, "--api-key: the key has letters that no HTTP header can hold"),
    ],
)
def test_mistakes_are_found_before_anything_is_served(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        serve("./nothing", port=0, limits=RequestLimits(), **settings)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(InputError, match="192.0.2.1:0: cannot listen there"), listen("192.0.2.1", 0):
        pass
