"""What is known offline of pretrained parts: ``configs/models/NAME.yaml`` has the architecture behind a hub id."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from symphony_vlm.config.reading import config_folder, explain, read_mapping
from symphony_vlm.config.schema import Schema
from symphony_vlm.errors import InputError
from symphony_vlm.text import nearest

__all__ = ["KnownModel", "known_model", "list_known_models", "load_known_model"]


class KnownModel(Schema):
    """A pretrained vision tower or language model: enough to count it, and to build it with random weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    hub_id: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    kind: Literal["vision", "language"]
    description: str
    parameters: int = Field(gt=0)
    """Of the architecture below as transformers builds it; a tower without its pooling head."""
    dtype: Literal["float32", "float16", "bfloat16"]
    """Of the published weights."""
    size: str
    """Bytes to download, roughly."""
    licence: str
    architecture: dict[str, Any]
    """Fields of the Hugging Face config (of its ``vision_config``) with ``model_type``."""
    tokenizer_size: int | None = None
    """Of a language model: tokens in its tokenizer, which may be fewer than rows in its embedding."""
    has_pad_token: bool | None = None
    """Of a language model: whether its tokenizer has a pad token, or gets one here."""
    image_mean: tuple[float, float, float] | None = None
    """Of a vision tower's image processor, like `image_std`."""
    image_std: tuple[float, float, float] | None = None

    @model_validator(mode="after")
    def _complete(self) -> KnownModel:
        language = (self.tokenizer_size, self.has_pad_token)
        vision = (self.image_mean, self.image_std)
        needed, others = (language, vision) if self.kind == "language" else (vision, language)
        if None in needed or any(value is not None for value in others):
            raise ValueError(
                "language models, and no others, have 'tokenizer_size' and 'has_pad_token'; vision towers 'image_mean' "
                "and 'image_std'"
            )
        return self


def list_known_models() -> list[str]:
    """Names of the files in ``configs/models``."""
    return sorted(path.stem for path in (config_folder() / "models").glob("*.yaml"))


def load_known_model(name: str) -> KnownModel:
    """The entry in ``configs/models/NAME.yaml``.

    Raises:
        InputError: the file is not valid.
    """
    path = config_folder() / "models" / f"{name}.yaml"
    try:
        return KnownModel.model_validate(read_mapping(path, "what is known of a model is a mapping"))
    except ValidationError as error:
        raise explain(error, str(path), KnownModel) from error


def known_model(hub_id: str, kind: Literal["vision", "language"], where: str) -> KnownModel:
    """The entry of a hub id.

    Args:
        hub_id: as in a recipe.
        kind: what it is used as.
        where: the setting that names it, for the message.

    Raises:
        InputError: there is none of that kind (the nearest is named).
    """
    entries = {model.hub_id: model for model in map(load_known_model, list_known_models()) if model.kind == kind}
    if hub_id not in entries:
        raise InputError(
            f"the architecture of {hub_id!r} is not known offline{nearest(hub_id, entries)}",
            where=where,
            remedy=f"Known: {', '.join(entries)}. Give one of these or a local folder, or add it to configs/models.",
        )
    return entries[hub_id]
