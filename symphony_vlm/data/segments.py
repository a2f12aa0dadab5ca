"""Segments of a conversation and their tokens: markers, words and images, each tokenised on its own.

Markers may become special tokens, words never: a second copy of the tokenizer, in which no special token is
recognised, reads them. That copy also adds no space of its own in front of a piece, as sentencepiece's tokenizers do,
so that a space stands exactly where it would if the whole conversation were tokenised at once.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from symphony_vlm.data.tokenizer import IMAGE_TOKEN
from symphony_vlm.errors import InputError

__all__ = ["Place", "Segment", "SegmentTokenizer", "control_tokens", "join_segments"]

Place = Literal["start", "special", "text"]
"""What stands before a segment: nothing, a special token (or an image), or text."""


class Segment(NamedTuple):
    """One piece. `close` is a marker whose beginning, up to its first special token, closes an answer."""

    kind: Literal["marker", "close", "text", "answer", "image"]
    text: str = ""
    image: int = 0


def join_segments(segments: Iterable[Segment], *, generation_prompt: bool) -> list[Segment]:
    """Joins neighbouring markers and moves a marker's last space to the words after it.

    Tokenizers keep a space with the word that follows. A marker that ended in a lone space token would force words
    without their space, which pretrained models hardly know, most of all at the start of an answer. Markers are joined
    because some tokenizers (Phi-3's) swallow the line feed after a special token.
    """
    result: list[Segment] = []
    for segment in segments:
        if segment.kind != "image" and not segment.text:
            continue
        if result and result[-1].kind in ("marker", "close"):
            kind, text, _ = result[-1]
            if segment.kind == "marker":
                result[-1] = Segment(kind, text + segment.text)
                continue
            if segment.kind in ("text", "answer") and text.endswith(" "):
                result[-1] = Segment(kind, text[:-1])
                segment = Segment(segment.kind, " " + segment.text)
        result.append(segment)
    if generation_prompt and result and result[-1].kind in ("marker", "close"):
        # The space belongs to the answer's first word.
        result[-1] = Segment(result[-1].kind, result[-1].text.removesuffix(" "))
    return result


def control_tokens(tokenizer: Any, markers: str) -> frozenset[str]:
    """Texts that only a marker may turn into their token.

    Special tokens, the image placeholder, added tokens that the markers use, and added tokens that swallow the white
    space around them (Phi-3's ``</s>``). Other added tokens are words: Gemma's line feeds, for example.
    """
    added = tokenizer.added_tokens_decoder.values()
    used = {t.content for t in added if t.special or t.lstrip or t.rstrip}
    used |= {t.content for t in added if t.content in markers and not t.content.isspace()}
    return frozenset(used | set(tokenizer.all_special_tokens) | {IMAGE_TOKEN})


class SegmentTokenizer:
    """Tokenises segments for one tokenizer and the markers of one template.

    Args:
        tokenizer: a tokenizer of transformers with a ``tokenizers`` backend.
        markers: all text that the template writes; see `control_tokens`.

    Raises:
        InputError: the tokenizer has no such backend.
    """

    def __init__(self, tokenizer: Any, markers: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError(
                f"{type(tokenizer).__name__} is written in Python",
                where="tokenizer",
                remedy="Give a tokenizer that has a tokenizer.json.",
            )
        control = control_tokens(tokenizer, markers)
        self._tokenizer = tokenizer
        self._words = _for_words(backend, control)
        ids = {backend.token_to_id(token) for token in control}
        self._control_ids = frozenset(token for token in ids if token is not None)
        self._unk_id = tokenizer.unk_token_id
        # The longest first: one control token may begin like another.
        self._control = re.compile("|".join(map(re.escape, sorted(control, key=lambda t: (-len(t), t)))))
        self._adds_space = self._find_added_spaces(tokenizer, control)
        self._known: dict[tuple[str, Place], list[int]] = {}

    def _find_added_spaces(self, tokenizer: Any, control: frozenset[str]) -> dict[Place, bool]:
        """Where the tokenizer puts a space that is not in the text, and whether it does so before another space."""

        def whole(text: str) -> list[int]:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
            return ids

        alone = self._ids("a")
        self._doubles_spaces = whole(" a") == self._ids("  a") != self._ids(" a")
        at_start = whole("a") != alone
        # Any special token will do that stands for itself.
        anchor = next((t for t in sorted(control) if len(whole(t)) == 1 == len(whole(f"{t} ")) - len(whole(" "))), None)
        after = whole(f"{anchor}a")[1:] != alone if anchor is not None else at_start
        return {"start": at_start, "special": after, "text": False}

    def words(self, text: str, after: Place) -> list[int]:
        """Tokens of people's words; none of them is a control token, whatever is written there."""
        text = self._with_space(text, after)
        ids = self._ids(text)
        if not self._control_ids.isdisjoint(ids):
            # A vocabulary may hold a control token as a piece like any other (sentencepiece's unigrams).
            ids = self._spelled_out(text)
        return ids

    def marker(self, text: str, after: Place) -> list[int]:
        """Tokens of a template's marker."""
        known = self._known.get((text, after))
        if known is None:
            known = self._known[text, after] = self._marker(text, after)
            if len(self._known) > 10_000:  # a template that writes something new every time
                self._known.clear()
        return known

    def _marker(self, text: str, after: Place) -> list[int]:
        begin = 0
        if any(self._adds_space.values()):
            found = self._control.search(text)
            begin = found.start() if found else len(text)
        head = self._ids(self._with_space(text[:begin], after)) if begin else []
        rest: list[int] = self._tokenizer.encode(text[begin:], add_special_tokens=False) if text[begin:] else []
        return head + rest

    def closing_length(self, marker_ids: list[int]) -> int | None:
        """How many tokens up to and with the first control token; None without one."""
        return next((n for n, token in enumerate(marker_ids, start=1) if token in self._control_ids), None)

    def place_after(self, ids: list[int], before: Place) -> Place:
        """What the next segment stands behind."""
        if not ids:
            return before
        return "special" if ids[-1] in self._control_ids else "text"

    def check_round_trip(self, ids: list[int], text: str, origin: str) -> None:
        """Raises an `InputError` if an answer's tokens do not decode to the answer (to canonical equivalence)."""
        decoded = self._words.decode(ids, skip_special_tokens=False).strip()
        expected = text.strip()
        if decoded != expected and unicodedata.normalize("NFC", decoded) != unicodedata.normalize("NFC", expected):
            raise InputError(
                f"the answer {text[:60]!r} becomes {decoded[:60]!r} when its tokens are decoded",
                where=origin,
                remedy="The tokenizer cannot represent this text; use another tokenizer or clean the record.",
            )

    def _with_space(self, text: str, after: Place) -> str:
        adds = self._adds_space[after] and (self._doubles_spaces or not text.startswith(" "))
        return f" {text}" if adds and text else text

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._words.encode(text, add_special_tokens=False).ids
        return ids

    def _spelled_out(self, text: str) -> list[int]:
        pieces, begin = [], 0
        for found in self._control.finditer(text):
            pieces += [text[begin : found.start() + 1], text[found.start() + 1 : found.end()]]
            begin = found.end()
        ids = [token for piece in (*pieces, text[begin:]) if piece for token in self._ids(piece)]
        left = self._control_ids.intersection(ids) - {self._unk_id}
        if left:
            token = self._tokenizer.convert_ids_to_tokens(min(left))
            raise InputError(f"the tokenizer turns the text {text[:60]!r} into its special token {token!r}")
        return ids


def _for_words(backend: Any, control: frozenset[str]) -> Any:
    """A copy that recognises no control token and adds no space."""
    from tokenizers import Tokenizer

    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["content"] in control
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        spec[part] = _without_added_space(spec[part], part)
    spec["truncation"] = spec["padding"] = None
    copy = Tokenizer.from_str(json.dumps(spec))
    copy.encode_special_tokens = True
    return copy


def _without_added_space(part: dict[str, Any] | None, role: str) -> dict[str, Any] | None:
    kind = part["type"] if part is not None else None
    if part is None or kind == "Prepend" or (role == "decoder" and kind == "Strip" and part["content"] == " "):
        return None
    if kind == "Sequence":
        members = next(name for name in ("normalizers", "pretokenizers", "decoders") if name in part)
        kept = [_without_added_space(member, role) for member in part[members]]
        return {**part, members: [member for member in kept if member is not None]}
    if kind == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if kind == "ByteLevel":
        return {**part, "add_prefix_space": False}
    return part
