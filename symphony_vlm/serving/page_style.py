"""How the chat page looks: title, head, theme, style sheet."""

from __future__ import annotations

import html
import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = [
    "AFTER_ANSWER",
    "PLACEHOLDER",
    "SECOND_PLACEHOLDER",
    "header",
    "lane_title",
    "page_title",
    "router_text",
    "stylesheet",
    "theme",
]

_LOGO = (
    '<svg class="logo" viewBox="0 0 40 40" aria-hidden="true"><rect width="40" height="40" rx="10"/>'
    '<path d="M12 13 28 11M12 13 20 28M28 11 20 28"/>'
    '<circle cx="12" cy="13" r="4.5"/><circle cx="28" cy="11" r="3.5"/><circle cx="20" cy="28" r="5"/></svg>'
)


def stylesheet() -> str:
    """The page's CSS."""
    return resources.files("symphony_vlm.serving").joinpath("gradio_app.css").read_text("utf-8")


def page_title(model_name: str) -> str:
    """The model's name without its folder: a run's model is called after the run."""
    if not Path(model_name).exists():
        return model_name
    # Not resolve(): a run's model is a link to its last stage's.
    path = Path(os.path.abspath(model_name))  # noqa: PTH100
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def router_text(model: SymphonyVLMForConditionalGeneration) -> str:
    """What stands beside the name: router and experts."""
    moe = model.config.moe_config
    if moe is None:
        return "dense, no router"
    return f"{moe.router}, {moe.num_experts_per_tok} of {moe.num_experts} experts"


def header(title: str, router: str) -> str:
    """The page's head as HTML."""
    return (
        f'<div class="head">{_LOGO}<div><h1>{html.escape(title)}</h1>'
        f'<p><span class="vendor">symphony_vlm</span><span class="chip" title="Router">{html.escape(router)}</span></p>'
        "</div></div>"
    )


def lane_title(title: str, router: str) -> str:
    """What stands over one of several conversations."""
    return f'<h2>{html.escape(title)}<span class="chip" title="Router">{html.escape(router)}</span></h2>'


def theme(gr: Any) -> Any:
    """Colours and fonts, for the imported gradio."""
    # Fonts of the visitor's own system: the page works without the internet, and tells no font server about visits.
    return gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )


PLACEHOLDER = (
    '<div class="empty"><h2>Ask about a picture</h2>'
    "<p>Attach one with the paper clip below, or try an example.</p></div>"
)

SECOND_PLACEHOLDER = '<div class="empty"><p>The second model answers here.</p></div>'

# gradio scrolls before the last line has its final height, and a disabled box loses the cursor.
AFTER_ANSWER = """() => setTimeout(() => {
  const log = document.querySelector("#chat .bubble-wrap");
  if (log && log.scrollHeight - log.scrollTop - log.clientHeight < 240) {
    log.scrollTo({ top: log.scrollHeight, behavior: "smooth" });
  }
  // With a touch screen the cursor would bring the keyboard up.
  if (matchMedia("(hover: hover)").matches) document.querySelector("#question textarea")?.focus();
}, 400)"""
