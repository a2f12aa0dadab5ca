"""The chat templates of published models, on tokenizers of every kind, against transformers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from symphony_vlm.data.chat_template import ChatTemplate
from symphony_vlm.data.conversation import EncodedConversation, encode_conversation
from symphony_vlm.data.templates import resolve_template
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

SYSTEM = message("system", "Be brief.")
CONVERSATION = [
    message("user", 0, "\nWhat is the red one?", 1),
    message("assistant", "A red star."),
    message("user", "And then?"),
    message("assistant", "Nothing, it is the end."),
]


def encode(tokenizer: Any, messages: Any, **settings: Any) -> EncodedConversation:
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    settings = {"template": resolve_template("tokenizer", tokenizer), "num_image_tokens": 1} | settings
    return encode_conversation(messages, tokenizer=tokenizer, image_token_id=image, **settings)


def conversation_for(name: str) -> list[Any]:
    return [SYSTEM, *CONVERSATION] if CHATS[name].system else CONVERSATION


def dicts_for(name: str, messages: Any) -> list[dict[str, Any]]:
    dicts: list[dict[str, Any]] = material.as_dicts(messages)
    if name == "llava":  # it takes nothing but parts, and puts image parts before all others
        return [{**d, "content": [{"type": "text", "text": d["content"]}]} for d in dicts]
    return dicts


def pieces(tokenizer: Any, ids: Any) -> list[str]:
    found: list[str] = tokenizer.convert_ids_to_tokens(list(ids))
    return found


@pytest.mark.parametrize("kind", material.KINDS)
@pytest.mark.parametrize("name", CHATS)
def test_ids_are_those_of_the_tokenizers_own_rendering(name: str, kind: str) -> None:
    tokenizer = material.chat_tokenizer(name, kind)
    # Qwen3 opens answers otherwise in a history; see the next test.
    messages = conversation_for(name)[:-2] if name == "qwen3" else conversation_for(name)
    own = tokenizer.apply_chat_template(dicts_for(name, messages), return_dict=True)["input_ids"]
    assert pieces(tokenizer, encode(tokenizer, messages).input_ids) == pieces(tokenizer, own)
    prompt = encode(tokenizer, messages[:-1], generation_prompt=True)
    own = tokenizer.apply_chat_template(
        dicts_for(name, messages[:-1]), return_dict=True, add_generation_prompt=True, enable_thinking=False
    )
    assert pieces(tokenizer, prompt.input_ids) == pieces(tokenizer, own["input_ids"])


def test_every_answer_of_qwen3_is_opened_as_in_use_without_thoughts() -> None:
    """Its template leaves the empty thoughts of earlier answers out, and would train these on another opening."""
    tokenizer = material.chat_tokenizer("qwen3", "byte_level")
    text = tokenizer.decode(encode(tokenizer, CONVERSATION).input_ids)
    opening = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert text == (
        f"<|im_start|>user\n<image>\nWhat is the red one?<image><|im_end|>\n{opening}A red star.<|im_end|>\n"
        f"<|im_start|>user\nAnd then?<|im_end|>\n{opening}Nothing, it is the end.<|im_end|>\n"
    )


@pytest.mark.parametrize("kind", material.KINDS)
@pytest.mark.parametrize("name", [name for name, chat in CHATS.items() if chat.marked[0]])
def test_labels_are_transformers_assistant_mask(name: str, kind: str) -> None:
    tokenizer = material.chat_tokenizer(name, kind)
    text = CHATS[name].text.replace(*CHATS[name].marked)
    assert text != CHATS[name].text
    encoded = encode(tokenizer, conversation_for(name))
    out = tokenizer.apply_chat_template(
        dicts_for(name, conversation_for(name)),
        chat_template=text,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert pieces(tokenizer, out["input_ids"]) == pieces(tokenizer, encoded.input_ids)
    assert out["assistant_masks"] == [int(label != material.IGNORED) for label in encoded.labels]


@pytest.mark.parametrize("kind", material.KINDS)
@pytest.mark.parametrize("name", CHATS)
def test_the_saved_text_renders_the_same_for_texts_and_for_parts(name: str, kind: str) -> None:
    """What a processor hands to ``apply_chat_template``: images come as parts, and become placeholders."""
    tokenizer = material.chat_tokenizer(name, kind)
    template = resolve_template("tokenizer", tokenizer)
    messages = conversation_for(name)[:-2] if name == "qwen3" else conversation_for(name)
    texts = [
        tokenizer.apply_chat_template(
            material.as_dicts(messages, parts=parts), chat_template=template.to_jinja(IMAGE_TOKEN), return_dict=True
        )["input_ids"]
        for parts in (False, True)
    ]
    assert texts[0] == texts[1] == encode(tokenizer, messages).input_ids
    assert ChatTemplate.read(template.text, tokenizer) == template


def test_images_stand_at_their_places_and_in_their_order() -> None:
    tokenizer = material.chat_tokenizer("gemma3", "byte_level")
    messages = [message("user", "Left ", 1, " or ", 0), message("assistant", "in"), message("user", 2), CONVERSATION[1]]
    encoded = encode(tokenizer, messages, num_image_tokens=[2, 1, 3])
    assert encoded.image_order == (1, 0, 2)
    image = "<image>"
    expected = f"user\nLeft {image} or {image * 2}<end_of_turn>\n<start_of_turn>model\nin<end_of_turn>\n"
    assert expected + f"<start_of_turn>user\n{image * 3}<end" in tokenizer.decode(encoded.input_ids)


def test_a_default_system_message_of_the_template_stays() -> None:
    tokenizer = material.chat_tokenizer("qwen2.5", "byte_level")
    text = tokenizer.decode(encode(tokenizer, CONVERSATION).input_ids)
    assert text.startswith(
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>"
    )


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        ("gemma2", [SYSTEM, *CONVERSATION], "refuses the conversation: System role not supported"),
        ("mistral_v0.1", [CONVERSATION[0], *CONVERSATION[2:]], "refuses the conversation: Conversation roles must"),
        ("mistral_v0.2", CONVERSATION[1:], "refuses the conversation: After the optional system message"),
        ("qwen3", [CONVERSATION[0], message("assistant", "<think>in</think>red")], "looks into the messages"),
        ("phi3.5", [message("system", ""), *CONVERSATION], "looks into the messages"),
        ("llama3", [], "the conversation has no message"),
    ],
)
def test_a_conversation_that_the_template_refuses_is_an_error_that_names_the_sample(
    name: str, messages: Any, reason: str
) -> None:
    with pytest.raises(InputError, match=reason) as error:
        encode(material.chat_tokenizer(name, "byte_level"), messages, origin="train.json: record 7")
    assert error.value.where == "train.json: record 7"


TURN = "{% for m in messages %}<|user|>{{ m.role + ': ' + m.content }}<|end|>{% endfor %}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ nothing.there }}", "it cannot be used: 'nothing' is undefined"),
        ("{% for m in messages", "it cannot be used"),
        ("{{ messages[0].content }}", "does not come out as it went in"),
        ("{{ messages[1].content + messages[0].content if messages[1] }}", "does not come out as it went in"),
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}",
            "no special token closes an answer",
        ),
        (TURN + "{% if add_generation_prompt %}<|user|>model: {% endif %}", "opens an answer with"),
    ],
)
def test_a_template_that_cannot_be_used_is_an_error_at_the_start(text: str, reason: str) -> None:
    tokenizer = material.byte_level()
    tokenizer.chat_template = text
    with pytest.raises(InputError, match=reason):
        resolve_template("tokenizer", tokenizer)


def test_an_answer_that_is_closed_otherwise_than_others_is_refused() -> None:
    tokenizer = material.byte_level()
    tokenizer.chat_template = TURN.replace("<|end|>", "{{ '<|end|>' if loop.index < 4 else '</s>' }}")
    encode(tokenizer, CONVERSATION[:2])
    with pytest.raises(InputError, match="closes an answer with '</s>' instead of '<|end|>'"):
        encode(tokenizer, CONVERSATION)


def test_a_message_that_a_template_leaves_out_or_repeats_is_refused() -> None:
    tokenizer = material.byte_level()
    for text, count in (
        ("{% if m.role != 'system' %}{{ m.content }}{% endif %}", 0),
        ("{{ m.content + m.content }}", 2),
    ):
        tokenizer.chat_template = TURN.replace(
            "{{ m.role + ': ' + m.content }}",
            "{{ m.role }}:{% if m.role == 'system' %}" + text + "{% else %}{{ m.content }}{% endif %}",
        )
        with pytest.raises(InputError, match=rf"writes message 1 \(system\) {count} times"):
            encode(tokenizer, [SYSTEM, *CONVERSATION])


def test_texts_may_contain_private_marks() -> None:
    tokenizer = material.chat_tokenizer("smollm2", "byte_level")
    words = "\uf8f00m0\uf8f1 \uf8f01i0\uf8f1 \uf8f0"
    encoded = encode(tokenizer, [message("user", words, 0, words), message("assistant", words)])
    assert tokenizer.decode(encoded.input_ids).count(words) == 3
    assert encoded.image_order == (0,)


def test_one_of_several_templates_is_the_default() -> None:
    tokenizer = material.byte_level()
    tokenizer.chat_template = {"default": CHATS["smollm2"].text, "tool_use": "{{ none }}"}
    assert resolve_template("auto", tokenizer) == resolve_template(
        "auto", material.chat_tokenizer("smollm2", "byte_level")
    )
    tokenizer.chat_template = {"rag": "", "tool_use": ""}
    with pytest.raises(InputError, match="the tokenizer's chat template: "):
        resolve_template("auto", tokenizer)
