"""The page's components, and which function follows which click.

gradio is handed in, never imported here, so that importing this module costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symphony_vlm.serving.corruption_panel import SEVERITIES, corruption_choices
from symphony_vlm.serving.events import PageEvents
from symphony_vlm.serving.examples import Example
from symphony_vlm.serving.page_settings import MAX_NEW_TOKENS, MAX_TEMPERATURE
from symphony_vlm.serving.page_style import (
    AFTER_ANSWER,
    PLACEHOLDER,
    SECOND_PLACEHOLDER,
    header,
    lane_title,
    router_text,
)
from symphony_vlm.serving.routing_panel import layer_choices
from symphony_vlm.serving.visitor import Visitor

if TYPE_CHECKING:
    import gradio as gr

    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["Page"]


class Page:
    """The page of one or two models.

    Args:
        gradio: the imported library.
        models: who answers.
        titles: their names, by which visitors tell them apart.
        examples: pictures with questions for an empty chat.
        uploads: the folder that the browser may read pictures from.
    """

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
        self._events = PageEvents(gradio, models, titles, examples, uploads)

    def build(self, app: gr.Blocks, title: str) -> None:
        """Lays the page out, inside the open ``with app``."""
        gr = self._gr
        with gr.Row(elem_id="top"):
            text = "two models" if len(self._models) > 1 else router_text(self._models[0])
            gr.HTML(header(title, text), elem_id="header", padding=False)
            self._new = gr.Button("New chat", elem_id="new", variant="secondary", size="sm", scale=0)
        self._visitor = gr.State(Visitor(len(self._models)))
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Chat", elem_id="chat_tab", id="chat"):
                self._lay_out_chat()
            with gr.Tab("Corruption", elem_id="corruption_tab", id="corruption") as self._corruption_tab:
                self._lay_out_corruption()
            with gr.Tab("Routing", elem_id="routing_tab", id="routing") as self._routing_tab:
                self._lay_out_routing()
        self._connect_chat()
        self._connect_panels()
        # Once stored by an event, a page's state is dropped an hour after the page was closed.
        app.load(_keep, self._visitor, self._visitor, queue=False, api_visibility="private")

    def _lay_out_chat(self) -> None:
        gr = self._gr
        with gr.Row(elem_id="chats"):
            self._chats = [self._chat(number) for number in range(len(self._models))]
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
        with gr.Accordion("Settings", open=False, elem_id="settings"), gr.Row():
            longest = min(MAX_NEW_TOKENS, *(_positions(model) for model in self._models))
            length = gr.Slider(1, longest, value=min(128, longest), step=1, label="Longest answer", info="In tokens.")
            temperature = gr.Slider(
                0.0, MAX_TEMPERATURE, value=0.0, step=0.1, label="Temperature", info="0: always the likeliest answer."
            )
            top_p = gr.Slider(0.05, 1.0, value=1.0, step=0.05, label="Top-p", info="Only likely words.")
            # No bounds here: `Sampling.read` has messages that a visitor can act on.
            seed = gr.Number(value=-1, label="Seed", info="-1: a new one each time.")
        self._settings = [length, temperature, top_p, seed, self._visitor]

    def _chat(self, number: int) -> Any:
        several = len(self._models) > 1
        title = self._titles[number]
        with self._gr.Column(elem_classes="lane", min_width=300):
            if several:
                head = lane_title(title, router_text(self._models[number]))
                self._gr.HTML(head, padding=False, elem_classes="lane-title")
            return self._gr.Chatbot(
                elem_id="chat" if number == 0 else f"chat_{number + 1}",
                elem_classes="chat",
                show_label=False,
                label=title if several else "Conversation",
                scale=1,
                height=None,
                min_height=120 if several else 240,
                buttons=["copy"],
                # With `said`, letter by letter: neither a question nor an answer can style, or load, anything.
                render_markdown=False,
                latex_delimiters=[],
                allow_tags=False,
                allow_file_downloads=False,
                feedback_options=None,
                placeholder=PLACEHOLDER if number == 0 else SECOND_PLACEHOLDER,
                examples=[{"text": e.question, "icon": str(e.picture)} for e in self._examples]
                if number == 0
                else None,
            )

    def _lay_out_corruption(self) -> None:
        gr = self._gr
        self._asked = gr.HTML(elem_id="asked", padding=False)
        with gr.Row(elem_id="corruption_controls", visible=False) as self._corruption_controls:
            names = corruption_choices()
            self._corruption = gr.Dropdown(
                names, value="fog" if "fog" in names else names[0], label="Corruption", elem_id="corruption"
            )
            self._severity = gr.Slider(*SEVERITIES, value=3, step=1, label="Severity", elem_id="severity")
            self._compare = gr.Button("Answer on both", variant="primary", elem_id="compare", scale=0)
        with gr.Row(elem_id="both", visible=False) as self._both:
            columns = []
            for name, label in (("clean", "Clean"), ("corrupted", "Corrupted")):
                with gr.Column(elem_classes="half", min_width=140):
                    picture = gr.Image(
                        label=label, elem_id=f"{name}_picture", interactive=False, buttons=[], format="webp", height=260
                    )
                    columns += [picture, gr.HTML(elem_id=f"{name}_answers", padding=False)]
        self._columns = columns

    def _lay_out_routing(self) -> None:
        gr = self._gr
        layers = layer_choices(self._models)
        with gr.Row(elem_id="routing_controls", visible=bool(layers)):
            self._model_choice = gr.Radio(
                list(zip(self._titles, range(len(self._titles)), strict=True)),
                value=0,
                label="Model",
                visible=len(self._models) > 1,
                elem_id="routing_model",
            )
            self._layer = gr.Dropdown(
                [(f"Layer {layer}", layer) for layer in layers],
                value=layers[-1] if layers else None,
                label="Decoder layer",
                elem_id="layer",
            )
        self._routing = gr.HTML(elem_id="routing", padding=False)

    def _connect_chat(self) -> None:
        events, gr = self._events, self._gr
        outputs = [*self._chats, self._box]
        ask = events.ask
        asked = [
            self._box.submit(ask, [self._box, *self._settings], outputs, api_name="ask", **MODEL_QUEUE),
        ]
        hidden: dict[str, Any] = {"api_visibility": "private", **MODEL_QUEUE}
        for number, chat in enumerate(self._chats):
            retry = _takes(gr.RetryData, events.retry(number))
            asked.append(chat.retry(retry, self._settings, outputs, **hidden))
            undo = _takes(gr.UndoData, events.undo(number))
            chat.undo(undo, [self._visitor], outputs, **hidden)
        example = _takes(gr.SelectData, events.ask_example)
        asked.append(self._chats[0].example_select(example, self._settings, outputs, **hidden))
        for event in asked:
            event.then(None, js=AFTER_ANSWER)
        # These must not wait behind the answer that they end.
        self._box.stop(events.stop, [self._visitor], None, api_visibility="private", **AT_ONCE)
        ending: dict[str, Any] = {**AT_ONCE, "cancels": asked}
        self._cleared = [
            self._new.click(events.start_over, [self._visitor], outputs, api_name="new_chat", **ending),
            *(
                chat.clear(events.start_over, [self._visitor], outputs, api_visibility="private", **ending)
                for chat in self._chats
            ),
        ]
        for event in self._cleared:
            # The browser reads every event's updates in a loop of its own: what the ended answer wrote last may be
            # drawn after the page was cleared.
            event.then(events.current, [self._visitor], outputs, api_visibility="private", **AT_ONCE)

    def _connect_panels(self) -> None:
        events = self._events
        comparison = [self._corruption_controls, self._both, self._asked, *self._columns]
        hidden: dict[str, Any] = {"api_visibility": "private"}
        self._corruption_tab.select(events.show_corruption, [self._visitor], comparison, **hidden, **AT_ONCE)
        inputs = [self._corruption, self._severity, *self._settings]
        answers = [self._compare, *self._columns]
        self._compare.click(events.compare, inputs, answers, api_name="corrupt", **MODEL_QUEUE)
        choice = [self._model_choice, self._layer, self._visitor]
        for event in (self._routing_tab.select, self._model_choice.input):
            event(events.show_routing, choice, [self._routing], **hidden, **MODEL_QUEUE)
        self._layer.input(events.redraw_routing, choice, [self._routing], **hidden, **AT_ONCE)
        for event in self._cleared:
            event.then(events.show_corruption, [self._visitor], comparison, **hidden, **AT_ONCE)
            event.then(events.redraw_routing, choice, [self._routing], **hidden, **AT_ONCE)


MODEL_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal"}
"""One model at a time: whatever runs one waits in one line."""
AT_ONCE: dict[str, Any] = {"concurrency_id": "at_once", "concurrency_limit": None, "show_progress": "hidden"}


def _takes(event_class: type, function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function's argument ``event``: gradio recognises it by its annotation, which must be the class itself."""
    target = getattr(function, "__func__", function)
    target.__annotations__["event"] = event_class
    return function


def _keep(visitor: Visitor) -> Visitor:
    return visitor


def _positions(model: SymphonyVLMForConditionalGeneration) -> int:
    positions = getattr(model.config.text_config, "max_position_embeddings", None)
    return int(positions) if positions else MAX_NEW_TOKENS
