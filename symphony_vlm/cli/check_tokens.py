"""Opens the tokenizer, template and lengths with which ``data check`` makes tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symphony_vlm.errors import InputError

if TYPE_CHECKING:
    from symphony_vlm.config.recipe import Recipe
    from symphony_vlm.data.check.tokens import Tokenization

__all__ = ["TokenChoice", "open_tokenization"]

DEFAULT_IMAGE_TOKENS = 576
"""LLaVA-1.5: 336 pixels in patches of 14, 24 x 24."""


@dataclass(frozen=True, kw_only=True)
class TokenChoice:
    """What the command line asks for; None is left to the model, the recipe or a default."""

    model: str | None = None
    tokenizer: str | None = None
    template: str | None = None
    image_tokens: int | None = None
    max_length: int | None = None


def open_tokenization(choice: TokenChoice, recipe: Recipe | None) -> Tokenization | None:
    """How records become tokens, or None if neither a model nor a tokenizer was named.

    Raises:
        InputError: both were named, or one cannot be opened, or a setting has nothing to apply to.
    """
    if choice.model is None and choice.tokenizer is None:
        given = {
            "--template": choice.template,
            "--max-length": choice.max_length,
            "--image-tokens": choice.image_tokens,
        }
        for option, value in given.items():
            if value is not None:
                remedy = "Add --model DIR or --tokenizer DIR."
                raise InputError(f"{value!r} has no effect without a tokenizer", where=option, remedy=remedy)
        return None
    if choice.model is not None and choice.tokenizer is not None:
        raise InputError("give one of them", where="--model and --tokenizer", remedy="A model brings its tokenizer.")
    made = _of_model(choice) if choice.model is not None else _of_tokenizer(choice, recipe)
    return dataclasses.replace(made, max_length=choice.max_length or _max_length(recipe))


def _max_length(recipe: Recipe | None) -> int | None:
    """The least limit among the recipe's stages that train on conversations."""
    lengths = [stage.max_length for stage in recipe.stages if stage.kind == "multimodal"] if recipe else []
    return min(lengths, default=None)


def _of_model(choice: TokenChoice) -> Tokenization:
    from symphony_vlm.data.check.tokens import Tokenization
    from symphony_vlm.model.loading import local_folder
    from symphony_vlm.model.processor import SymphonyVLMProcessor

    folder = local_folder(str(choice.model))
    try:
        processor = SymphonyVLMProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"holds no processor of a vision-language model ({str(error).splitlines()[0][:200]})",
            where=str(folder),
            remedy="Name a language model's folder with --tokenizer.",
        ) from error
    return Tokenization(
        tokenizer=processor.tokenizer,
        template=processor.layout(choice.template),
        image_token_id=processor.image_token_id,
        num_image_tokens=choice.image_tokens or processor.num_image_tokens,
        count_image_tokens=None if choice.image_tokens else processor.count_tokens_of_files,
    )


def _of_tokenizer(choice: TokenChoice, recipe: Recipe | None) -> Tokenization:
    from transformers import AutoTokenizer

    from symphony_vlm.data.check.tokens import Tokenization
    from symphony_vlm.data.templates import resolve_template
    from symphony_vlm.data.tokenizer import IMAGE_TOKEN, ensure_special_tokens

    name = str(choice.tokenizer)
    if not Path(name).expanduser().is_dir() and name.startswith((".", "/", "~")):
        raise InputError("no such folder", where=name, remedy="Give the folder of a saved tokenizer, or a hub name.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(Path(name).expanduser()) if Path(name).is_dir() else name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot be opened as a tokenizer: {str(error).splitlines()[0][:200]}",
            where=name,
            remedy="Give a local folder with tokenizer files, or a hub id while online.",
        ) from error
    ensure_special_tokens(tokenizer)
    template = choice.template or (recipe.model.template if recipe is not None else _fitting_template(tokenizer))
    return Tokenization(
        tokenizer=tokenizer,
        template=resolve_template(template, tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        num_image_tokens=choice.image_tokens or DEFAULT_IMAGE_TOKENS,
    )


def _fitting_template(tokenizer: Any) -> str:
    """The tokenizer's own template; else that whose markers it has as tokens; else vicuna_v1, which needs none."""
    from symphony_vlm.data.templates import AUTO, TEMPLATES

    vocabulary = tokenizer.get_vocab()
    for template in () if tokenizer.chat_template else TEMPLATES.values():
        if template.special_tokens and all(marker in vocabulary for marker in template.special_tokens):
            return template.name
    return AUTO
