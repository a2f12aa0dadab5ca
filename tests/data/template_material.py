"""Tokenizers of every kind, built by hand, and the chat templates of published models, for the tests of templates.

The templates are those of the models' ``tokenizer_config.json``; branches for tools, which no conversation here enters,
are left out.
"""

# Published text is easier to compare in its own lines.
# ruff: noqa: E501

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from symphony_vlm.data.sample import ImagePart, Message, TextPart
from symphony_vlm.data.tokenizer import IMAGE_TOKEN

MARKERS = [
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]
WORDS = ["▁the", "▁red", "▁is", "▁What", "▁A", "in", "er", "▁a", "<s"]
ASCII = [chr(code) for code in range(33, 127)] + ["▁"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _merges() -> list[tuple[str, str]]:
    return [(word[:n], word[n]) for word in WORDS for n in range(1, len(word))]


def _special(backend: Tokenizer, tokens: Sequence[str], *, rstrip: bool = False) -> None:
    backend.add_special_tokens([AddedToken(token, rstrip=rstrip, normalized=False) for token in tokens])


def _finish(backend: Tokenizer, *, bos: str | None, eos: str, **settings: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False, **settings
    )


def byte_level(bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen: bytes, and merges of letters that a space may begin."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ" if a == "▁" else a.replace("▁", "Ġ"), b) for a, b in _merges()]
    pieces = dict.fromkeys([*alphabet, *(a + b for a, b in merges)])
    vocab = {piece: n for n, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    _special(backend, ["<|pad|>", "<s>", "</s>", IMAGE_TOKEN, *MARKERS])
    return _finish(backend, bos=bos, eos="</s>", pad_token="<|pad|>")


def _sentencepiece_model() -> models.BPE:
    pieces = ["<unk>", "<s>", "</s>", *BYTES, *ASCII, *(a + b for a, b in _merges())]
    vocab = {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}
    return models.BPE(vocab, _merges(), unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def llama() -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral today: a space before the text, none behind a special token."""
    backend = Tokenizer(_sentencepiece_model())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _special(backend, ["<unk>", "<s>", "</s>", IMAGE_TOKEN, *MARKERS])
    return _finish(backend, bos="<s>", eos="</s>", unk_token="<unk>", pad_token="<unk>")


def phi3() -> PreTrainedTokenizerFast:
    """As Phi-3: a space before the text and behind special tokens, which swallow the white space that follows them.

    ``</s>`` is an added token there but no special one.
    """
    backend = Tokenizer(_sentencepiece_model())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _special(backend, ["<unk>", "<s>"])
    backend.add_tokens([AddedToken("</s>", rstrip=True, normalized=False, special=False)])
    _special(backend, ["<|endoftext|>", *MARKERS], rstrip=True)
    _special(backend, [IMAGE_TOKEN])
    return _finish(backend, bos="<s>", eos="<|endoftext|>", unk_token="<unk>", pad_token="<|endoftext|>")


def unigram() -> PreTrainedTokenizerFast:
    """As sentencepiece's unigrams: special tokens are pieces of the vocabulary too, and those that score best."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((piece, -9.0) for piece in (*BYTES, *ASCII))]
    pieces += [(word, -3.0 - n / 8) for n, word in enumerate(WORDS)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    _special(backend, ["<unk>", "<s>", "</s>", IMAGE_TOKEN, *MARKERS])
    return _finish(backend, bos="<s>", eos="</s>", unk_token="<unk>", pad_token="<unk>")


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": byte_level,
    "llama": llama,
    "phi3": phi3,
    "unigram": unigram,
}


@functools.cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """One tokenizer of each kind, without a chat template."""
    return KINDS[kind]()


@functools.cache
def chat_tokenizer(name: str, kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the chat template of a published model."""
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = CHATS[name].text
    return tokenizer


IGNORED = -100


def ids_and_labels(tokenizer: PreTrainedTokenizerFast, pieces: str) -> tuple[list[int], list[int]]:
    """Ids and labels of pieces written with blanks between them, what is supervised in ``[[ ]]``."""
    vocab, ids, labels, supervised = tokenizer.get_vocab(), [], [], False
    for piece in pieces.split():
        if piece in ("[[", "]]"):
            supervised = piece == "[["
            continue
        ids.append(vocab[piece])
        labels.append(vocab[piece] if supervised else IGNORED)
    return ids, labels


def message(role: Any, *parts: str | int) -> Message:
    """A turn of texts and images (their numbers)."""
    return Message(
        role=role, parts=tuple(ImagePart(index=p) if isinstance(p, int) else TextPart(text=p) for p in parts)
    )


def as_dicts(messages: Sequence[Message], *, parts: bool = False) -> list[dict[str, Any]]:
    """The form of ``apply_chat_template``: contents as texts with placeholders for images, or as lists of parts."""

    def part_of(part: ImagePart | TextPart) -> dict[str, str]:
        return {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}

    texts = ["".join(IMAGE_TOKEN if isinstance(p, ImagePart) else p.text for p in m.parts) for m in messages]
    return [
        {"role": m.role, "content": [part_of(part) for part in m.parts] if parts else text}
        for m, text in zip(messages, texts, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A published chat template."""

    text: str
    closing: str
    """Ends an answer; ``</s>`` stands for the tokenizer's EOS."""
    marked: tuple[str, str] = ("", "")
    """What of the text to replace by what, to mark what is generated."""
    trims: Callable[[str], str] = str
    system: bool = True
    alternates: bool = False


_CHATML = "'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
_MARK = "{% if message['role'] == 'assistant' %}{% generation %}ANSWER{% endgeneration %}{% else %}ANSWER{% endif %}"


def _marked(before: str, answer: str, after: str) -> str:
    return f"{before}{_MARK.replace('ANSWER', answer)}{after}"


CHATS = {
    "llama3": Chat(
        text=(
            "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' "
            "+ message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 "
            "== 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if "
            "add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
        ),
        closing="<|eot_id|>",
        marked=(
            "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | "
            "trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
            "{{ content }}",
            _marked(
                "{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}"
                "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}",
                "{{ message['content'] | trim + '<|eot_id|>' }}",
                "",
            ),
        ),
        trims=str.strip,
    ),
    "qwen2.5": Chat(
        text=(
            "{%- if messages[0]['role'] == 'system' %}\n    {{- '<|im_start|>system\\n' + messages[0]['content'] + "
            "'<|im_end|>\\n' }}\n{%- else %}\n    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You "
            "are a helpful assistant.<|im_end|>\\n' }}\n{%- endif %}\n{%- for message in messages %}\n    {%- if "
            '(message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" '
            "and not message.tool_calls) %}\n        {{- '<|im_start|>' + message.role + '\\n' + message.content + "
            "'<|im_end|>' + '\\n' }}\n    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- "
            "'<|im_start|>assistant\\n' }}\n{%- endif %}\n"
        ),
        closing="<|im_end|>",
        marked=(
            "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}",
            _marked(
                "{{- '<|im_start|>' + message.role + '\\n' }}", "{{- message.content + '<|im_end|>' }}", "{{- '\\n' }}"
            ),
        ),
    ),
    "qwen3": Chat(
        text=(
            "{%- if messages[0].role == 'system' %}\n    {{- '<|im_start|>system\\n' + messages[0].content + "
            "'<|im_end|>\\n' }}\n{%- endif %}\n{%- set ns = namespace(multi_step_tool=true, "
            "last_query_index=messages|length - 1) %}\n{%- for message in messages[::-1] %}\n    {%- set index = "
            '(messages|length - 1) - loop.index0 %}\n    {%- if ns.multi_step_tool and message.role == "user" and '
            "message.content is string and not(message.content.startswith('<tool_response>') and "
            "message.content.endswith('</tool_response>')) %}\n        {%- set ns.multi_step_tool = false %}\n        "
            "{%- set ns.last_query_index = index %}\n    {%- endif %}\n{%- endfor %}\n{%- for message in messages %}\n"
            "    {%- if message.content is string %}\n        {%- set content = message.content %}\n    {%- else %}\n"
            "        {%- set content = '' %}\n    {%- endif %}\n    {%- if (message.role == \"user\") or (message.role == "
            "\"system\" and not loop.first) %}\n        {{- '<|im_start|>' + message.role + '\\n' + content + "
            "'<|im_end|>' + '\\n' }}\n    {%- elif message.role == \"assistant\" %}\n        {%- set reasoning_content = "
            "'' %}\n        {%- if message.reasoning_content is string %}\n            {%- set reasoning_content = "
            "message.reasoning_content %}\n        {%- else %}\n            {%- if '</think>' in content %}\n"
            "                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1]"
            ".lstrip('\\n') %}\n                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n"
            "            {%- endif %}\n        {%- endif %}\n        {%- if loop.index0 > ns.last_query_index %}\n"
            "            {%- if loop.last or (not loop.last and reasoning_content) %}\n                {{- "
            "'<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + "
            "content.lstrip('\\n') }}\n            {%- else %}\n                {{- '<|im_start|>' + message.role + "
            "'\\n' + content }}\n            {%- endif %}\n        {%- else %}\n            {{- '<|im_start|>' + "
            "message.role + '\\n' + content }}\n        {%- endif %}\n        {{- '<|im_end|>\\n' }}\n    {%- endif %}\n"
            "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n    {%- if "
            "enable_thinking is defined and enable_thinking is false %}\n        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
            "    {%- endif %}\n{%- endif %}"
        ),
        closing="<|im_end|>",
    ),
    "mistral_v0.1": Chat(
        text=(
            "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if "
            "message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == "
            "'assistant' %}{{ message['content'] + eos_token + ' ' }}{% else %}{{ raise_exception('Only user and "
            "assistant roles are supported!') }}{% endif %}{% endfor %}"
        ),
        closing="</s>",
        marked=(
            "{{ message['content'] + eos_token + ' ' }}",
            "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ ' ' }}",
        ),
        system=False,
        alternates=True,
    ),
    "mistral_v0.2": Chat(
        text=(
            '{%- if messages[0]["role"] == "system" %}\n    {%- set system_message = messages[0]["content"] %}\n    {%- '
            "set loop_messages = messages[1:] %}\n{%- else %}\n    {%- set loop_messages = messages %}\n{%- endif %}\n\n"
            "{{- bos_token }}\n{%- for message in loop_messages %}\n    {%- if (message['role'] == 'user') != (loop.index0 "
            "% 2 == 0) %}\n        {{- raise_exception('After the optional system message, conversation roles must "
            'alternate user/assistant/user/assistant/...\') }}\n    {%- endif %}\n    {%- if message["role"] == '
            '"user" %}\n        {%- if loop.first and system_message is defined %}\n            {{- " [INST] " + '
            'system_message + "\\n\\n" + message["content"] + " [/INST]" }}\n        {%- else %}\n            {{- " [INST]'
            ' " + message["content"] + " [/INST]" }}\n        {%- endif %}\n    {%- elif message["role"] == "assistant" '
            '%}\n        {{- " " + message["content"] + eos_token}}\n    {%- else %}\n        {{- raise_exception("Only '
            'user and assistant roles are supported, with the exception of an initial optional system message!") }}\n'
            "    {%- endif %}\n{%- endfor %}\n"
        ),
        closing="</s>",
        alternates=True,
    ),
    "llama2": Chat(
        text=(
            "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if "
            "message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}{% elif "
            "message['role'] == 'assistant' %}{{ ' '  + message['content'].strip() + ' ' + eos_token }}{% endif %}"
            "{% endfor %}"
        ),
        closing=" </s>",
        trims=str.strip,
        system=False,
        alternates=True,
    ),
    "phi3.5": Chat(
        text=(
            "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\n' + "
            "message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + "
            "'<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
            "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}"
            "{% endif %}"
        ),
        closing="<|end|>",
        marked=(
            "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}",
            "{{'<|assistant|>\n'}}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{{'\n'}}",
        ),
    ),
    "gemma2": Chat(
        text=(
            "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
            "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
            "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
            "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
        ),
        closing="<end_of_turn>",
        marked=(
            "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}",
            _marked(
                "{{ '<start_of_turn>' + role + '\n' }}",
                "{{ message['content'] | trim + '<end_of_turn>' }}",
                "{{ '\n' }}",
            ),
        ),
        trims=str.strip,
        system=False,
        alternates=True,
    ),
    "gemma3": Chat(
        text=(
            "{{ bos_token }}\n{%- if messages[0]['role'] == 'system' -%}\n    {%- if messages[0]['content'] is string -%}\n"
            "        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}\n    {%- else -%}\n        {%- set "
            "first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}\n    {%- endif -%}\n    {%- set "
            'loop_messages = messages[1:] -%}\n{%- else -%}\n    {%- set first_user_prefix = "" -%}\n    {%- set '
            "loop_messages = messages -%}\n{%- endif -%}\n{%- for message in loop_messages -%}\n    {%- if "
            "(message['role'] == 'user') != (loop.index0 % 2 == 0) -%}\n        {{ raise_exception(\"Conversation roles "
            "must alternate user/assistant/user/assistant/...\") }}\n    {%- endif -%}\n    {%- if (message['role'] == "
            "'assistant') -%}\n        {%- set role = \"model\" -%}\n    {%- else -%}\n        {%- set role = "
            "message['role'] -%}\n    {%- endif -%}\n    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if "
            "loop.first else \"\") }}\n    {%- if message['content'] is string -%}\n        {{ message['content'] | trim }}\n"
            "    {%- elif message['content'] is iterable -%}\n        {%- for item in message['content'] -%}\n            "
            "{%- if item['type'] == 'image' -%}\n                {{ '<start_of_image>' }}\n            {%- elif "
            "item['type'] == 'text' -%}\n                {{ item['text'] | trim }}\n            {%- endif -%}\n        "
            '{%- endfor -%}\n    {%- else -%}\n        {{ raise_exception("Invalid content type") }}\n    {%- endif -%}\n'
            "    {{ '<end_of_turn>\n' }}\n{%- endfor -%}\n{%- if add_generation_prompt -%}\n    {{'<start_of_turn>model\n'}}"
            "\n{%- endif -%}\n"
        ),
        closing="<end_of_turn>",
        trims=str.strip,
        alternates=True,
    ),
    "smollm2": Chat(
        text=(
            "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
            "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{"
            f"{_CHATML}}}}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
        ),
        closing="<|im_end|>",
        marked=(
            f"{{{{{_CHATML}}}}}",
            _marked(
                "{{'<|im_start|>' + message['role'] + '\n'}}", "{{ message['content'] + '<|im_end|>' }}", "{{ '\n' }}"
            ),
        ),
    ),
    "zephyr": Chat(
        text=(
            "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
            "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
            "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
            "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
        ),
        closing="</s>",
    ),
    # Written for contents of many parts alone.
    "llava": Chat(
        text=(
            "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}"
            "{% endif %}{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', "
            "'image') %}{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
            "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
            "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
            "{{ content['text'] + eos_token}}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}"
            "{{ 'ASSISTANT:' }}{% endif %}"
        ),
        closing="</s>",
    ),
}
