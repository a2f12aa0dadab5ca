"""Conversations to token ids and labels, segment by segment.

Every piece of a conversation (a role marker, the user's words, an image, an answer) is tokenised on its own and carries
its own label, so that the mask never depends on finding text again inside tokens. Users' words are tokenised with
special tokens switched off: whatever they type stays text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from symphony_vlm.data.sample import ImagePart, Message
from symphony_vlm.errors import InputError
from symphony_vlm.text import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORE_INDEX", "TEMPLATES", "EncodedConversation", "Template", "encode_conversation", "get_template"]

IGNORE_INDEX = -100


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
    drops_user_text: bool = False
    """Whether of the user's message only the images are kept (captioning)."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Markers in ``<|...|>`` form that a newly trained tokenizer should hold as single tokens."""
        import re

        text = "".join([*self.system, *self.user, self.answer_start, self.answer_end])
        return tuple(dict.fromkeys(re.findall(r"<\|[a-z_]+\|>", text)))

    def to_jinja(self, image_token: str) -> str:
        """The same layout as a chat template for ``apply_chat_template``."""
        prompt = self.answer_start.rstrip(" ")
        space = self.answer_start[len(prompt) :]
        texts = {"image": image_token, "end": self.answer_end, "prompt": prompt, "space": space}
        quote = {name: _jinja_quote(text) for name, text in texts.items()}
        system = self.default_system
        user_text = "{%- elif m['role'] == 'assistant' -%}" if self.drops_user_text else "{%- elif true -%}"
        user_string = "" if self.drops_user_text else "{{- m['content'] -}}"
        lines = [
            "{%- if bos_token -%}{{- bos_token -}}{%- endif -%}" if self.bos else "",
            "{%- if messages and messages[0]['role'] != 'system' -%}"
            + f"{{{{- {_jinja_quote(self.system[0] + system + self.system[1])} }}}}"
            + "{%- endif -%}"
            if system is not None
            else "",
            "{%- for m in messages -%}",
            f"{{%- set start = {{'system': {_jinja_quote(self.system[0])}, 'user': {_jinja_quote(self.user[0])}, "
            f"'assistant': {quote['prompt']}}}[m['role']] -%}}",
            f"{{%- set end = {{'system': {_jinja_quote(self.system[1])}, 'user': {_jinja_quote(self.user[1])}, "
            f"'assistant': ''}}[m['role']] -%}}",
            "{{- start -}}",
            f"{{%- if m['role'] == 'assistant' -%}}{{%- generation -%}}{{{{- {quote['space']} -}}}}",
            "{{- m['content'] if m['content'] is string else m['content'] | map(attribute='text') | join -}}",
            f"{{{{- {quote['end']} -}}}}",
            f"{{%- endgeneration -%}}{{{{- {_jinja_quote(self.between)} -}}}}",
            f"{{%- elif m['content'] is string -%}}{user_string}",
            "{%- else -%}{%- for part in m['content'] -%}",
            f"{{%- if part['type'] == 'image' -%}}{{{{- {quote['image']} -}}}}",
            f"{user_text}{{{{- part['text'] -}}}}{{%- endif -%}}{{%- endfor -%}}{{%- endif -%}}",
            "{{- end -}}",
            "{%- endfor -%}",
            f"{{%- if add_generation_prompt -%}}{{{{- {quote['prompt']} -}}}}{{%- endif -%}}",
        ]
        return "".join(lines)


def _jinja_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


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
            default_system=(
                "A chat between a curious user and an artificial intelligence assistant. "
                "The assistant gives helpful, detailed, and polite answers to the user's questions."
            ),
        ),
    )
}


def get_template(name: str) -> Template:
    """The built-in template of that name, else an `InputError` that names the nearest."""
    if name not in TEMPLATES:
        raise InputError(f"{name!r} is not one of {', '.join(TEMPLATES)}{nearest(name, TEMPLATES)}", where="template")
    return TEMPLATES[name]


@dataclass(frozen=True, kw_only=True)
class EncodedConversation:
    """Token ids and labels of one conversation, images as runs of the placeholder id."""

    input_ids: list[int]
    labels: list[int]
    """`IGNORE_INDEX` outside of answers."""
    image_order: tuple[int, ...]
    """Indices of the sample's images in the order in which their placeholders stand."""


@dataclass(frozen=True)
class _Segment:
    kind: Literal["marker", "text", "answer", "answer_end", "image"]
    text: str = ""
    image: int = 0


def encode_conversation(
    messages: Sequence[Message],
    *,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    image_token_id: int,
    num_image_tokens: int | Sequence[int],
    generation_prompt: bool = False,
    max_length: int | None = None,
    origin: str = "conversation",
) -> EncodedConversation:
    """Tokenises a conversation.

    Args:
        messages: turns; a missing system message is replaced by the template's default.
        template: the layout.
        tokenizer: must know the template's markers.
        image_token_id: placeholder id, written `num_image_tokens` times for each image.
        num_image_tokens: features per image, or of each of the sample's images where they differ.
        generation_prompt: ends with the marker that opens the answer (inference); else answers are required.
        max_length: longest sequence; the end is cut, but never inside an image.
        origin: file and record for error messages.

    Raises:
        InputError: an answer's tokens do not decode to the answer, nothing is supervised, or the limit would cut an
            image; the message names the sample.
    """
    ids: list[int] = []
    labels: list[int] = []
    spans: list[tuple[int, int]] = []
    order: list[int] = []
    if template.bos and tokenizer.bos_token_id is not None:
        ids.append(tokenizer.bos_token_id)
        labels.append(IGNORE_INDEX)
    for segment in _with_spaces_before_words(_segments(messages, template, generation_prompt)):
        if segment.kind == "image":
            count = num_image_tokens if isinstance(num_image_tokens, int) else num_image_tokens[segment.image]
            new = [image_token_id] * count
            spans.append((len(ids), len(ids) + count))
            order.append(segment.image)
        else:
            new = _tokenize(tokenizer, segment)
        supervised = segment.kind in ("answer", "answer_end")
        if supervised:
            _check_round_trip(tokenizer, new, segment.text, origin)
        ids += new
        labels += new if supervised else [IGNORE_INDEX] * len(new)
    if max_length is not None and len(ids) > max_length:
        lost = next(((a, b) for a, b in spans if b > max_length), None)
        if lost is not None:
            raise InputError(
                f"{len(ids)} tokens, and the limit of {max_length} would cut an image's {lost[1] - lost[0]} tokens",
                where=origin,
                remedy="Raise max_length, or split the record.",
            )
        ids, labels = ids[:max_length], labels[:max_length]
    if not generation_prompt and all(label == IGNORE_INDEX for label in labels):
        raise InputError(
            f"no supervised token among {len(ids)}" + (f" (limit {max_length})" if max_length else ""),
            where=origin,
            remedy="The record needs an answer, within max_length.",
        )
    return EncodedConversation(input_ids=ids, labels=labels, image_order=tuple(order))


def _segments(messages: Sequence[Message], template: Template, generation_prompt: bool) -> Iterator[_Segment]:
    if template.default_system is not None and (not messages or messages[0].role != "system"):
        yield _Segment("marker", template.system[0] + template.default_system + template.system[1])
    for message in messages:
        if message.role == "assistant":
            yield _Segment("marker", template.answer_start)
            # An end that is no marker but white space is tokenised with the words, as in running text.
            end = template.answer_end
            yield _Segment("answer", message.text if end.strip() else message.text + end)
            yield _Segment("answer_end", end if end.strip() else "")
            yield _Segment("marker", template.between)
        else:
            start, end = template.system if message.role == "system" else template.user
            yield _Segment("marker", start)
            for part in message.parts:
                if isinstance(part, ImagePart):
                    yield _Segment("image", image=part.index)
                elif not template.drops_user_text:
                    yield _Segment("text", part.text)
            yield _Segment("marker", end)
    if generation_prompt:
        yield _Segment("marker", template.answer_start)


def _with_spaces_before_words(segments: Iterable[_Segment]) -> list[_Segment]:
    """Joins neighbouring markers and moves a marker's last space to the words after it.

    Tokenizers keep a space with the word that follows. A marker that ended in a lone space token would force words
    without their space, which pretrained models hardly know, most of all at the start of an answer.
    """
    result: list[_Segment] = []
    for segment in segments:
        if segment.kind != "image" and not segment.text:
            continue
        if result and result[-1].kind == "marker":
            marker = result[-1].text
            if segment.kind == "marker":
                result[-1] = _Segment("marker", marker + segment.text)
                continue
            if segment.kind in ("text", "answer") and marker.endswith(" "):
                result[-1] = _Segment("marker", marker[:-1])
                segment = _Segment(segment.kind, " " + segment.text)
        result.append(segment)
    if result and result[-1].kind == "marker":
        result[-1] = _Segment("marker", result[-1].text.rstrip(" "))
    return result


def _tokenize(tokenizer: PreTrainedTokenizerBase, segment: _Segment) -> list[int]:
    # Only the template's own markers may become special tokens; people's words, in questions and answers, stay text.
    plain = segment.kind in ("text", "answer")
    # A sentencepiece tokenizer puts a space before whatever it is given.
    text = segment.text[1:] if segment.text.startswith(" ") and _adds_space(tokenizer) else segment.text
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=plain)
    return ids


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    first: str = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))[0]
    return first.startswith("\u2581")


def _check_round_trip(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, origin: str) -> None:
    decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if decoded.strip() != text.strip():
        raise InputError(
            f"the answer {text[:60]!r} becomes {decoded[:60]!r} when its tokens are decoded",
            where=origin,
            remedy="The tokenizer cannot represent this text; use another tokenizer or clean the record.",
        )
