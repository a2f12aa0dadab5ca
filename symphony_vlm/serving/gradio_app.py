"""The chat page: upload a picture, ask, read the answer as it is written.

Everything here treats the browser as a stranger: what was said lives on the server, one `_Visitor` for each open page;
the browser sends a question, its uploads and two numbers, and every picture is decoded and drawn anew before it is
shown. gradio is imported inside the functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import html
import logging
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from symphony_vlm.errors import InputError
from symphony_vlm.serving.examples import Example, draw_examples
from symphony_vlm.serving.listening import listen
from symphony_vlm.serving.page_style import header, page_title, router_text, stylesheet, theme
from symphony_vlm.serving.uploads import (
    MAX_UPLOAD_BYTES,
    MAX_UPLOAD_PIXELS,
    for_visitors,
    private_upload_folder,
    read_uploads,
)

if TYPE_CHECKING:
    import gradio as gr
    from PIL import Image

    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
    from symphony_vlm.serving.chat import ChatSession

__all__ = ["MAX_UPLOAD_BYTES", "MAX_UPLOAD_PIXELS", "build_app", "launch"]

MAX_NEW_TOKENS = 512
MAX_WAITING = 32
"""Questions in the queue, over all visitors; the next one is told to come back later."""

_PREVIEW_SIDE = 640
_FORGET_SECONDS = 24 * 3600
_PATIENCE_SECONDS = 10.0
_WAITING = "…"
"""Stands in the answer's place until its first word."""

_log = logging.getLogger(__name__)

Shown = dict[str, Any]
"""A message as the page's chat shows it."""

Update = tuple[Any, Any]
"""New values of the chat and of the question box."""


class _Visitor:
    """One open page. gradio copies the empty one for each page; events change their page's in place.

    Attributes:
        session: what the model remembers; None before the first question.
        shown: what the page shows.
        conversation: counts new chats, so that an answer still on its way notices that nobody waits for it.
        idle: set while no answer is being written.
    """

    def __init__(self) -> None:
        self.session: ChatSession | None = None
        self.shown: list[Shown] = []
        self.conversation = 0
        self.idle = threading.Event()
        self.idle.set()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Visitor:
        return _Visitor()


def launch(
    model_name: str, *, host: str = "127.0.0.1", port: int = 7860, block: bool = True, **loading: Any
) -> gr.Blocks:
    """Opens the chat page and serves it until it is interrupted.

    Args:
        model_name: folder of a model or of a finished run, or a hub name.
        host: address to listen on; ``0.0.0.0`` for every address of the machine.
        port: port to listen on; 0 takes a free one.
        block: False returns at once; close the app with its ``close()``.
        loading: for `symphony_vlm.load`.

    Raises:
        InputError: the model cannot be opened, or the port is taken.
    """
    port = _usable_port(host, port)
    typer.secho(f"loading {model_name}", err=True, dim=True)
    app = build_app(model_name, **loading)
    app.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    app.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=MAX_UPLOAD_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        theme=theme(_import_gradio()),
        css=stylesheet(),
    )
    if block:
        _wait(app)
    return app


def build_app(model_name: str, **loading: Any) -> gr.Blocks:
    """The page, not yet served.

    Args:
        model_name: folder of a model or of a finished run, or a hub name.
        loading: for `symphony_vlm.load`.

    Raises:
        InputError: the model cannot be opened.
    """
    from symphony_vlm.model.loading import load

    model = load(model_name, **loading)
    uploads = private_upload_folder()
    gr = _import_gradio()
    title = page_title(model_name)
    with gr.Blocks(
        title=f"{title} · symphony_vlm", analytics_enabled=False, fill_height=True, delete_cache=(3600, _FORGET_SECONDS)
    ) as app:
        page = _Page(model, draw_examples(uploads / "examples"), uploads)
        page.build(app, title)
    return app


class _Page:
    """The components and what happens between them."""

    def __init__(self, model: SymphonyVLMForConditionalGeneration, examples: Sequence[Example], uploads: Path) -> None:
        self._gr = _import_gradio()
        self._model = model
        self._examples = examples
        self._uploads = uploads

    def build(self, app: gr.Blocks, title: str) -> None:
        """Lays the page out, inside the open ``with app``."""
        gr = self._gr
        with gr.Row(elem_id="top"):
            gr.HTML(header(title, router_text(self._model)), elem_id="header", padding=False)
            self._new = gr.Button("New chat", elem_id="new", variant="secondary", size="sm", scale=0)
        self._visitor = gr.State(_Visitor())
        self._chat = gr.Chatbot(
            elem_id="chat",
            show_label=False,
            label="Conversation",
            scale=1,
            height=None,
            min_height=240,
            buttons=["copy"],
            # With `_literal`, letter by letter: neither a question nor an answer can style, or load, anything.
            render_markdown=False,
            latex_delimiters=[],
            allow_tags=False,
            allow_file_downloads=False,
            feedback_options=None,
            placeholder=_PLACEHOLDER,
            examples=[{"text": e.question, "icon": str(e.picture)} for e in self._examples],
        )
        self._box = gr.MultimodalTextbox(
            elem_id="question",
            show_label=False,
            label="Question",
            placeholder="Ask about a picture",
            sources=["upload"],
            file_types=["image"],
            file_count="multiple",
            max_lines=6,
            max_plain_text_length=100_000,
            autofocus=True,
        )
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            longest = min(MAX_NEW_TOKENS, self._positions())
            self._length = gr.Slider(
                1, longest, value=min(128, longest), step=1, label="Longest answer", info="In tokens."
            )
            self._temperature = gr.Slider(
                0.0, 1.5, value=0.0, step=0.1, label="Temperature", info="0 always gives the likeliest answer."
            )
        self._connect()
        # Once stored by an event, a page's state is dropped an hour after the page was closed.
        app.load(_keep, self._visitor, self._visitor, queue=False, api_visibility="private")

    def _connect(self) -> None:
        outputs = [self._chat, self._box]
        settings = [self._length, self._temperature, self._visitor]
        # One model: both ways of asking wait in one line.
        model_queue: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal"}
        asked = self._box.submit(self.ask, [self._box, *settings], outputs, api_name="ask", **model_queue)
        # gradio recognises the event argument by its annotation, which must be the class itself.
        self.ask_example.__func__.__annotations__["event"] = self._gr.SelectData  # type: ignore[attr-defined]
        picked = self._chat.example_select(self.ask_example, settings, outputs, api_visibility="private", **model_queue)
        for event in (asked, picked):
            event.then(None, js=_AFTER_ANSWER)
        # These must not wait behind the answer that they end.
        at_once: dict[str, Any] = {"concurrency_id": "at_once", "concurrency_limit": None, "show_progress": "hidden"}
        self._box.stop(self.stop, [self._visitor], None, api_visibility="private", **at_once)
        at_once["cancels"] = [asked, picked]
        new = self._new.click(self.start_over, [self._visitor], outputs, api_name="new_chat", **at_once)
        cleared = self._chat.clear(self.start_over, [self._visitor], outputs, api_visibility="private", **at_once)
        del at_once["cancels"]
        for event in (new, cleared):
            # The browser reads every event's updates in a loop of its own: what the ended answer wrote last may be
            # drawn after the page was cleared.
            event.then(self.current, [self._visitor], outputs, api_visibility="private", **at_once)

    def ask(
        self, message: dict[str, Any] | None, max_new_tokens: int, temperature: float, visitor: _Visitor
    ) -> Iterator[Update]:
        """Answers what is in the question box."""
        text = (message or {}).get("text") or ""
        files = [Path(file) for file in (message or {}).get("files") or []]
        yield from self._turn(text.strip(), files, max_new_tokens, temperature, visitor)

    def ask_example(self, max_new_tokens: int, temperature: float, visitor: _Visitor, event: Any) -> Iterator[Update]:
        """Asks the example that was clicked."""
        # Only the number is taken from the browser.
        example = self._examples[int(event.index) % len(self._examples)]
        yield from self._turn(example.question, [example.picture], max_new_tokens, temperature, visitor)

    def stop(self, visitor: _Visitor) -> None:
        """Ends the answer that is being written; what is there stays."""
        if visitor.session is not None:
            visitor.session.stop()

    def start_over(self, visitor: _Visitor) -> Update:
        """An empty conversation."""
        self.stop(visitor)
        visitor.conversation += 1
        # What it wrote last must reach the page before the page is cleared.
        visitor.idle.wait(timeout=_PATIENCE_SECONDS)
        visitor.session, visitor.shown = None, []
        return [], self._open_box(value=None)

    def current(self, visitor: _Visitor) -> Update:
        """The conversation as it is now, and an open box unless an answer is being written."""
        if not visitor.idle.is_set():
            return self._gr.skip(), self._gr.skip()
        return visitor.shown, self._open_box()

    def _turn(
        self, text: str, files: Sequence[Path], max_new_tokens: int, temperature: float, visitor: _Visitor
    ) -> Generator[Update, None, None]:
        visitor.idle.clear()
        try:
            yield from self._answer(text, files, max_new_tokens, temperature, visitor)
        finally:
            visitor.idle.set()

    def _answer(
        self, text: str, files: Sequence[Path], max_new_tokens: int, temperature: float, visitor: _Visitor
    ) -> Generator[Update, None, None]:
        conversation, shown = visitor.conversation, visitor.shown
        kept: dict[str, Any] = {}
        try:
            pictures, fault = read_uploads(files)
            shown.append(self._question(text, pictures))
            yield shown, self._closed_box()
            if fault is not None:
                kept = {"value": {"text": text, "files": []}}
                raise fault
            answer = _said("assistant", _WAITING)
            shown.append(answer)
            for written in self._write(visitor, text, pictures, max_new_tokens, temperature):
                answer["content"] = _said("assistant", written or _WAITING)["content"]
                if visitor.conversation != conversation:
                    return
                yield shown, self._gr.skip()
            if answer["content"][0]["text"] == _WAITING:
                shown[-1] = _notice("Empty answer", "The model ended its answer before the first word.")
        except InputError as error:
            _show_fault(shown, for_visitors(error))
        except Exception as error:
            _log.exception("a question could not be answered")
            _show_fault(shown, f"{type(error).__name__}: {_first_line(str(error))}")
        if visitor.conversation == conversation:
            yield shown, self._open_box(**kept)

    def _write(
        self, visitor: _Visitor, text: str, pictures: Sequence[Image.Image], max_new_tokens: int, temperature: float
    ) -> Iterator[str]:
        """The answer as far as it is written, again and again; first an empty one."""
        from symphony_vlm.serving.chat import ChatSession

        session = visitor.session = visitor.session or ChatSession(self._model)
        try:
            for picture in pictures:
                session.add_image(picture)
            pieces = session.stream(text, max_new_tokens=int(max_new_tokens), temperature=float(temperature))
            written = ""
            yield written
            for piece in pieces:
                written += piece
                yield written
        finally:
            # Pictures of a turn that failed must not slip into the next question.
            session.drop_images()

    def _question(self, text: str, pictures: Sequence[Image.Image]) -> Shown:
        message = _said("user", text)
        content = [{"path": self._preview(picture), "alt_text": "Uploaded picture"} for picture in pictures]
        message["content"] = [*content, *(message["content"] if text else [])] or message["content"]
        return message

    def _preview(self, picture: Image.Image) -> str:
        """A small copy that every browser can show, whatever format was uploaded, without its metadata."""
        from gradio.processing_utils import save_pil_to_cache

        small = picture.copy()
        small.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
        saved: str = save_pil_to_cache(small, cache_dir=str(self._uploads), format="webp")
        return saved

    def _open_box(self, **changes: Any) -> Any:
        return self._gr.update(interactive=True, submit_btn=True, stop_btn=False, **changes)

    def _closed_box(self) -> Any:
        return self._gr.update(value=None, interactive=False, submit_btn=False, stop_btn=True)

    def _positions(self) -> int:
        positions = getattr(self._model.config.text_config, "max_position_embeddings", None)
        return int(positions) if positions else MAX_NEW_TOKENS


def _keep(visitor: _Visitor) -> _Visitor:
    return visitor


def _said(role: str, text: str) -> Shown:
    return {"role": role, "content": [{"type": "text", "text": _literal(text)}]}


def _literal(text: str) -> str:
    """Text for the chat component, which takes tags for HTML even with Markdown off."""
    return html.escape(text, quote=False)


def _notice(title: str, text: str) -> Shown:
    return {**_said("assistant", text), "metadata": {"title": title}}


def _show_fault(shown: list[Shown], text: str) -> None:
    if shown and shown[-1] == _said("assistant", _WAITING):
        shown.pop()
    shown.append(_notice("⚠️ Not answered", text))


def _first_line(text: str) -> str:
    line = text.strip().split("\n")[0]
    return line if len(line) <= 200 else f"{line[:199]}…"


def _import_gradio() -> Any:
    """gradio, asked beforehand not to report its use."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    return gradio


def _usable_port(host: str, port: int) -> int:
    """Tries the address, before the model takes its time to load."""
    with listen(host, port) as probe:
        free: int = probe.getsockname()[1]
        return free


def _wait(app: gr.Blocks) -> None:
    stopped = threading.Event()
    if threading.current_thread() is threading.main_thread():
        # How containers stop a program; without this the uploads would stay behind.
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        typer.echo(f"Open {app.local_url} in a browser; Ctrl-C stops.", err=True)
        stopped.wait()
    except KeyboardInterrupt:
        typer.echo(err=True)
    finally:
        app.close(verbose=False)


_PLACEHOLDER = (
    '<div class="empty"><h2>Ask about a picture</h2>'
    "<p>Attach one with the paper clip below, or try an example.</p></div>"
)

# gradio scrolls before the last line has its final height, and a disabled box loses the cursor.
_AFTER_ANSWER = """() => setTimeout(() => {
  const log = document.querySelector("#chat .bubble-wrap");
  if (log && log.scrollHeight - log.scrollTop - log.clientHeight < 240) {
    log.scrollTo({ top: log.scrollHeight, behavior: "smooth" });
  }
  // With a touch screen the cursor would bring the keyboard up.
  if (matchMedia("(hover: hover)").matches) document.querySelector("#question textarea")?.focus();
}, 400)"""
