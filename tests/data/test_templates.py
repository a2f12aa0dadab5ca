"""The built-in templates: layouts written out by hand, the same as a chat template, and tokenizers that do not fit."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from symphony_vlm.data.chat_template import ChatTemplate
from symphony_vlm.data.conversation import EncodedConversation, encode_conversation
from symphony_vlm.data.templates import TEMPLATES, check_template_name, get_template, resolve_template
from symphony_vlm.data.tokenizer import IMAGE_TOKEN, train_tokenizer
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

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAVA_LLAMA3 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
DEFAULT_SYSTEMS = {
    "chatml": "You are a helpful assistant.",
    "phi35": "You are a helpful assistant.",
    "vicuna_v1": VICUNA,
    "llama3": LLAVA_LLAMA3,
    "mistral_system": VICUNA,
}
CONVERSATION = [
    message("system", "Be"),
    message("user", 0, "\nA red?"),
    message("assistant", "A red"),
    message("user", "the"),
    message("assistant", "is"),
]


def encode(template: Any, tokenizer: Any, messages: Any, **settings: Any) -> EncodedConversation:
    settings = {"num_image_tokens": 1} | settings
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return encode_conversation(messages, template=template, tokenizer=tokenizer, image_token_id=image, **settings)


LAYOUTS = {
    ("compact", "byte_level"): """
        <s> B e <|user|> <image> <image> Ċ A Ġred ? <|assistant|> [[ A Ġred <|end|> ]]
        <|user|> t h e <|assistant|> [[ i s <|end|> ]]""",
    ("chatml", "byte_level"): """
        <|im_start|> s y s t e m Ċ B e <|im_end|> Ċ
        <|im_start|> u s er Ċ <image> <image> Ċ A Ġred ? <|im_end|> Ċ
        <|im_start|> a s s i s t a n t Ċ [[ A Ġred <|im_end|> ]] Ċ
        <|im_start|> u s er Ċ t h e <|im_end|> Ċ
        <|im_start|> a s s i s t a n t Ċ [[ i s <|im_end|> ]] Ċ""",
    ("vicuna_v1", "byte_level"): """
        <s> B e Ġ U S E R : Ġ <image> <image> Ċ A Ġred ? ĠA S S I S T A N T : [[ ĠA Ġred </s> ]]
        U S E R : Ġthe ĠA S S I S T A N T : [[ Ġis </s> ]]""",
    # LLaVA's own: sentencepiece puts a space before the text, and here none behind </s>.
    ("vicuna_v1", "llama"): """
        <s> ▁ B e ▁ U S E R : ▁ <image> <image> <0x0A> A ▁red ? ▁A S S I S T A N T : [[ ▁A ▁red </s> ]]
        U S E R : ▁the ▁A S S I S T A N T : [[ ▁is </s> ]]""",
    ("phi3", "byte_level"): """
        <s> <|system|> Ċ B e <|end|> Ċ <|user|> Ċ <image> <image> Ċ A Ġred ? <|end|> Ċ
        <|assistant|> Ċ [[ A Ġred <|end|> ]] Ċ <|user|> Ċ t h e <|end|> Ċ <|assistant|> Ċ [[ i s <|end|> ]] Ċ""",
    # Its own tokenizer swallows the line feeds behind special tokens and puts spaces there.
    ("phi3", "phi3"): """
        <s> <|system|> ▁ B e <|end|> <|user|> <image> <image> ▁ <0x0A> A ▁red ? <|end|>
        <|assistant|> [[ ▁A ▁red <|end|> ]] <|user|> ▁the <|end|> <|assistant|> [[ ▁is <|end|> ]]""",
    ("llama3", "byte_level"): """
        <s> <|start_header_id|> s y s t e m <|end_header_id|> Ċ Ċ B e <|eot_id|>
        <|start_header_id|> u s er <|end_header_id|> Ċ Ċ <image> <image> Ċ A Ġred ? <|eot_id|>
        <|start_header_id|> a s s i s t a n t <|end_header_id|> Ċ Ċ [[ A Ġred <|eot_id|> ]]
        <|start_header_id|> u s er <|end_header_id|> Ċ Ċ t h e <|eot_id|>
        <|start_header_id|> a s s i s t a n t <|end_header_id|> Ċ Ċ [[ i s <|eot_id|> ]]""",
    ("mistral", "byte_level"): """
        <s> [ I N S T ] Ġ < < S Y S > > Ċ B e Ċ < < / S Y S > > Ċ Ċ <image> <image> Ċ A Ġred ? Ġ [ / I N S T ]
        [[ ĠA Ġred </s> ]] [ I N S T ] Ġthe Ġ [ / I N S T ] [[ Ġis </s> ]]""",
    ("mistral", "llama"): """
        <s> ▁ [ I N S T ] ▁ < < S Y S > > <0x0A> B e <0x0A> < < / S Y S > > <0x0A> <0x0A>
        <image> <image> <0x0A> A ▁red ? ▁ [ / I N S T ]
        [[ ▁A ▁red </s> ]] [ I N S T ] ▁the ▁ [ / I N S T ] [[ ▁is </s> ]]""",
}


@pytest.mark.parametrize(("name", "kind"), LAYOUTS)
def test_the_layout_is_the_one_written_out(name: str, kind: str) -> None:
    tokenizer = material.tokenizer_of(kind)
    ids, labels = material.ids_and_labels(tokenizer, LAYOUTS[name, kind])
    encoded = encode(get_template(name), tokenizer, CONVERSATION, num_image_tokens=2)
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids) == tokenizer.convert_ids_to_tokens(ids)
    assert encoded.labels == labels
    # In use the model sees the same up to the last answer, and no token of it.
    prompt = encode(get_template(name), tokenizer, CONVERSATION[:-1], num_image_tokens=2, generation_prompt=True)
    before, _ = material.ids_and_labels(tokenizer, LAYOUTS[name, kind].rpartition("[[")[0])
    assert prompt.input_ids == before


def test_plain_is_image_caption_and_a_supervised_line_feed() -> None:
    tokenizer = material.tokenizer_of("byte_level")
    ids, labels = material.ids_and_labels(tokenizer, "<s> <image> <image> [[ A Ġred Ċ ]]")
    encoded = encode(get_template("plain"), tokenizer, CONVERSATION[1:3], num_image_tokens=2)
    assert (encoded.input_ids, encoded.labels) == (ids, labels)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_missing_system_message_is_the_templates_sentence(name: str) -> None:
    tokenizer = material.tokenizer_of("byte_level")
    default = DEFAULT_SYSTEMS.get(name)
    explicit = [] if default is None else [message("system", default)]
    asked = [message("user", "the"), message("assistant", "is")]
    encoded = encode(get_template(name), tokenizer, asked)
    assert encoded == encode(get_template(name), tokenizer, [*explicit, *asked])
    assert ("assistant" in tokenizer.decode(encoded.input_ids).partition("the")[0]) == (default is not None)


def test_the_variants_differ_in_their_system_message_alone() -> None:
    tokenizer = material.tokenizer_of("byte_level")
    for name, variant in (("phi3", "phi35"), ("mistral", "mistral_system")):
        same = [encode(get_template(t), tokenizer, CONVERSATION) for t in (name, variant)]
        assert same[0] == same[1]
        without = [encode(get_template(t), tokenizer, CONVERSATION[1:]) for t in (name, variant)]
        assert without[0] != without[1]


ORDINARY = {
    "one turn": [message("user", "What is the red one?"), message("assistant", "A red star.")],
    "image": [message("user", 0, "\nWhat is it?"), message("assistant", "Red, I think.")],
    "two turns": [
        message("user", 0, "\nFirst?", 1),
        message("assistant", "Yes."),
        message("user", "And then?"),
        message("assistant", "No, 2 of them in the end."),
    ],
    "system": [message("system", "Be short."), message("user", "Why?"), message("assistant", "So.")],
}


@pytest.mark.parametrize("conversation", ORDINARY.values(), ids=ORDINARY)
@pytest.mark.parametrize("kind", material.KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_transformers_gives_the_same_ids_and_mask(name: str, kind: str, conversation: Any) -> None:
    """Its tokenizer reads the whole text at once and finds the answers by their offsets."""
    tokenizer = material.tokenizer_of(kind)
    template = get_template(name)
    if kind == "llama":
        # It puts no space behind a BOS that is written out; LLaVA's BOS is not, and there is a space.
        template = dataclasses.replace(template, bos=False)
    if name == "plain":
        conversation = conversation[-2:] if conversation[0].role == "system" else conversation[:2]
    dicts = material.as_dicts(conversation, parts=name == "plain")
    encoded = encode(template, tokenizer, conversation)
    out = tokenizer.apply_chat_template(
        dicts, chat_template=template.to_jinja(IMAGE_TOKEN), return_dict=True, return_assistant_tokens_mask=True
    )
    assert tokenizer.convert_ids_to_tokens(out["input_ids"]) == tokenizer.convert_ids_to_tokens(encoded.input_ids)
    assert out["assistant_masks"] == [int(label != material.IGNORED) for label in encoded.labels]
    prompt = tokenizer.apply_chat_template(
        dicts[:-1], chat_template=template.to_jinja(IMAGE_TOKEN), return_dict=True, add_generation_prompt=True
    )
    assert prompt["input_ids"] == encode(template, tokenizer, conversation[:-1], generation_prompt=True).input_ids


def test_a_system_message_that_belongs_into_a_question_needs_one() -> None:
    tokenizer = material.tokenizer_of("llama")
    with pytest.raises(InputError, match="'mistral_system' puts the system message into a question") as error:
        encode(get_template("mistral_system"), tokenizer, [message("assistant", "So.")], origin="a.json: record 1")
    assert error.value.where == "a.json: record 1"


@pytest.mark.parametrize("name", ["chatml", "llama3", "phi3", "compact"])
def test_a_tokenizer_without_the_markers_is_an_error_that_names_what_fits(name: str) -> None:
    tokenizer = train_tokenizer(["some text"], vocab_size=300, end_token="<|endoftext|>")
    template = get_template(name)
    for call in (lambda: resolve_template(name, tokenizer), lambda: encode(template, tokenizer, CONVERSATION)):
        with pytest.raises(InputError) as error:
            call()
        assert all(marker in error.value.problem for marker in template.special_tokens)
        assert error.value.remedy == "Templates that fit this tokenizer: plain, vicuna_v1, mistral, mistral_system."
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(InputError, match="fit this tokenizer: tokenizer, plain, vicuna_v1"):
        resolve_template(name, tokenizer)


def test_where_there_is_no_end_token_of_llama_the_tokenizers_eos_closes_answers() -> None:
    tokenizer = train_tokenizer(["some text"], vocab_size=300, end_token="<|endoftext|>")
    template = resolve_template("vicuna_v1", tokenizer)
    assert template.stop_token == "<|endoftext|>"
    encoded = encode(template, tokenizer, CONVERSATION)
    assert [label for label in encoded.labels if label == tokenizer.eos_token_id] == [tokenizer.eos_token_id] * 2
    assert resolve_template("vicuna_v1", material.tokenizer_of("byte_level")) is get_template("vicuna_v1")


def test_a_trained_tokenizer_holds_the_markers_of_its_template() -> None:
    for template in TEMPLATES.values():
        end = template.stop_token or "<|end|>"
        tokenizer = train_tokenizer(["a b"], vocab_size=300, special_tokens=template.special_tokens, end_token=end)
        assert resolve_template(template.name, tokenizer) == template
        assert template.stop_token in (None, tokenizer.eos_token)


def test_auto_is_the_tokenizers_own_where_there_is_one() -> None:
    plain, own = material.tokenizer_of("byte_level"), material.chat_tokenizer("smollm2", "byte_level")
    assert resolve_template("auto", plain) is get_template("vicuna_v1")
    assert isinstance(resolve_template("auto", own), ChatTemplate)
    with pytest.raises(InputError, match="has no chat template"):
        resolve_template("tokenizer", plain)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'compact'"):
        get_template("compct")
    with pytest.raises(InputError, match="did you mean 'tokenizer'"):
        check_template_name("tokeniser")
    with pytest.raises(InputError, match="did you mean 'phi35'"):
        resolve_template("phi3.5", material.tokenizer_of("byte_level"))
