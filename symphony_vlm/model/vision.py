"""Vision towers: any open_clip encoder, or CLIP and SigLIP from transformers, behind one small interface.

Shape letters: N images, P features per image, C vision hidden size.

A tower is described completely by its `VisionConfig`, which a checkpoint carries: rebuilding one never needs a name, a
hub or a path.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from symphony_vlm.errors import InputError
from symphony_vlm.model.encoder_preprocessing import open_clip_preprocessing, transformers_preprocessing
from symphony_vlm.model.multi_scale import multi_scale_features
from symphony_vlm.text import nearest

__all__ = ["VisionConfig", "VisionTower", "build_vision_tower", "load_vision_tower", "open_clip_architecture"]

OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Everything needed to rebuild a vision tower and to prepare its images."""

    backend: Literal["open_clip", "transformers"]
    architecture: Mapping[str, Any]
    """open_clip: ``{"embed_dim", "vision_cfg", "quick_gelu"}``; transformers: the vision config's dict."""
    image_size: int
    """Side of the squares that the encoder itself takes."""
    feature_layer: int = -2
    """Which hidden layer the features come from; -1 is the output of the last block, -2 (LLaVA) the one before."""
    feature_select: Literal["patch", "cls_patch"] = "patch"
    """Patch features alone, or with the class token in front."""
    image_mean: tuple[float, float, float] = OPENAI_CLIP_MEAN
    image_std: tuple[float, float, float] = OPENAI_CLIP_STD
    interpolation: str = "bicubic"
    """Pillow's name of the filter with which the encoder's training images were resized."""
    rescale_factor: float = 1 / 255
    """Makes 8-bit values those that the mean and deviation are of."""
    scales: tuple[int, ...] = (1,)
    """At which sizes, in units of `image_size`, the encoder looks at an image, see `multi_scale`."""
    preprocessing: Mapping[str, Any] | None = None
    """The encoder's own preparation of images, for ``resize_mode: encoder``, see `encoder_preprocessing`."""

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in itertools.pairwise(self.scales))
        if not self.scales or self.scales[0] != 1 or not ascending or not all(type(s) is int for s in self.scales):
            raise InputError(f"{list(self.scales)} is no ascending list of whole numbers from 1", where="vision.scales")

    @property
    def input_size(self) -> int:
        """Side of the squares that the tower takes: of the largest scale."""
        return self.image_size * self.scales[-1]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping; `from_dict` restores an equal object."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VisionConfig:
        """Builds the config from `to_dict`'s mapping; unknown keys are an `InputError`."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise InputError(f"unknown setting {key!r}{nearest(key, known)}", where="vision_config")
        arguments: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**arguments)


class VisionTower(nn.Module):
    """Common face of the towers: images in, features of one hidden layer out.

    Attributes:
        hidden_size: C, of all scales together.
        num_tokens: P.
    """

    hidden_size: int
    num_tokens: int

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        """Features ``[N, P, C]`` of squares of side ``config.input_size``."""
        config = self.config
        if len(config.scales) == 1:
            return self.encode(pixels_N3HW)
        return multi_scale_features(self.encode, pixels_N3HW, config.scales, config.image_size)

    def encode(self, pixels_N3HW: Tensor) -> Tensor:
        """Features of squares of the encoder's own size, at one scale."""
        raise NotImplementedError

    def _measure(self) -> None:
        """Learns P and C from one forward pass on the meta device: right for any architecture, and free."""
        size = self.config.input_size
        state = {name: torch.empty_like(t, device="meta") for name, t in self.state_dict(keep_vars=True).items()}
        state |= {name: torch.empty_like(b, device="meta") for name, b in self.named_buffers()}
        pixels = torch.empty(1, 3, size, size, device="meta")
        with torch.no_grad():
            features = torch.func.functional_call(self, state, (pixels,))
        self.num_tokens, self.hidden_size = features.shape[1], features.shape[2]


class OpenClipTower(VisionTower):
    """The image half of an open_clip model: ViT, ModifiedResNet, or any timm trunk."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        from open_clip.model import CLIPVisionCfg, _build_vision_tower

        arch = dict(config.architecture)
        self.visual = _build_vision_tower(
            arch["embed_dim"], CLIPVisionCfg(**arch["vision_cfg"]), arch.get("quick_gelu", False)
        )
        try:
            self._index = self._drop_what_is_not_used()
            self._measure()
        except AssertionError as error:
            raise _no_such_layer(config) from error

    def encode(self, pixels_N3HW: Tensor) -> Tensor:
        out = self.visual.forward_intermediates(
            pixels_N3HW,
            indices=[self._index],
            stop_early=True,
            intermediates_only=True,
            output_extra_tokens=self.config.feature_select == "cls_patch",
        )
        features: Tensor = out["image_intermediates"][0].flatten(2).transpose(1, 2)
        if self.config.feature_select == "cls_patch" and "image_intermediates_prefix" in out:
            features = torch.cat([out["image_intermediates_prefix"][0], features], dim=1)
        return features

    def _drop_what_is_not_used(self) -> int:
        """Drops what would be trained without a gradient: later blocks, final norm, head. Returns the block's index."""
        layer = self.config.feature_layer
        if layer == 0:
            raise _no_such_layer(self.config)
        # Hidden layer 0 is the embedding, so hidden layer k is the output of block k - 1; negatives agree.
        indices = [layer if layer < 0 else layer - 1]
        visual = self.visual
        if hasattr(visual, "trunk"):
            visual.head = nn.Identity()
            taken = visual.trunk.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
        elif hasattr(visual, "transformer"):
            taken = visual.prune_intermediate_layers(indices, prune_norm=True)
            visual.attn_pool = None
        else:
            taken = _prune_resnet(visual, indices)
        return int(taken[-1])


def _prune_resnet(visual: nn.Module, indices: list[int]) -> list[int]:
    """The same for open_clip's ModifiedResNet, which has no method for it; its blocks are the stem and four layers."""
    from open_clip.utils import feature_take_indices

    taken, last = feature_take_indices(5, indices)
    visual.attnpool = nn.Identity()
    for number in range(last + 1, 5):
        setattr(visual, f"layer{number}", nn.Identity())
    return list(taken)


def _no_such_layer(config: VisionConfig) -> InputError:
    return InputError(
        f"{config.feature_layer} is no hidden layer of this tower",
        where="vision.feature_layer",
        remedy="Use -1 for the output of the last block, -2 for the one before, and so on.",
    )


class HuggingFaceTower(VisionTower):
    """A transformers vision model with ``hidden_states``: CLIP, SigLIP and others of that shape."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        from transformers import AutoConfig, AutoModel

        vision_config = AutoConfig.for_model(**config.architecture)
        # Layers above the feature layer are never built; its output is then the last hidden state.
        total = vision_config.num_hidden_layers
        if not 1 <= abs(config.feature_layer) <= total:
            raise _no_such_layer(config)
        vision_config.num_hidden_layers = config.feature_layer % (total + 1)
        # SigLIP's pooling head; its configuration does not have the setting in every version of transformers.
        vision_config.vision_use_head = False
        self.model = AutoModel.from_config(vision_config)
        # The final norm feeds the pooled output alone; kept, it would be a parameter that never gets a gradient.
        normed = [module for module in self.model.modules() if hasattr(module, "post_layernorm")]
        for module in normed:
            module.post_layernorm = nn.Identity()
        self._ends_with_the_layer = bool(normed)
        self._measure()

    def encode(self, pixels_N3HW: Tensor) -> Tensor:
        hidden_NPC: Tensor
        if self._ends_with_the_layer:
            hidden_NPC = self.model(pixels_N3HW).last_hidden_state
        else:
            # By hooks on every layer, which torch.compile cannot look into.
            hidden_NPC = self.model(pixels_N3HW, output_hidden_states=True).hidden_states[-1]
        has_class_token = hidden_NPC.shape[1] == self._num_patches() + 1
        return hidden_NPC[:, 1:] if has_class_token and self.config.feature_select == "patch" else hidden_NPC

    def _num_patches(self) -> int:
        return int((self.config.image_size // self.model.config.patch_size) ** 2)


def build_vision_tower(config: VisionConfig) -> VisionTower:
    """A tower with new weights."""
    towers = {"open_clip": OpenClipTower, "transformers": HuggingFaceTower}
    if config.backend not in towers:
        raise InputError(
            f"{config.backend!r} is not one of {', '.join(towers)}{nearest(config.backend, towers)}",
            where="vision_config.backend",
        )
    return towers[config.backend](config)


def load_vision_tower(
    backend: str,
    name: str,
    *,
    pretrained: str | None = None,
    feature_layer: int = -2,
    feature_select: Literal["patch", "cls_patch"] = "patch",
    scales: Sequence[int] = (1,),
) -> VisionTower:
    """A pretrained tower.

    Args:
        backend: ``open_clip`` or ``transformers``.
        name: open_clip: an architecture's name, a folder written by the ``encoder`` stage (``open_clip_config.json``),
            or ``hf-hub:...``; transformers: a hub id or a local folder.
        pretrained: open_clip's pretrained tag or a local weight file.
        feature_layer: see `VisionConfig`.
        feature_select: see `VisionConfig`.
        scales: see `VisionConfig`.

    Raises:
        InputError: the name, tag or folder does not exist.
    """
    choose = {"feature_layer": feature_layer, "feature_select": feature_select, "scales": tuple(scales)}
    if backend == "open_clip":
        return _load_open_clip(name, pretrained, choose)
    if backend == "transformers":
        return _load_transformers(name, choose)
    raise InputError(f"{backend!r} is not one of open_clip, transformers", where="model.vision.backend")


def _load_open_clip(name: str, pretrained: str | None, choose: dict[str, Any]) -> VisionTower:
    import open_clip

    where = "model.vision"
    folder = Path(name)
    if (folder / "open_clip_config.json").is_file():
        name = f"local-dir:{folder}"
    elif not name.startswith(("hf-hub:", "local-dir:")):
        if name not in open_clip.list_models():
            raise InputError(
                f"{name!r} is neither an open_clip architecture nor a folder with open_clip_config.json"
                f"{nearest(name, open_clip.list_models())}",
                where=f"{where}.name",
            )
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained is not None and pretrained not in tags and not Path(pretrained).is_file():
            raise InputError(
                f"{pretrained!r} is neither a file nor a pretrained tag of {name}{nearest(pretrained, tags)}",
                where=f"{where}.pretrained",
                remedy=f"Tags: {', '.join(tags) or 'none'}.",
            )
    # weights_only: a checkpoint file must not be able to run code.
    clip = open_clip.create_model(name, pretrained=pretrained, weights_only=True)
    arch = open_clip_architecture(name)
    size, prepared = clip.visual.image_size, clip.visual.preprocess_cfg
    config = VisionConfig(
        backend="open_clip",
        architecture=arch,
        image_size=size[0] if isinstance(size, (tuple, list)) else size,
        image_mean=tuple(prepared["mean"]),
        image_std=tuple(prepared["std"]),
        interpolation=prepared["interpolation"],
        preprocessing=open_clip_preprocessing(prepared),
        **choose,
    )
    tower = OpenClipTower(config)
    _copy_weights(tower.visual, clip.visual.state_dict())
    return tower


def open_clip_architecture(name: str) -> dict[str, Any]:
    """What a `VisionConfig` says of an open_clip model: one of its own list, or ``local-dir:FOLDER``.

    Raises:
        InputError: it is neither.
    """
    import open_clip

    if name.startswith("local-dir:"):
        import json

        cfg = json.loads((Path(name.removeprefix("local-dir:")) / "open_clip_config.json").read_text())["model_cfg"]
    else:
        cfg = open_clip.get_model_config(name)
        if cfg is None:
            raise InputError(
                f"the architecture of {name!r} is not known locally",
                where="model.vision.name",
                remedy="Download the repository and give its folder.",
            )
    return {
        "embed_dim": cfg["embed_dim"],
        "vision_cfg": dict(cfg["vision_cfg"]),
        "quick_gelu": bool(cfg.get("quick_gelu", False)),
    }


def _load_transformers(name: str, choose: dict[str, Any]) -> VisionTower:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    try:
        full = AutoConfig.from_pretrained(name)
        processor = AutoImageProcessor.from_pretrained(name, backend="pil")
    except OSError as error:
        raise InputError(
            str(error).splitlines()[0], where="model.vision.name", remedy="Give a local folder."
        ) from error
    vision = getattr(full, "vision_config", full)
    size = vision.image_size
    config = VisionConfig(
        backend="transformers",
        architecture=vision.to_dict(),
        image_size=size,
        **_arithmetic(processor),
        preprocessing=transformers_preprocessing(processor),
        **choose,
    )
    tower = HuggingFaceTower(config)
    source = AutoModel.from_pretrained(name)
    source = getattr(source, "vision_model", source)
    weights = {key.removeprefix("vision_model."): value for key, value in source.state_dict().items()}
    prefix = "vision_model." if any(k.startswith("vision_model.") for k in tower.model.state_dict()) else ""
    _copy_weights(tower.model, {prefix + key: value for key, value in weights.items()})
    return tower


def _arithmetic(processor: Any) -> dict[str, Any]:
    """Filter, factor, mean and deviation of an image processor of transformers, whose steps may be switched off."""
    normalizes = processor.do_normalize
    return {
        "interpolation": Image.Resampling(processor.resample).name.lower(),
        "rescale_factor": processor.rescale_factor if processor.do_rescale else 1.0,
        "image_mean": tuple(processor.image_mean) if normalizes else (0.0, 0.0, 0.0),
        "image_std": tuple(processor.image_std) if normalizes else (1.0, 1.0, 1.0),
    }


def _copy_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads the weights that the pruned module still has; a missing one is an error."""
    needed = set(module.state_dict())
    if missing := sorted(needed - set(weights)):
        raise InputError(
            f"the checkpoint has no {', '.join(missing[:3])} ({len(missing)} missing)", where="model.vision"
        )
    module.load_state_dict({key: weights[key] for key in needed})
