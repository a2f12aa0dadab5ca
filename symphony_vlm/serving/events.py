"""What happens on the page's clicks: each function takes what the browser sent and gives the components' new values.

Everything here treats the browser as a stranger: what was said lives on the server, one `Visitor` for each open page;
the browser sends a question, its uploads and settings, and every picture is decoded and drawn anew before it is shown.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symphony_vlm.errors import InputError
from symphony_vlm.serving.corruption_panel import Comparison, answers_html, ask_both, picture_of
from symphony_vlm.serving.examples import Example
from symphony_vlm.serving.faults import fault_text
from symphony_vlm.serving.page_settings import Sampling
from symphony_vlm.serving.routing_panel import routing_html
from symphony_vlm.serving.turns import add_fault, ask_models, read_question
from symphony_vlm.serving.uploads import Upload, restore_upload
from symphony_vlm.serving.visitor import Exchange, Visitor

if TYPE_CHECKING:
    from PIL import Image

    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["PageEvents"]

_PREVIEW_SIDE = 640
_PATIENCE_SECONDS = 10.0

Update = tuple[Any, ...]
"""New values of the chats and of the question box."""


class PageEvents:
    """The functions behind the page; arguments as in `page.Page`."""

    def __init__(
        self,
        gradio: Any,
        models: Sequence[SymphonyVLMForConditionalGeneration],
        titles: Sequence[str],
        examples: Sequence[Example],
        uploads: Path,
    ) -> None:
        self._gr = gradio
        self._models = models
        self._titles = titles
        self._examples = examples
        self._uploads = uploads

    def ask(
        self, message: Any, max_new_tokens: Any, temperature: Any, top_p: Any, seed: Any, visitor: Visitor
    ) -> Iterator[Update]:
        """Answers what is in the question box."""
        text = (message or {}).get("text") or ""
        files = [Path(file) for file in (message or {}).get("files") or []]
        yield from self._turn(text.strip(), files, (max_new_tokens, temperature, top_p, seed), visitor)

    def ask_example(
        self, max_new_tokens: Any, temperature: Any, top_p: Any, seed: Any, visitor: Visitor, event: Any
    ) -> Iterator[Update]:
        """Asks the example that was clicked."""
        # Only the number is taken from the browser.
        example = self._examples[int(event.index) % len(self._examples)]
        yield from self._turn(example.question, [example.picture], (max_new_tokens, temperature, top_p, seed), visitor)

    def retry(self, model: int) -> Callable[..., Iterator[Update]]:
        """For one model's chat: asks a question again, of every model, and forgets what came after it."""

        def retry(
            max_new_tokens: Any, temperature: Any, top_p: Any, seed: Any, visitor: Visitor, event: Any
        ) -> Iterator[Update]:
            if (number := visitor.exchange_at(model, _index(event))) is not None:
                old = visitor.rewind(number)
                yield from self._turn(old.text, old.uploads, (max_new_tokens, temperature, top_p, seed), visitor)

        return retry

    def undo(self, model: int) -> Callable[..., Update]:
        """For one model's chat: takes a question back into the box, words and pictures, to be changed and asked again.

        What came after it is forgotten. The component's own editing of messages fails on questions with pictures.
        """

        def undo(visitor: Visitor, event: Any) -> Update:
            number = visitor.exchange_at(model, _index(event))
            if number is None:
                return self._current(visitor, self._gr.skip())
            taken = visitor.rewind(number)
            files = [restore_upload(upload, self._uploads) for upload in taken.uploads]
            value = {"text": taken.text, "files": [str(file) for file in files]}
            return self._current(visitor, self._open_box(value=value))

        return undo

    def stop(self, visitor: Visitor) -> None:
        """Ends the answer that is being written; what is there stays."""
        visitor.stop()

    def start_over(self, visitor: Visitor) -> Update:
        """An empty conversation."""
        visitor.stop()
        visitor.conversation += 1
        # What it wrote last must reach the page before the page is cleared.
        visitor.idle.wait(timeout=_PATIENCE_SECONDS)
        visitor.clear()
        return self._current(visitor, self._open_box(value=None))

    def current(self, visitor: Visitor) -> Update:
        """The conversation as it is now, and an open box unless an answer is being written."""
        if not visitor.idle.is_set():
            return tuple(self._gr.skip() for _ in range(len(self._models) + 1))
        return self._current(visitor, self._open_box())

    def show_corruption(self, visitor: Visitor) -> Update:
        """The corruption tab before anything is asked: controls, both columns, the question, and what they hold."""
        gr, exchange = self._gr, visitor.last_with_picture()
        if exchange is None:
            text = "Ask about a picture in the chat; here the same question meets a corrupted one."
            empty = f'<div class="empty"><h2>No picture yet</h2><p>{text}</p></div>'
            return gr.update(visible=False), gr.update(visible=False), empty, None, "", None, ""
        asked = f'<p class="asked">{html.escape(exchange.text)}</p>'
        try:
            picture = self._preview(picture_of(exchange))
        except Exception as error:
            return gr.update(visible=False), gr.update(visible=False), _problem(fault_text(error)), None, "", None, ""
        return gr.update(visible=True), gr.update(visible=True), asked, picture, "", None, ""

    def compare(
        self,
        corruption: Any,
        severity: Any,
        max_new_tokens: Any,
        temperature: Any,
        top_p: Any,
        seed: Any,
        visitor: Visitor,
    ) -> Iterator[Update]:
        """Asks the last question about a picture again, of the clean and of a corrupted picture.

        Gives the button and, for each column, picture and answers.
        """
        gr, exchange = self._gr, visitor.last_with_picture()
        if exchange is None:
            yield gr.update(interactive=True), None, _problem("Ask about a picture in the chat first."), None, ""
            return
        try:
            sampling = Sampling.read(max_new_tokens, temperature, top_p, seed)
            shown: list[Any] = [None, None]
            for comparison in ask_both(self._models, exchange, str(corruption), severity, sampling):
                pictures = [gr.skip(), gr.skip()]
                for number, picture in enumerate((comparison.clean, comparison.corrupted)):
                    if shown[number] is not picture and picture is not None:
                        shown[number], pictures[number] = picture, self._preview(picture)
                yield (gr.update(interactive=comparison.done), *self._columns(comparison, pictures))
        except Exception as error:
            yield gr.update(interactive=True), gr.skip(), _problem(fault_text(error)), None, ""

    def _columns(self, comparison: Comparison, pictures: Sequence[Any]) -> Update:
        fault = "" if comparison.fault is None else _problem(comparison.fault)
        clean, corrupted = (
            answers_html(comparison, self._titles, corrupted=is_corrupted) for is_corrupted in (False, True)
        )
        if fault:
            corrupted = fault + (corrupted if comparison.answers else "")
            clean = clean if comparison.answers else ""
        return pictures[0], clean, pictures[1], corrupted

    def show_routing(self, model: Any, layer: Any, visitor: Visitor) -> Any:
        """The routing of the conversation so far; runs the model once for each answer."""
        return self._routing(model, layer, visitor, compute=True)

    def redraw_routing(self, model: Any, layer: Any, visitor: Visitor) -> Any:
        """The same of another layer, without running the model."""
        return self._routing(model, layer, visitor, compute=False)

    def _routing(self, model: Any, layer: Any, visitor: Visitor, *, compute: bool) -> Any:
        number = model if model in range(len(self._models)) else 0
        try:
            page = routing_html(self._models, visitor, int(number), layer, compute=compute)
        except Exception as error:
            return _problem(fault_text(error))
        return self._gr.skip() if page is None else page

    def _turn(
        self, text: str, files: Sequence[Path | Upload], settings: tuple[Any, ...], visitor: Visitor
    ) -> Generator[Update, None, None]:
        visitor.idle.clear()
        visitor.stopping.clear()
        visitor.view = None
        try:
            yield from self._answer(text, files, settings, visitor)
        finally:
            visitor.idle.set()

    def _answer(
        self, text: str, files: Sequence[Path | Upload], settings: tuple[Any, ...], visitor: Visitor
    ) -> Generator[Update, None, None]:
        conversation = visitor.conversation
        exchange, pictures, fault = read_question(text, files, self._preview, len(self._models))
        visitor.exchanges.append(exchange)
        yield self._current(visitor, self._closed_box())
        kept: dict[str, Any] = {}
        try:
            sampling = Sampling.read(*settings)
            if fault is not None:
                raise fault
            for number in ask_models(self._models, visitor, exchange, pictures, sampling):
                if visitor.conversation != conversation:
                    return
                update = [self._gr.skip()] * (len(self._models) + 1)
                update[number] = visitor.shown(number)
                yield tuple(update)
        except InputError as error:
            _show_everywhere(exchange, error)
            kept = {"value": {"text": text, "files": []}}
        if visitor.conversation == conversation:
            yield self._current(visitor, self._open_box(**kept))

    def _current(self, visitor: Visitor, box: Any) -> Update:
        return (*(visitor.shown(number) for number in range(len(self._models))), box)

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


def _show_everywhere(exchange: Exchange, error: InputError) -> None:
    """A question that no model was asked: each chat says why."""
    text = fault_text(error)
    for replies in exchange.replies:
        add_fault(replies, text)


def _index(event: Any) -> int:
    """The number of the message that was clicked, which came from the browser."""
    index = event.index[0] if isinstance(event.index, (list, tuple)) and event.index else event.index
    return index if isinstance(index, int) else -1


def _problem(text: str) -> str:
    return f'<div class="problem">{html.escape(text)}</div>'
