"""The tokenizer's own chat template: a conversation in segments, without ever searching for words inside its text.

The conversation is rendered once with a private mark in the place of every message's content. The text between the
marks is the template's, so the pieces are known. What the template does with the contents themselves is checked by a
second rendering: they may be trimmed, nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from symphony_vlm.data.sample import ImagePart, Message, Role
from symphony_vlm.data.segments import Segment, control_tokens
from symphony_vlm.data.tokenizer import IMAGE_TOKEN
from symphony_vlm.errors import InputError

__all__ = ["ChatTemplate"]

_WHERE = "the tokenizer's chat template"
_OPEN, _CLOSE = "\uf8f0", "\uf8f1"
"""Around a private mark: code points for private use, and behind the first a number that no text has there."""

_PRELUDE = (
    "{%- set flat = namespace(messages=[]) -%}{%- for m in messages -%}{%- set joined = namespace(text='') -%}"
    "{%- if m['content'] is string -%}{%- set joined.text = m['content'] -%}"
    "{%- else -%}{%- for part in m['content'] -%}{%- set joined.text = joined.text + "
    "('IMAGE' if part['type'] == 'image' else part['text']) -%}{%- endfor -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [dict(m, content=CONTENT)] -%}{%- endfor -%}"
    "THINKING{%- set messages = flat.messages %}\n"
)
"""Turns every content into one text, images into placeholders, before the template sees it: most templates are written
for text alone, and the others would write another model's image marks. The line feed at the end belongs to the tag."""
_CONTENTS = ("joined.text", "[{'type': 'text', 'text': joined.text}]")
"""What templates take as content: a text, or a list of parts."""
_NO_THINKING = "{%- if enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif -%}"
"""The data holds no thoughts; so templates that can open an answer with or without (Qwen3) open it without."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A chat template of jinja, and how it opens and closes answers."""

    name: ClassVar[str] = "tokenizer"
    bos: ClassVar[bool] = False
    """The text itself holds the BOS token, if the template wants one."""

    text: str
    """The jinja text; contents may be texts or lists of parts with images."""
    opening: str
    """From the end of a question to its answer, as the generation prompt has it; in training too, for every answer."""
    closing: str
    """From the end of an answer to the token that closes it: that token, perhaps after white space."""

    @property
    def markers(self) -> str:
        """All text that the template may write."""
        return self.text

    @property
    def stop_token(self) -> str:
        """The token at which generation stops."""
        return self.closing.strip()

    def to_jinja(self, image_token: str) -> str:
        """The chat template for ``apply_chat_template``."""
        assert image_token == IMAGE_TOKEN
        return self.text

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate:
        """The tokenizer's own.

        Raises:
            InputError: it has none, or none that can be used; the message says what it lacks.
        """
        if not tokenizer.chat_template:
            raise InputError(
                f"the tokenizer {str(tokenizer.name_or_path)!r} has no chat template",
                where="template",
                remedy="Name a built-in template.",
            )
        try:
            text: str = tokenizer.get_chat_template()
        except ValueError as error:  # several, none of them the default
            raise InputError(str(error).splitlines()[0][:200], where=_WHERE) from error
        thinking = _NO_THINKING if "enable_thinking" in text else ""
        prelude = _PRELUDE.replace("IMAGE", IMAGE_TOKEN).replace("THINKING", thinking)
        failed: InputError | None = None
        for content in _CONTENTS:
            try:
                return cls.read(prelude.replace("CONTENT", content) + text, tokenizer)
            except InputError as error:
                failed = failed or error
        assert failed is not None
        raise failed

    @classmethod
    def read(cls, text: str, tokenizer: Any) -> ChatTemplate:
        """A template that takes contents of every form, such as a saved processor's.

        Raises:
            InputError: it refuses a question with its answer, leaves one out, or closes answers with no special token.
        """
        question, answer = _mark(0, "m", 0), _mark(0, "m", 1)
        asked: list[dict[str, str]] = [{"role": "user", "content": question}]
        both = [*asked, {"role": "assistant", "content": answer}]
        plain, prompt, whole = (
            _render(text, tokenizer, messages, generation_prompt, _WHERE)
            for messages, generation_prompt in ((asked, False), (asked, True), (both, False))
        )
        for rendered, marks in ((plain, [question]), (prompt, [question]), (whole, [question, answer])):
            if [found[0] for found in _marks(0).finditer(rendered)] != marks:
                raise InputError("a question or an answer does not come out as it went in", where=_WHERE)
        asked_prompt, asked_plain = prompt.split(question)[1], plain.split(question)[1]
        between = whole.split(question)[1].split(answer)[0]
        # Templates without a generation prompt (Mistral's has none) open answers as they do in a conversation.
        opening = between if asked_prompt == asked_plain or between == f"{asked_prompt} " else asked_prompt
        tokens = "|".join(re.escape(t) for t in sorted(control_tokens(tokenizer, text), key=len, reverse=True))
        closing = re.match(rf"\s*(?:{tokens})", whole.split(answer)[1])
        if closing is None:
            raise InputError(
                f"no special token closes an answer; after it stands {whole.split(answer)[1][:40]!r}",
                where=_WHERE,
                remedy="The model could not learn where to stop. Name a built-in template.",
            )
        template = cls(text=text, opening=opening, closing=closing[0])
        template._opened(between, _WHERE)
        return template

    def segments(
        self, messages: Sequence[Message], *, tokenizer: Any, generation_prompt: bool, origin: str
    ) -> Iterator[Segment]:
        """The conversation's pieces in order.

        Raises:
            InputError: the template refuses the conversation (a system message, roles that do not alternate), or
                changes or leaves out a message.
        """
        if not messages:
            raise InputError("the conversation has no message", where=origin)
        number = _free_number(messages)
        contents = [_content(message, number) for message in messages]
        roles: list[Role] = [message.role for message in messages]
        marked = _conversation(roles, [_mark(number, "m", i) for i in range(len(messages))])
        markers = self._markers(_render(self.text, tokenizer, marked, generation_prompt, origin), number, roles, origin)
        rendered = _render(self.text, tokenizer, _conversation(roles, contents), generation_prompt, origin)
        contents = _as_rendered(markers, contents, rendered, origin)
        last = len(messages)
        for i, marker in enumerate(markers):
            begins_answer = roles[i] == "assistant" if i < last else generation_prompt
            if begins_answer and i > 0 and roles[i - 1] == "user":
                marker = self._opened(marker, origin)
            if i > 0 and roles[i - 1] == "assistant":
                if not marker.startswith(self.closing):
                    raise _refusal(f"closes an answer with {marker[:40]!r} instead of {self.closing!r}", origin)
                yield Segment("close", marker)
            else:
                yield Segment("marker", marker)
            if i < last:
                yield from _content_segments(contents[i], roles[i], number)

    def _markers(self, rendered: str, number: int, roles: Sequence[Role], origin: str) -> list[str]:
        """The text around the contents, one more than there are messages."""
        found = [int(mark["index"]) for mark in _marks(number).finditer(rendered)]
        for i, role in enumerate(roles):
            if found.count(i) != 1:
                raise _refusal(f"writes message {i + 1} ({role}) {found.count(i)} times instead of once", origin)
        if found != sorted(found):
            raise _refusal("changes the order of the messages", origin)
        return re.split(_marks(number).pattern.replace("(?P<index>", "(?:"), rendered)

    def _opened(self, marker: str, origin: str) -> str:
        """What opens an answer: the generation prompt's words, wherever the template has others in a history.

        Qwen3 leaves out the empty thoughts of all answers but the last. Trained so, these answers would be opened
        otherwise than in use.
        """
        if marker in (self.opening, f"{self.opening} "):
            return marker
        if marker.startswith(self.opening.rstrip(" ")) or self.opening.startswith(marker.rstrip(" ")):
            return self.opening
        raise _refusal(
            f"opens an answer with {marker[-60:]!r} in a conversation and {self.opening[-60:]!r} to generate", origin
        )


def _refusal(problem: str, origin: str) -> InputError:
    return InputError(
        f"{_WHERE} {problem}" if origin != _WHERE else f"it {problem}",
        where=origin,
        remedy="Change the record, or name a built-in template.",
    )


def _mark(number: int, kind: str, index: int) -> str:
    return f"{_OPEN}{number}{kind}{index}{_CLOSE}"


def _marks(number: int, kind: str = "m") -> re.Pattern[str]:
    return re.compile(rf"{_OPEN}{number}{kind}(?P<index>\d+){_CLOSE}")


def _free_number(messages: Sequence[Message]) -> int:
    """A number that makes marks which no message contains."""
    texts = [message.text for message in messages]
    number = 0
    while any(f"{_OPEN}{number}" in text for text in texts):
        number += 1
    return number


def _content(message: Message, number: int) -> str:
    if message.role == "assistant":
        return message.text
    return "".join(
        _mark(number, "i", part.index) if isinstance(part, ImagePart) else part.text for part in message.parts
    )


def _content_segments(content: str, role: Role, number: int) -> Iterator[Segment]:
    if role == "assistant":
        yield Segment("answer", content)
        return
    begin = 0
    for mark in _marks(number, "i").finditer(content):
        yield Segment("text", content[begin : mark.start()])
        yield Segment("image", image=int(mark["index"]))
        begin = mark.end()
    yield Segment("text", content[begin:])


def _conversation(roles: Sequence[Role], contents: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def _render(text: str, tokenizer: Any, messages: Sequence[dict[str, str]], generation_prompt: bool, origin: str) -> str:
    """The text of a conversation, by transformers' sandboxed jinja."""
    from jinja2.exceptions import TemplateError

    try:
        rendered: str = tokenizer.apply_chat_template(
            list(messages), chat_template=text, tokenize=False, add_generation_prompt=generation_prompt
        )
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        problem = " ".join(str(error).split())[:200]
        if origin == _WHERE:
            raise InputError(f"it cannot be used: {problem}", where=origin) from error
        raise _refusal(f"refuses the conversation: {problem}", origin) from error
    return rendered


def _as_rendered(markers: Sequence[str], contents: Sequence[str], rendered: str, origin: str) -> list[str]:
    """The contents as the template wrote them: as they are, or trimmed.

    Raises:
        InputError: the markers with the contents between them do not make up the rendered text.
    """
    expected = [text for pair in zip(markers, contents, strict=False) for text in pair]
    if rendered == "".join([*expected, markers[-1]]):
        return list(contents)
    pattern = "".join(
        re.escape(marker) + "(" + "|".join(map(re.escape, _trimmed(content))) + ")"
        for marker, content in zip(markers, contents, strict=False)
    )
    found = re.fullmatch(pattern + re.escape(markers[-1]), rendered)
    if found is None:
        raise _refusal("looks into the messages of this conversation and rewrites them", origin)
    return list(found.groups())


def _trimmed(text: str) -> list[str]:
    """The ways in which templates trim a text."""
    ways = (text, text.strip(), text.strip("\n"), text.lstrip(), text.lstrip("\n"), text.rstrip(), text.rstrip("\n"))
    return list(dict.fromkeys(ways))
