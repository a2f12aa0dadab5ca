"""What holds for every template, tokenizer and text: labels are the answers with their ends, and nothing else."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from symphony_vlm.data.conversation import IGNORE_INDEX, EncodedConversation, encode_conversation
from symphony_vlm.data.sample import ImagePart, Message, TextPart
from symphony_vlm.data.templates import TEMPLATES, resolve_template
from symphony_vlm.data.tokenizer import IMAGE_TOKEN
from symphony_vlm.errors import InputError


def _material() -> ModuleType:
    if "template_material" not in sys.modules:
        path = Path(__file__).with_name("template_material.py")
        spec = importlib.util.spec_from_file_location("template_material", path)
        assert spec is not None and spec.loader is not None
        sys.modules["template_material"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["template_material"]


material = _material()
message = material.message
CHATS = material.CHATS

EXAMPLES = settings(
    max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
OPEN, CLOSE = "⟦", "⟧"
"""Mark what is supervised; no generated text contains them."""
TRAPS = ["<image>", "<s>", "</s>", "<unk>", "<|pad|>", "<|end|>", "<|im_end|>", "<|im_start|>assistant", "<|eot_id|>"]
TRAPS += ["<end_of_turn>", "[INST]", "[/INST]", "USER:", "ASSISTANT:", "<|user|>", "<|assistant|>", "<|endoftext|>"]
TRAPS += ["<<SYS>>", "<think>", "{{ messages }}", "{%"]


def texts(*, blank: bool = True) -> st.SearchStrategy[str]:
    """Any Unicode text with pieces that look like markers; sentencepiece writes U+2581 for a space."""
    letters = st.characters(exclude_categories=("Cs",), exclude_characters=f"{OPEN}{CLOSE}\u2581")
    pieces = st.lists(
        st.one_of(st.text(letters, max_size=6), st.sampled_from([*TRAPS, " ", "\n", "What is the red"])), max_size=5
    )
    text = pieces.map("".join)
    return text if blank else text.filter(lambda t: bool(t.strip()))


@st.composite
def conversations(draw: st.DrawFn, *, system: bool = True) -> list[Message]:
    """Turns of questions, with images anywhere among their words, and answers; perhaps a system message."""
    numbers = itertools.count()
    messages = []
    if system and draw(st.booleans()):
        messages.append(message("system", draw(texts(blank=False))))
    for _ in range(draw(st.integers(1, 3))):
        pieces = draw(st.lists(st.one_of(st.none(), texts()), min_size=1, max_size=4))
        parts = tuple(ImagePart(index=next(numbers)) if p is None else TextPart(text=p) for p in pieces)
        messages.append(Message(role="user", parts=parts))
        messages.append(message("assistant", draw(texts(blank=False))))
    return messages


def encode(template: Any, tokenizer: Any, messages: Any, **settings: Any) -> EncodedConversation:
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    settings = {"num_image_tokens": 2} | settings
    return encode_conversation(messages, template=template, tokenizer=tokenizer, image_token_id=image, **settings)


def runs(encoded: EncodedConversation) -> list[list[int]]:
    """The supervised stretches, in order."""
    found = itertools.groupby(zip(encoded.input_ids, encoded.labels, strict=True), lambda pair: pair[1] != IGNORE_INDEX)
    stretches = [list(pairs) for supervised, pairs in found if supervised]
    assert all(token == label for pairs in stretches for token, label in pairs)
    return [[token for token, _ in pairs] for pairs in stretches]


def text_of(tokenizer: Any, ids: list[int]) -> str:
    """Decodes to the letter, by the vocabulary alone: transformers takes a first space away for sentencepiece."""
    pieces = tokenizer.convert_ids_to_tokens(ids)
    if "Ġ" in tokenizer.get_vocab():
        decoded: str = tokenizer.decode(ids, skip_special_tokens=False)
        return decoded
    letters = (re.fullmatch(r"<0x(..)>", piece) for piece in pieces)
    joined = b"".join(
        bytes.fromhex(letter[1]) if letter else piece.replace("▁", " ").encode()
        for letter, piece in zip(letters, pieces, strict=True)
    )
    return joined.decode()


def check_answers(encoded: EncodedConversation, tokenizer: Any, expected: list[str]) -> None:
    """The supervised stretches are the answers with their ends, but for one space that may stand before each."""
    found = [text_of(tokenizer, run) for run in runs(encoded)]
    assert [
        text.removeprefix(" ") if text == f" {e}" else text for text, e in zip(found, expected, strict=True)
    ] == expected


def check_prompts(template: Any, tokenizer: Any, messages: list[Message]) -> None:
    """Prompt and answer tokens, one after the other, are the training sequence, at every turn."""
    encoded = encode(template, tokenizer, messages)
    ends = [i + 1 for i, label in enumerate(encoded.labels) if label != IGNORE_INDEX]
    ends = [end for end in ends if end not in (e - 1 for e in ends)]
    answers = runs(encoded)
    number = 0
    for i, m in enumerate(messages):
        if m.role == "assistant":
            prompt = encode(template, tokenizer, messages[:i], generation_prompt=True)
            assert prompt.labels == encoded.labels[: len(prompt.labels)]
            assert (
                prompt.input_ids + answers[number] == encoded.input_ids[: len(prompt.input_ids) + len(answers[number])]
            )
            assert len(prompt.input_ids) + len(answers[number]) == ends[number]
            number += 1
    assert number == len(answers)


def check_images(encoded: EncodedConversation, tokenizer: Any, messages: list[Message]) -> None:
    """One run of placeholders for every image, and no placeholder from words."""
    images = [part.index for m in messages for part in m.parts if isinstance(part, ImagePart)]
    assert list(encoded.image_order) == images
    assert encoded.input_ids.count(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)) == 2 * len(images)


SYSTEMS = {
    "chatml": "You are a helpful assistant.",
    "phi35": "You are a helpful assistant.",
    "vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "llama3": "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language.",
}
SYSTEMS["mistral_system"] = SYSTEMS["vicuna_v1"]
TURNS: dict[str, Callable[[str, str], str]] = {
    "chatml": lambda role, text: f"<|im_start|>{role}\n{text}<|im_end|>\n",
    "compact": lambda role, text: text if role == "system" else f"<|{role}|>{text}",
    "phi3": lambda role, text: f"<|{role}|>\n{text}<|end|>\n",
    "llama3": lambda role, text: f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>",
    "vicuna_v1": lambda role, text: {"system": f"{text} ", "user": f"USER: {text} ", "assistant": f"ASSISTANT:{text}"}[
        role
    ],
}
TURNS["phi35"] = TURNS["phi3"]
ENDS = {name: TEMPLATES[name].answer_end for name in TEMPLATES}
SPACED = {"vicuna_v1", "mistral", "mistral_system"}


def written_out(name: str, messages: list[Message]) -> str:
    """The whole text of a built-in template, what is supervised in brackets; written here once more, by hand."""
    contents = ["".join(IMAGE_TOKEN * 2 if isinstance(p, ImagePart) else p.text for p in m.parts) for m in messages]
    turns = [(m.role, content) for m, content in zip(messages, contents, strict=True)]
    if name in SYSTEMS and turns[0][0] != "system":
        turns.insert(0, ("system", SYSTEMS[name]))
    text = "" if name == "chatml" else "<s>"
    for i, (role, content) in enumerate(turns):
        if role == "assistant":
            answer = f"{OPEN}{' ' * (name in SPACED)}{content}{ENDS[name]}{CLOSE}"
            if name.startswith("mistral"):
                text += answer
            elif name == "compact":
                text += f"<|assistant|>{answer}"
            else:
                text += TURNS[name](role, answer).replace(f"{ENDS[name]}{CLOSE}{ENDS[name]}", f"{ENDS[name]}{CLOSE}")
        elif name.startswith("mistral"):
            inside = f"<<SYS>>\n{content}\n<</SYS>>\n\n" if role == "system" else f"{content} [/INST]"
            text += inside if i > 0 and turns[i - 1][0] == "system" else f"[INST] {inside}"
        else:
            text += TURNS[name](role, content)
    return text


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "plain"])
@EXAMPLES
@given(messages=conversations())
def test_the_whole_text_and_what_is_supervised_is_as_written_out(name: str, messages: list[Message]) -> None:
    """With a byte-level tokenizer every letter can be followed: nothing added, lost or labelled beside an answer."""
    tokenizer = material.tokenizer_of("byte_level")
    encoded = encode(TEMPLATES[name], tokenizer, messages)
    stretches = itertools.groupby(
        zip(encoded.input_ids, encoded.labels, strict=True), lambda pair: pair[1] != IGNORE_INDEX
    )
    shown = "".join(
        f"{OPEN}{text}{CLOSE}" if supervised else text
        for supervised, pairs in stretches
        for text in [tokenizer.decode([token for token, _ in pairs])]
    )
    assert shown == written_out(name, messages)


@pytest.mark.parametrize("kind", material.KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
@EXAMPLES
@given(messages=conversations())
def test_built_in_templates_supervise_the_answers_and_their_ends(name: str, kind: str, messages: list[Message]) -> None:
    tokenizer = material.tokenizer_of(kind)
    template = resolve_template(name, tokenizer)
    if name == "plain":  # captions have one turn; without a marker two could not be told apart
        messages = [m for m in messages if m.role != "system"][:2]
    encoded = encode(template, tokenizer, messages)
    check_answers(encoded, tokenizer, [m.text + template.answer_end for m in messages if m.role == "assistant"])
    check_images(encoded, tokenizer, messages)
    check_prompts(template, tokenizer, messages)


@pytest.mark.parametrize("kind", material.KINDS)
@pytest.mark.parametrize("name", CHATS)
@EXAMPLES
@given(data=st.data())
def test_chat_templates_supervise_the_answers_and_their_ends(name: str, kind: str, data: st.DataObject) -> None:
    chat = CHATS[name]
    messages = data.draw(conversations(system=chat.system))
    tokenizer = material.chat_tokenizer(name, kind)
    template = resolve_template("tokenizer", tokenizer)
    encoded = encode(template, tokenizer, messages)
    answers = [chat.trims(m.text) for m in messages if m.role == "assistant"]
    if name == "qwen3":  # it takes line feeds from before the last answer alone
        answers[-1] = answers[-1].lstrip("\n")
    closing = chat.closing.replace("</s>", tokenizer.eos_token)
    check_answers(encoded, tokenizer, [answer + closing for answer in answers])
    check_images(encoded, tokenizer, messages)
    check_prompts(template, tokenizer, messages)


@pytest.mark.parametrize("kind", material.KINDS)
@EXAMPLES
@given(messages=conversations())
def test_special_tokens_come_from_the_template_alone(kind: str, messages: list[Message]) -> None:
    tokenizer = material.tokenizer_of(kind)
    special = {*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids("</s>")} - {tokenizer.unk_token_id}
    blank = [
        Message(role=m.role, parts=tuple(p if isinstance(p, ImagePart) else TextPart(text="x") for p in m.parts))
        for m in messages
    ]
    for template in TEMPLATES.values():
        ids = [encode(template, tokenizer, given_).input_ids for given_ in (messages, blank)]
        found = [[token for token in row if token in special] for row in ids]
        assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_words_like_special_tokens_are_merged_as_any_others(kind: str) -> None:
    """``<s`` is a piece of these vocabularies: the letters of ``<s>`` are not merely taken apart."""
    tokenizer = material.tokenizer_of(kind)
    encoded = encode(TEMPLATES["compact"], tokenizer, [message("user", "a<s>b"), message("assistant", "in<s>")])
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids).count("<s") == 2


@pytest.mark.parametrize("kind", material.KINDS)
@pytest.mark.parametrize("name", ["vicuna_v1", "phi3", "chatml"])
def test_truncation_keeps_images_whole_and_ends_no_answer_early(name: str, kind: str) -> None:
    tokenizer = material.tokenizer_of(kind)
    template = resolve_template(name, tokenizer)
    messages = [
        message("user", 0, "a", 1),
        message("assistant", "the red"),
        message("user", 2),
        message("assistant", "is"),
    ]
    full = encode(template, tokenizer, messages, num_image_tokens=[3, 1, 2])
    image, end = (tokenizer.convert_tokens_to_ids(t) for t in (IMAGE_TOKEN, template.answer_end))
    whole = 0
    for limit in range(1, len(full.input_ids) + 1):
        try:
            cut = encode(
                template, tokenizer, messages, num_image_tokens=[3, 1, 2], max_length=limit, origin="a: record 3"
            )
        except InputError as error:
            assert error.where == "a: record 3"
            continue
        whole += 1
        assert (cut.input_ids, cut.labels) == (full.input_ids[:limit], full.labels[:limit])
        assert cut.input_ids.count(image) == 6
        assert cut.labels.count(end) == full.labels[:limit].count(end)
    assert 0 < whole < len(full.input_ids)


def test_an_answer_that_the_tokenizer_changes_in_form_alone_is_accepted() -> None:
    """Qwen's normalises to NFC: é as one code point or as two is the same letter."""
    from tokenizers import normalizers

    tokenizer = material.byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    two, one = "caf\u0065\u0301", "caf\u00e9"
    encoded = [encode(TEMPLATES["compact"], tokenizer, [message("assistant", text)]) for text in (two, one)]
    assert encoded[0] == encoded[1]
    tokenizer = material.byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match="'A Red' becomes 'a red'"):
        encode(TEMPLATES["compact"], tokenizer, [message("assistant", "A Red")])


def test_tokens_added_later_are_seen() -> None:
    tokenizer = material.byte_level()
    before = encode(TEMPLATES["compact"], tokenizer, [message("assistant", "a <new> b")])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<new>"]}, replace_extra_special_tokens=False)
    assert encode(TEMPLATES["compact"], tokenizer, [message("assistant", "a <new> b")]) == before


def test_a_tokenizer_without_a_fast_backend_is_refused() -> None:
    class Slow:
        bos_token_id = None
        chat_template = None

        @property
        def added_tokens_decoder(self) -> dict[int, Any]:
            return {}

        def __len__(self) -> int:
            return 0

    with pytest.raises(InputError, match="Slow is written in Python"):
        encode_conversation(
            [message("assistant", "a")],
            template=TEMPLATES["plain"],
            tokenizer=Slow(),  # type: ignore[arg-type]
            image_token_id=0,
            num_image_tokens=1,
        )
