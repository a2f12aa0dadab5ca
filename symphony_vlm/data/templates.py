"""The built-in conversation templates: what stands around the messages, and the same as a chat template.

Layouts: ``conversation.py`` of LLaVA (plain, vicuna_v1, mistral), LLaVA-NeXT (llama3, chatml as its ``qwen``), LibMoE
(phi3, phi35) and CuMo (mistral_system). docs/templates.md shows each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from symphony_vlm.data.chat_template import ChatTemplate
from symphony_vlm.data.sample import ImagePart, Message
from symphony_vlm.data.segments import Segment
from symphony_vlm.errors import InputError
from symphony_vlm.text import nearest

__all__ = [
    "AUTO",
    "TEMPLATES",
    "Layout",
    "Template",
    "check_template_name",
    "get_template",
    "resolve_template",
    "stop_token_ids",
]

AUTO = "auto"
"""The tokenizer's own chat template where it has one, else ``vicuna_v1``."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """The text around messages. The answer and `answer_end` are supervised, nothing else."""

    name: str
    system: tuple[str, str] = ("", "")
    """What stands before and after the system message."""
    user: tuple[str, str]
    answer_start: str
    answer_end: str
    """Closes the answer and stops generation."""
    between: str = ""
    """Follows `answer_end`, never supervised."""
    default_system: str | None = None
    bos: bool = True
    """Whether the tokenizer's BOS token, if it has one, opens the sequence."""
    system_in_user: bool = False
    """Whether the system message stands inside the marks of the first user message."""
    drops_user_text: bool = False
    """Whether of the user's message only the images are kept (captioning)."""

    @property
    def markers(self) -> str:
        """All text that the template writes, but for the default system message."""
        return "\n".join([*self.system, *self.user, self.answer_start, self.answer_end, self.between])

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Markers that a tokenizer must hold as single tokens: those in ``<|...|>`` form and the answer's end."""
        found = re.findall(r"<\|[a-z_]+\|>", self.markers)
        return tuple(dict.fromkeys([*found, *([self.answer_end] if self.answer_end.strip() else [])]))

    @property
    def stop_token(self) -> str | None:
        """The token at which generation stops; None where it is the tokenizer's EOS alone."""
        return self.answer_end if self.answer_end.strip() else None

    def segments(
        self, messages: Sequence[Message], *, tokenizer: Any, generation_prompt: bool, origin: str
    ) -> Iterator[Segment]:
        """The conversation's pieces in order; a missing system message is replaced by the default.

        Raises:
            InputError: a system message that belongs inside the first question has no question after it.
        """
        question_open = False
        if self.default_system is not None and (not messages or messages[0].role != "system"):
            question_open = self.system_in_user
            opening = self.user[0] if question_open else ""
            yield Segment("marker", opening + self.system[0] + self.default_system + self.system[1])
        for message in messages:
            if question_open and message.role != "user":
                raise InputError(
                    f"template {self.name!r} puts the system message into a question, and none follows it", where=origin
                )
            if message.role == "assistant":
                yield from self._answer(message)
                continue
            start, end = self.system if message.role == "system" else self.user
            if self.system_in_user:
                start = start if question_open else self.user[0] + start * (message.role == "system")
                start = "" if question_open else start
                question_open = message.role == "system"
            yield Segment("marker", start)
            for part in message.parts:
                if isinstance(part, ImagePart):
                    yield Segment("image", image=part.index)
                elif not self.drops_user_text:
                    yield Segment("text", part.text)
            yield Segment("marker", end)
        if generation_prompt:
            yield Segment("marker", self.answer_start)

    def _answer(self, message: Message) -> Iterator[Segment]:
        yield Segment("marker", self.answer_start)
        if self.answer_end.strip():
            yield Segment("answer", message.text)
            yield Segment("close", self.answer_end + self.between)
        else:
            # An end that is no marker but white space is tokenised with the words, as in running text.
            yield Segment("answer", message.text + self.answer_end)

    def to_jinja(self, image_token: str) -> str:
        """The same layout as a chat template for ``apply_chat_template``."""
        prompt = self.answer_start.removesuffix(" ")
        starts = {"system": self.system[0], "user": self.user[0], "assistant": prompt}
        if self.system_in_user:
            starts["system"] = self.user[0] + self.system[0]
        ends = {"system": self.system[1], "user": self.user[1], "assistant": ""}
        inside = "loop.previtem is defined and loop.previtem['role'] == 'system'"
        default = ""
        if self.default_system is not None:
            text = starts["system"] + self.default_system + self.system[1]
            default = f"{{%- if messages and messages[0]['role'] != 'system' -%}}{_say(text)}{{%- endif -%}}"
            inside += " or loop.first"
        start = f"{{{{- {_choice(starts)}[m['role']] -}}}}"
        if self.system_in_user:
            start = f"{{%- if not (m['role'] == 'user' and ({inside})) -%}}{start}{{%- endif -%}}"
        text_part = "" if self.drops_user_text else "{{- part['text'] -}}"
        lines = [
            "{%- if bos_token -%}{{- bos_token -}}{%- endif -%}" if self.bos else "",
            default,
            "{%- for m in messages -%}",
            start,
            f"{{%- if m['role'] == 'assistant' -%}}{{%- generation -%}}{_say(self.answer_start[len(prompt) :])}",
            "{{- m['content'] if m['content'] is string else m['content'] | map(attribute='text') | join -}}",
            f"{_say(self.answer_end)}{{%- endgeneration -%}}{_say(self.between)}",
            "{%- elif m['content'] is string -%}" + ("" if self.drops_user_text else "{{- m['content'] -}}"),
            "{%- else -%}{%- for part in m['content'] -%}",
            f"{{%- if part['type'] == 'image' -%}}{_say(image_token)}{{%- else -%}}{text_part}{{%- endif -%}}",
            "{%- endfor -%}{%- endif -%}",
            f"{{{{- {_choice(ends)}[m['role']] -}}}}",
            "{%- endfor -%}",
            f"{{%- if add_generation_prompt -%}}{_say(prompt)}{{%- endif -%}}",
        ]
        return "".join(lines)


def _quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _say(text: str) -> str:
    return f"{{{{- {_quote(text)} -}}}}" if text else ""


def _choice(texts: dict[str, str]) -> str:
    return "{" + ", ".join(f"'{name}': {_quote(text)}" for name, text in texts.items()) + "}"


Layout = Template | ChatTemplate
"""A built-in template, or the tokenizer's own."""

_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_MISTRAL = Template(
    name="mistral",
    system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
    user=("[INST] ", " [/INST]"),
    answer_start=" ",
    answer_end="</s>",
    system_in_user=True,
)
_PHI3 = Template(
    name="phi3",
    system=("<|system|>\n", "<|end|>\n"),
    user=("<|user|>\n", "<|end|>\n"),
    answer_start="<|assistant|>\n",
    answer_end="<|end|>",
    between="\n",
)

TEMPLATES = {
    template.name: template
    for template in (
        # Captioning, LLaVA stage 1: the line feed after the caption is supervised and there is no end token.
        Template(name="plain", user=("", ""), answer_start="", answer_end="\n", drops_user_text=True),
        # The fewest tokens around a turn: for the small models trained from scratch here.
        Template(name="compact", user=("<|user|>", ""), answer_start="<|assistant|>", answer_end="<|end|>"),
        Template(
            name="chatml",
            system=("<|im_start|>system\n", "<|im_end|>\n"),
            user=("<|im_start|>user\n", "<|im_end|>\n"),
            answer_start="<|im_start|>assistant\n",
            answer_end="<|im_end|>",
            between="\n",
            default_system="You are a helpful assistant.",
            bos=False,
        ),
        Template(
            name="vicuna_v1",
            system=("", " "),
            user=("USER: ", " "),
            answer_start="ASSISTANT: ",
            answer_end="</s>",
            default_system=_VICUNA_SYSTEM,
        ),
        _PHI3,
        replace(_PHI3, name="phi35", default_system="You are a helpful assistant."),
        Template(
            name="llama3",
            system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
            user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
            answer_start="<|start_header_id|>assistant<|end_header_id|>\n\n",
            answer_end="<|eot_id|>",
            default_system=(
                "You are a helpful language and vision assistant. "
                "You are able to understand the visual content that the user provides, "
                "and assist the user with a variety of tasks using natural language."
            ),
        ),
        # LLaVA also writes a space before </s>, which would be supervised: here the answer's end follows the answer.
        _MISTRAL,
        replace(_MISTRAL, name="mistral_system", default_system=_VICUNA_SYSTEM),
    )
}


def get_template(name: str) -> Template:
    """The built-in template of that name, else an `InputError` that names the nearest."""
    if name not in TEMPLATES:
        raise InputError(f"{name!r} is not one of {', '.join(TEMPLATES)}{nearest(name, TEMPLATES)}", where="template")
    return TEMPLATES[name]


def check_template_name(name: str) -> None:
    """Raises an `InputError` that names the nearest if a model cannot have a template of that name."""
    names = [AUTO, ChatTemplate.name, *TEMPLATES]
    if name not in names:
        raise InputError(f"{name!r} is not one of {', '.join(names)}{nearest(name, names)}", where="template")


def resolve_template(name: str, tokenizer: Any) -> Layout:
    """The layout of that name for a tokenizer, which must know its markers.

    Args:
        name: a built-in template, ``tokenizer`` for the tokenizer's own chat template, or ``auto``.
        tokenizer: where it has no ``</s>``, its EOS token closes the answers of the templates that end so.

    Raises:
        InputError: no such template, the tokenizer has no chat template or one that cannot be used, or it lacks
            markers; the message names these and the templates that would fit.
    """
    check_template_name(name)
    if name == AUTO:
        name = ChatTemplate.name if tokenizer.chat_template else "vicuna_v1"
    if name == ChatTemplate.name:
        return ChatTemplate.of(tokenizer)
    template = _with_eos(TEMPLATES[name], tokenizer)
    check_markers(template, tokenizer)
    return template


def stop_token_ids(layout: Layout, tokenizer: Any) -> list[int]:
    """Where generation stops: at the token that closes an answer, and at the tokenizer's EOS."""
    ids = [] if layout.stop_token is None else [tokenizer.convert_tokens_to_ids(layout.stop_token)]
    eos = tokenizer.eos_token_id
    return ids if eos is None or eos in ids else [*ids, eos]


def check_markers(template: Template, tokenizer: Any) -> None:
    """Raises an `InputError` if the template's markers are not single tokens; it names those that would fit."""
    missing = _missing_markers(template, tokenizer)
    if not missing:
        return
    fitting = [t.name for t in TEMPLATES.values() if not _missing_markers(_with_eos(t, tokenizer), tokenizer)]
    fitting = [ChatTemplate.name] * bool(tokenizer.chat_template) + fitting
    raise InputError(
        f"template {template.name!r} needs {', '.join(missing)} as single token{'s' * (len(missing) > 1)}, which the "
        f"tokenizer {str(tokenizer.name_or_path or type(tokenizer).__name__)!r} has not",
        where="template",
        remedy=f"Templates that fit this tokenizer: {', '.join(fitting)}.",
    )


def _missing_markers(template: Template, tokenizer: Any) -> list[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return [marker for marker in template.special_tokens if marker not in added]


def _with_eos(template: Template, tokenizer: Any) -> Template:
    if template.answer_end != "</s>" or not _missing_markers(template, tokenizer) or tokenizer.eos_token is None:
        return template
    return replace(template, answer_end=tokenizer.eos_token)
