"""An encoder's own preparation of images, as its library does it: the geometric part, up to 8-bit pixels."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from symphony_vlm.errors import InputError

__all__ = ["crops", "encoder_geometry", "open_clip_preprocessing", "transformers_preprocessing"]

Geometry = Callable[[Image.Image], np.ndarray]
"""An RGB image to uint8 ``[H, W, 3]``."""


def open_clip_preprocessing(preprocess_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for `encoder_geometry` from an open_clip model's ``visual.preprocess_cfg``."""
    return {"library": "open_clip", **json.loads(json.dumps(dict(preprocess_cfg)))}


def transformers_preprocessing(processor: Any) -> dict[str, Any]:
    """Settings for `encoder_geometry` from an image processor of transformers."""
    return {"library": "transformers", **json.loads(processor.to_json_string())}


def crops(settings: Mapping[str, Any]) -> bool:
    """Whether the image is resized by its short side, so that the middle of the long one is all that is used."""
    if settings["library"] == "open_clip":
        return bool(settings.get("resize_mode", "shortest") == "shortest")
    return "shortest_edge" in (settings.get("size") or {})


def encoder_geometry(settings: Mapping[str, Any]) -> Geometry:
    """What turns an image into the pixels that the encoder's library would normalise.

    Args:
        settings: of `open_clip_preprocessing` or `transformers_preprocessing`, as a checkpoint carries them.

    Raises:
        InputError: the library is unknown, or has no such processor on Pillow.
    """
    return _geometry(json.dumps(dict(settings), sort_keys=True))


@lru_cache(maxsize=8)
def _geometry(settings: str) -> Geometry:
    libraries = {"open_clip": _open_clip, "transformers": _transformers}
    values = json.loads(settings)
    library = values.pop("library", None)
    if library not in libraries:
        raise InputError(f"{library!r} is not one of {', '.join(libraries)}", where="preprocessing.library")
    return libraries[library](values)


def _open_clip(values: dict[str, Any]) -> Geometry:
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
    from torchvision.transforms import Normalize, ToTensor

    transform = image_transform_v2(PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), values)), is_train=False)
    steps = [step for step in transform.transforms if not isinstance(step, (ToTensor, Normalize))]

    def prepare(image: Image.Image) -> np.ndarray:
        for step in steps:
            image = step(image)
        return np.asarray(image)

    return prepare


def _transformers(values: dict[str, Any]) -> Geometry:
    # By name from transformers itself; a processor that comes as code of its own is none of these.
    from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

    name = str(values.get("image_processor_type"))
    # Each processor exists on Pillow and on torchvision, which rounds otherwise; ours are Pillow's everywhere.
    processor_class = get_image_processor_class_from_name(f"{name.removesuffix('Fast')}Pil")
    if processor_class is None:
        raise InputError(
            f"transformers has no {name!r} that works with Pillow",
            where="preprocessing",
            remedy="Use resize_mode: pad, crop or stretch.",
        )
    processor = processor_class.from_dict(values)

    def prepare(image: Image.Image) -> np.ndarray:
        channels_first = processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
        return np.ascontiguousarray(np.moveaxis(np.asarray(channels_first), 0, -1))

    return prepare
