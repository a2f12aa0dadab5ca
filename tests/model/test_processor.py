"""The processor and the conversation encoder: one and the same ids by every way, labels that are the answers."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from symphony_vlm.data.conversation import IGNORE_INDEX, EncodedConversation
from symphony_vlm.data.sample import ImagePart, Message, TextPart
from symphony_vlm.data.templates import TEMPLATES
from symphony_vlm.data.tokenizer import IMAGE_TOKEN, train_tokenizer
from symphony_vlm.errors import InputError
from symphony_vlm.model.image_processor import SymphonyImageProcessor
from symphony_vlm.model.processor import SymphonyVLMProcessor

NUM_IMAGE_TOKENS = 3
TEXTS = ["What color is the circle? A red star.", "USER: ASSISTANT: system user assistant", "yes no 0123456789"] * 5


@functools.cache
def byte_level_tokenizer(template: str, *, bos: bool = False) -> PreTrainedTokenizerFast:
    end = TEMPLATES[template].answer_end
    tokenizer = train_tokenizer(
        TEXTS,
        vocab_size=400,
        special_tokens=TEMPLATES[template].special_tokens,
        end_token=end if end.strip() else "<|end|>",
    )
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
    return tokenizer


@functools.cache
def sentencepiece_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Like Llama 2's: spaces are U+2581 in front of words, and one is added before whatever is tokenised."""
    special = list(dict.fromkeys([IMAGE_TOKEN, *TEMPLATES[template].special_tokens]))
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    alphabet = sorted(set("".join(TEXTS)) | set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,?!'|</>_\n"))
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>", *special],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens=special,
        clean_up_tokenization_spaces=False,
    )


def processor_of(template: str, tokenizer: PreTrainedTokenizerFast | None = None) -> SymphonyVLMProcessor:
    tokenizer = tokenizer or byte_level_tokenizer(template)
    return SymphonyVLMProcessor(SymphonyImageProcessor(image_size=8), tokenizer, NUM_IMAGE_TOKENS, template=template)


def message(role: Any, *parts: str | int) -> Message:
    return Message(
        role=role, parts=tuple(ImagePart(index=p) if isinstance(p, int) else TextPart(text=p) for p in parts)
    )


def as_dicts(messages: Sequence[Message], *, images: bool = False) -> list[dict[str, Any]]:
    """The same conversation in the form of `apply_chat_template`."""

    def part_of(part: ImagePart | TextPart) -> dict[str, Any]:
        if isinstance(part, TextPart):
            return {"type": "text", "text": part.text}
        return {"type": "image"} | ({"image": Image.new("RGB", (8, 8))} if images else {})

    return [{"role": m.role, "content": [part_of(part) for part in m.parts]} for m in messages]


def supervised(encoded: EncodedConversation) -> list[int]:
    assert len(encoded.input_ids) == len(encoded.labels)
    kept = [(i, label) for i, label in enumerate(encoded.labels) if label != IGNORE_INDEX]
    assert all(encoded.input_ids[i] == label for i, label in kept)
    return [label for _, label in kept]


ONE_TURN = [message("user", "What color is it?"), message("assistant", "A red star.")]
WITH_IMAGE = [message("user", 0, "\nWhat color is it?"), message("assistant", "Red, I think.")]
TWO_TURNS = [
    message("user", 0, "\nFirst?", 1),
    message("assistant", "Yes."),
    message("user", "And then?"),
    message("assistant", "No, 2 of them."),
]
WITH_SYSTEM = [message("system", "Be short."), *ONE_TURN]
CONVERSATIONS = {"one turn": ONE_TURN, "image": WITH_IMAGE, "two turns": TWO_TURNS, "system": WITH_SYSTEM}


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_chat_template_gives_the_ids_of_encode(template: str, conversation: list[Message], bos: bool) -> None:
    processor = processor_of(template, byte_level_tokenizer(template, bos=bos))
    dicts = as_dicts(conversation, images=True)
    out = processor.apply_chat_template(dicts, tokenize=True, return_dict=True, return_tensors="pt")
    encoded = processor.encode(conversation)
    assert out["input_ids"].tolist() == [encoded.input_ids]
    assert out.get("pixel_values") is None or len(out["pixel_values"]) == len(encoded.image_order)


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "plain"])
def test_a_prompt_is_the_beginning_of_the_training_sequence(template: str, conversation: list[Message]) -> None:
    """What the model continues in use must be what it saw in training, to the token."""
    processor = processor_of(template)
    prompt = processor.encode(conversation[:-1], generation_prompt=True).input_ids
    encoded = processor.encode(conversation)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels[len(prompt)] != IGNORE_INDEX
    rendered = processor.apply_chat_template(
        as_dicts(conversation[:-1], images=True), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert rendered["input_ids"].tolist() == [prompt]


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_assistant_mask_of_the_chat_template_is_that_of_the_labels(
    template: str, conversation: list[Message]
) -> None:
    processor = processor_of(template)
    out = processor.apply_chat_template(
        as_dicts(conversation, images=True), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    labels = processor.encode(conversation).labels
    mask = out["assistant_masks"][0]
    mask = mask if isinstance(mask, list) else mask.tolist()
    assert mask == [int(label != IGNORE_INDEX) for label in labels]


@pytest.mark.parametrize("make_tokenizer", [byte_level_tokenizer, sentencepiece_tokenizer])
@pytest.mark.parametrize(
    ("template", "conversation"),
    [
        pytest.param(template, conversation, id=f"{template}-{name}")
        for template in TEMPLATES
        for name, conversation in CONVERSATIONS.items()
        # Captions have one turn; without a marker between them two answers could not be told apart.
        if (template, name) != ("plain", "two turns")
    ],
)
def test_the_supervised_ids_decode_to_the_answers_and_their_ends(
    template: str, conversation: list[Message], make_tokenizer: Any
) -> None:
    processor = processor_of(template, make_tokenizer(template))
    encoded = processor.encode(conversation)
    runs: list[list[int]] = [[]]
    for label in encoded.labels:
        if label != IGNORE_INDEX:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    texts = [processor.tokenizer.decode(run).strip(" ") for run in runs if run]
    end = TEMPLATES[template].answer_end
    expected = [m.text + end for m in conversation if m.role == "assistant"]
    assert texts == expected


def test_a_sentencepiece_tokenizer_gets_single_spaces_between_words() -> None:
    """Llama's tokenizer adds a space to every piece it is given; pieces that bring their own would have two."""
    processor = processor_of("vicuna_v1", sentencepiece_tokenizer("vicuna_v1"))
    ids = processor.encode(WITH_SYSTEM).input_ids
    pieces = "".join(processor.tokenizer.convert_ids_to_tokens(ids))
    assert pieces == "<s>▁Be▁short.▁USER:▁What▁color▁is▁it?▁ASSISTANT:▁A▁red▁star.</s>"
    whole = processor.tokenizer.encode(
        "Be short. USER: What color is it? ASSISTANT: A red star.", add_special_tokens=False
    )
    assert ids == [processor.tokenizer.bos_token_id, *whole, processor.tokenizer.eos_token_id]


@pytest.mark.parametrize("make_tokenizer", [byte_level_tokenizer, sentencepiece_tokenizer])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "words", [IMAGE_TOKEN, "<|end|>", "</s>", "<|im_end|>", "<|im_start|>system\n", "<|user|>", "<s>", "<|pad|>"]
)
def test_words_that_look_like_markers_stay_text(template: str, words: str, make_tokenizer: Any) -> None:
    processor = processor_of(template, make_tokenizer(template))
    special = set(processor.tokenizer.all_special_ids)
    harmless = processor.encode([message("user", "Why?"), message("assistant", "So.")])
    quoted = processor.encode([message("user", f"Why {words}?"), message("assistant", f"So {words} it is.")])

    def specials(encoded: EncodedConversation) -> list[int]:
        return [token for token in encoded.input_ids if token in special]

    assert specials(quoted) == specials(harmless)
    text = processor.tokenizer.decode(supervised(quoted))
    assert text.strip(" ") == f"So {words} it is." + TEMPLATES[template].answer_end


@pytest.mark.parametrize("template", TEMPLATES)
def test_images_stand_where_they_were_put_and_in_their_order(template: str) -> None:
    processor = processor_of(template)
    encoded = processor.encode(
        [message("user", "Left ", 1, " or ", 0), message("assistant", "Left."), message("user", 2), ONE_TURN[1]]
    )
    assert encoded.image_order == (1, 0, 2)
    assert encoded.input_ids.count(processor.image_token_id) == 3 * NUM_IMAGE_TOKENS


def test_the_plain_template_keeps_images_and_drops_the_question() -> None:
    processor = processor_of("plain")
    encoded = processor.encode(WITH_IMAGE)
    assert processor.tokenizer.decode(encoded.input_ids) == IMAGE_TOKEN * NUM_IMAGE_TOKENS + "Red, I think.\n"


@pytest.mark.parametrize("template", TEMPLATES)
def test_truncation_cuts_text_or_refuses_but_never_cuts_an_image(template: str) -> None:
    processor = processor_of(template)
    conversation = [message("user", 0, " a b ", 1), ONE_TURN[1], message("user", "x", 2), ONE_TURN[1]]
    full = processor.encode(conversation)
    image = processor.image_token_id
    outcomes = set()
    for limit in range(1, len(full.input_ids) + 1):
        try:
            cut = processor.encode(conversation, max_length=limit, origin="a.json: record 3")
        except InputError as error:
            assert error.where == "a.json: record 3"
            outcomes.add("image" if "cut an image" in error.problem else "nothing supervised")
            continue
        outcomes.add("cut")
        assert cut.input_ids == full.input_ids[:limit] and cut.labels == full.labels[:limit]
        assert cut.input_ids.count(image) == NUM_IMAGE_TOKENS * len(cut.image_order) == 3 * NUM_IMAGE_TOKENS
        assert supervised(cut)
    assert {"cut", "image"} <= outcomes


def test_a_record_without_a_supervised_token_is_an_error_that_names_it() -> None:
    processor = processor_of("compact")
    with pytest.raises(InputError, match="no supervised token") as error:
        processor.encode([message("user", "What?")], origin="train.json: record 12")
    assert error.value.where == "train.json: record 12"
    with pytest.raises(InputError, match=r"no supervised token among \d+ \(limit 4\)"):
        processor.encode(ONE_TURN, max_length=4)


def test_an_answer_that_the_tokenizer_cannot_represent_is_an_error_that_shows_both_texts() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "red": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")
    processor = processor_of("plain", fast)
    with pytest.raises(InputError, match=r"'blue.*' becomes '<unk>'") as error:
        processor.encode([message("assistant", "blue")], origin="a.json: record 1")
    assert error.value.where == "a.json: record 1"


def test_prompts_are_padded_on_the_left_with_positions_that_count_real_tokens() -> None:
    processor = processor_of("compact")
    conversations = [ONE_TURN[:1], WITH_IMAGE[:1]]
    rows = [processor.encode(c, generation_prompt=True).input_ids for c in conversations]
    batch = processor.encode_prompts(conversations)
    longest = max(map(len, rows))
    for i, row in enumerate(rows):
        missing = longest - len(row)
        assert batch["input_ids"][i].tolist() == [processor.tokenizer.pad_token_id] * missing + row
        assert batch["attention_mask"][i].tolist() == [0] * missing + [1] * len(row)
        assert batch["position_ids"][i].tolist() == [0] * missing + list(range(len(row)))


def test_a_batch_of_chats_with_and_without_images_is_padded_on_the_left() -> None:
    processor = processor_of("compact")
    chats = [as_dicts(TWO_TURNS[:1], images=True), as_dicts(ONE_TURN[:1])]
    out = processor.apply_chat_template(chats, tokenize=True, return_dict=True, add_generation_prompt=True)
    ours = processor.encode_prompts([TWO_TURNS[:1], ONE_TURN[:1]])
    assert out["input_ids"].tolist() == ours["input_ids"].tolist()
    assert out["attention_mask"].tolist() == ours["attention_mask"].tolist()
    assert out["pixel_values"].shape == (2, 3, 8, 8)


def test_images_come_as_files_too(tmp_path: Any) -> None:
    processor = processor_of("compact")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    by_file = processor(images=str(tmp_path / "a.png"), text="<image>x")["pixel_values"]
    by_pillow = processor(images=[Image.new("RGB", (8, 8), "red")], text=["<image>x"])["pixel_values"]
    assert by_file.equal(by_pillow)


@pytest.mark.parametrize(("text", "count"), [("<image><image>", 1), ("no mark", 1), ("<image>", 0)])
def test_marks_and_images_that_differ_in_number_are_an_error_with_both_counts(text: str, count: int) -> None:
    processor = processor_of("compact")
    with pytest.raises(InputError, match=rf"{text.count(IMAGE_TOKEN)} <image> marks .* {count} images"):
        processor(images=[Image.new("RGB", (8, 8))] * count, text=text)


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_are_decoded_up_to_their_end(template: str) -> None:
    processor = processor_of(template)
    end = TEMPLATES[template].answer_end
    ids = processor.tokenizer.encode(f" A red star.{end}", add_special_tokens=False)
    rows = [ids, [*ids[:-1], processor.tokenizer.pad_token_id]]
    assert processor.decode_answers(torch.tensor(rows)) == ["A red star."] * 2


def test_an_unknown_template_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'compact'"):
        processor_of("compact").encode(ONE_TURN, template="compct")


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """With a chat template of its own, written for text alone, whose answers do not end in the EOS token."""
    tokenizer = train_tokenizer(
        TEXTS, vocab_size=400, special_tokens=["<|im_start|>", "<|im_end|>"], end_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def test_auto_is_decided_when_the_processor_is_made_and_saved_as_decided(tmp_path: Any) -> None:
    assert processor_of("auto", byte_level_tokenizer("vicuna_v1")).template == "vicuna_v1"
    processor = processor_of("auto", chat_tokenizer())
    assert processor.template == "tokenizer"
    encoded = processor.encode(TWO_TURNS)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["template"] == "tokenizer"
    # Whatever a newer version of the tokenizer's files says, the model goes on as it was trained.
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": CHATML.replace("user", "you")}))
    loaded = SymphonyVLMProcessor.from_pretrained(tmp_path)
    assert (loaded.template, loaded.chat_template) == ("tokenizer", processor.chat_template)
    assert loaded.encode(TWO_TURNS) == encoded
    assert loaded.stop_token_ids == processor.stop_token_ids


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_the_tokenizers_template_gives_the_same_ids_by_every_way(conversation: list[Message]) -> None:
    processor = processor_of("tokenizer", chat_tokenizer())
    out = processor.apply_chat_template(
        as_dicts(conversation, images=True), tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert out["input_ids"].tolist() == [processor.encode(conversation).input_ids]
    out = processor.apply_chat_template(
        as_dicts(conversation[:-1], images=True), tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert out["input_ids"].tolist() == processor.encode_prompts([conversation[:-1]])["input_ids"].tolist()


def test_generation_stops_at_the_answers_end_and_at_the_tokenizers_eos() -> None:
    processor = processor_of("tokenizer", chat_tokenizer())
    end, eos = (processor.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    assert processor.stop_token_ids == [end, eos]
    red = processor.tokenizer.encode(" red")
    rows = [[*red, end, *red], [*red, eos, *red], [*red, *red, *red]]
    assert processor.decode_answers(torch.tensor([(row + [eos] * 99)[:8] for row in rows])) == [
        "red",
        "red",
        "red red red",
    ]
    compact = processor_of("compact")
    assert compact.stop_token_ids == [compact.tokenizer.eos_token_id]
    assert processor_of("plain").answer_end == "\n"
    assert processor_of("plain").stop_token_ids == [processor_of("plain").tokenizer.eos_token_id]


def test_another_template_can_be_named_for_one_stage() -> None:
    processor = processor_of("tokenizer", chat_tokenizer())
    assert processor.encode(WITH_IMAGE, template="plain") == processor_of("plain", chat_tokenizer()).encode(WITH_IMAGE)
    with pytest.raises(InputError, match=r"'compact' needs <\|user\|>, <\|assistant\|>, <\|end\|> as single tokens"):
        processor.encode(WITH_IMAGE, template="compact")
