"""The schema of a recipe: model, data, and an ordered list of stages. A stage is data, not code.

Every key is checked: an unknown one is an error that names the nearest valid key (`loading.load_recipe`).
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from symphony_vlm.config.monitor import MonitorConfig
from symphony_vlm.config.schema import Schema
from symphony_vlm.config.stage import DataRole, StageConfig
from symphony_vlm.data.images import MAX_PIXELS

__all__ = [
    "AugmentationConfig",
    "DataConfig",
    "EvaluationConfig",
    "LanguageConfig",
    "ModelConfig",
    "Recipe",
    "ScenesConfig",
    "SourceConfig",
    "StageConfig",
    "TextConfig",
    "TextSource",
    "VisionSource",
]


MAX_SCALE = 8
"""A tower at scale 8 sees 64 tiles of every image."""
Severity = Annotated[int, Field(ge=1, le=5)]


class VisionSource(Schema):
    """Where the vision tower comes from: a pretrained one by name, or a new one by architecture."""

    backend: Literal["open_clip", "transformers"] = "open_clip"
    name: str | None = None
    """open_clip architecture or folder; transformers hub id or folder."""
    pretrained: str | None = None
    """open_clip pretrained tag or local weight file."""
    architecture: dict[str, Any] | None = None
    """A new open_clip model: ``{embed_dim, vision_cfg, text_cfg}``; trained by the ``contrastive`` stage, if any."""
    feature_layer: int = -2
    feature_select: Literal["patch", "cls_patch"] = "patch"
    resize_mode: Literal["pad", "crop", "stretch", "encoder", "anyres"] = "pad"
    """How any image becomes what the tower takes (``docs/images.md``): padded with the mean colour, cropped to its
    middle, stretched, as the pretrained encoder's own preprocessing does it, or in tiles."""
    grid_pinpoints: list[tuple[int, int]] | None = None
    """For ``anyres``: heights and widths in pixels, multiples of the encoder's size; default: LLaVA-NeXT's five."""
    scales: list[int] = Field(default=[1])
    """Sizes, in units of the encoder's, at which it looks at every image: ``[1, 3]`` in CuMo and LibMoE."""

    @model_validator(mode="after")
    def _one_source(self) -> VisionSource:
        if (self.name is None) == (self.architecture is None):
            raise ValueError("give either 'name' (a pretrained tower) or 'architecture' (a new one)")
        return self

    @model_validator(mode="after")
    def _one_view(self) -> VisionSource:
        if self.scales[:1] != [1] or any(a >= b for a, b in itertools.pairwise(self.scales)):
            raise ValueError(f"'scales' must ascend from 1, got {self.scales}")
        if self.scales[-1] > MAX_SCALE:
            raise ValueError(f"'scales' goes up to {MAX_SCALE}, got {self.scales}")
        if self.resize_mode in ("anyres", "encoder") and self.scales != [1]:
            raise ValueError(f"'scales' needs resize_mode pad, crop or stretch, not {self.resize_mode}")
        if self.resize_mode == "encoder" and self.name is None:
            raise ValueError("'resize_mode: encoder' is the preprocessing of a pretrained tower: it needs 'name'")
        if self.resize_mode == "anyres" and self.feature_select != "patch":
            raise ValueError("'resize_mode: anyres' arranges patches: it needs feature_select patch")
        if self.grid_pinpoints is not None and self.resize_mode != "anyres":
            raise ValueError(f"'grid_pinpoints' belongs to resize_mode anyres, not {self.resize_mode}")
        if self.grid_pinpoints is not None and not self.grid_pinpoints:
            raise ValueError("'grid_pinpoints' is empty; leave it out for LLaVA-NeXT's five")
        return self


class LanguageConfig(Schema):
    """Where the language model comes from: a pretrained one by name, or a new one by config."""

    name: str | None = None
    """Hub id or local folder of a causal LM with its tokenizer."""
    architecture: dict[str, Any] | None = None
    """A new model: the Hugging Face config's fields with ``model_type``; vocabulary and token ids are filled in."""
    vocab_size: int = Field(default=1024, ge=300)
    """Size, at most, of the tokenizer trained for a new model."""
    tokenizer: Literal["bpe", "word_level"] = "bpe"
    """What is trained for a new model: byte-level BPE; or, in language stages, whole words between white space, with
    ``<unk>``, and ``<eos>`` at line ends (WikiText)."""
    min_frequency: int = Field(default=1, ge=1)
    """How often a word must occur to be one of the word-level tokenizer's; rarer ones are ``<unk>``."""

    @model_validator(mode="after")
    def _one_source(self) -> LanguageConfig:
        if (self.name is None) == (self.architecture is None):
            raise ValueError("give either 'name' (a pretrained model) or 'architecture' (a new one)")
        return self


class ModelConfig(Schema):
    """The parts of the model."""

    vision: VisionSource | None = None
    """None in recipes of language stages, whose model has no eyes."""
    language: LanguageConfig
    projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
    template: str = "auto"
    """How conversations are written (docs/templates.md): a built-in template, ``tokenizer`` for the chat template of
    the language model's tokenizer, or ``auto``: that where there is one, else ``vicuna_v1``."""
    moe: dict[str, Any] | None = None
    """Settings of `symphony_vlm.moe.configuration.MoEConfig`, applied by the stage that upcycles."""
    start: str | None = None
    """A saved model to start from instead of assembling the parts."""
    random_weights: bool = False
    """Whether the parts named above get new random weights, and a new tokenizer, instead of being downloaded: tries a
    recipe's memory and speed. Their architectures are those of ``configs/models``."""

    @property
    def tower(self) -> VisionSource:
        """`vision` of a model that has one."""
        assert self.vision is not None
        return self.vision

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if self.random_weights and self.start is not None:
            raise ValueError("'random_weights' makes new parts and 'start' is a saved model; leave out one of them")
        vision = self.vision
        if self.random_weights and vision and (vision.resize_mode, vision.backend) == ("encoder", "transformers"):
            raise ValueError("'random_weights' does without the encoder's files, and 'resize_mode: encoder' is in them")
        return self


class ScenesConfig(Schema):
    """The built-in generated data (`symphony-vlm data scenes`), drawn into the run's folder."""

    train: int = Field(gt=0)
    test: int = Field(gt=0)
    image_size: int = Field(default=64, ge=32)
    questions_per_image: int = Field(default=8, ge=1)


class SourceConfig(Schema):
    """One file, folder or hub data set, and how much of a mixture it is."""

    path: str = Field(min_length=1)
    """Data file or folder, relative to the current folder, or the id of a Hugging Face data set."""
    image_folder: str | None = None
    """Base of the records' image paths; default: that of the data, or else the folder of the data file."""
    split: str | None = None
    """Of a data set that has several, e.g. ``train``."""
    subset: str | None = None
    """Of a hub data set that has several (its configuration)."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """How many times each record is seen in an epoch: 2 is twice, 0.5 a seeded half, the same in every epoch. When
    streaming, the chance of the source to give the next record, in proportion to the other weights."""


class AugmentationConfig(Schema):
    """Corrupts pictures while training, never those that are validated on (``docs/corruptions.md``)."""

    corruptions: Annotated[list[str], BeforeValidator(lambda value: _as_list(value))] = Field(min_length=1)
    """Names, or ``common`` (the 15 of ImageNet-C) or ``all`` (19); each as likely as the others."""
    severities: list[Severity] = Field(default=[1, 2, 3], min_length=1)
    """Each as likely as the others."""
    probability: float = Field(default=0.5, gt=0, le=1)
    """That a picture is corrupted, drawn for every picture and epoch."""


def _as_sources(value: Any) -> Any:
    """A path or a source alone is a list of one; a path is a source with nothing but a path."""
    if isinstance(value, (str, dict)):
        value = [value]
    return [{"path": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Sources = Annotated[list[SourceConfig], BeforeValidator(_as_sources), Field(min_length=1)]


class TextSource(Schema):
    """Plain text, read by lines: a file, a folder of tables or a hub data set with a column ``text``."""

    path: str = Field(min_length=1)
    """File or folder, relative to the current folder, or the id of a Hugging Face data set."""
    split: str | None = None
    subset: str | None = None


TextSources = Annotated[list[TextSource], BeforeValidator(_as_sources), Field(min_length=1)]


class TextConfig(Schema):
    """The text of language stages."""

    train: TextSources
    validation: TextSources | None = None
    """For the loss beside training."""


class DataConfig(Schema):
    """Where the data is. Paths are relative to the current folder."""

    text: TextConfig | None = None
    """Plain text for language stages, which read nothing else."""

    train: Sources | None = None
    """Instruction data: a path (LLaVA JSON or JSONL, parquet with image, question, answer, ...), a source
    (`SourceConfig`), or a list of paths and sources."""
    captions: Sources | None = None
    """Image-text pairs in the same formats, for the contrastive and the projector stage."""
    prefinetune: Sources | None = None
    """Data of a stage between those two, e.g. long captions for the whole model (CuMo, LibMoE)."""
    image_folder: str | None = None
    """Base of the records' image paths, for sources without their own; default: the folder of the data file."""
    scenes: ScenesConfig | None = None
    """Draws scenes and uses them for whatever is not set above."""
    validation_fraction: float = Field(default=0.02, ge=0.0, lt=1.0)
    """Share of the pictures (with all their records) held out of every stage; written to ``validation.jsonl``."""
    on_bad_sample: Literal["error", "skip"] = "error"
    feature_cache: str | None = None
    """Folder for the features of frozen vision towers (`cache_features` of a stage); default: ``features`` in the run's
    folder. Runs may share one."""
    check_images: bool = True
    """Whether every image is decoded before training starts."""
    max_pixels: int = Field(default=MAX_PIXELS, gt=0, le=MAX_PIXELS)
    """Width times height above which an image counts as broken, by its header."""
    augmentation: AugmentationConfig | None = None
    """Corrupts pictures of contrastive and multimodal stages; not together with ``cache_features``."""
    skip: Annotated[list[str], BeforeValidator(_as_list)] = Field(default_factory=list)
    """Files of faults written by ``symphony-vlm data check``; the records they list are left out."""
    streaming: bool = False
    """Whether records are read while training, without a full download or check first. Multimodal stages only."""
    shuffle_buffer: int = Field(default=1000, ge=1)
    """When streaming: records of each source among which the next is drawn at random; 1 keeps the files' order."""

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        for role in get_args(DataRole):
            sources: Sources | None = getattr(self, role)
            seen: set[SourceConfig] = set()
            for source in sources or []:
                same = source.model_copy(update={"weight": 1.0})
                if same in seen:
                    raise ValueError(f"{role!r} lists {source.path} twice; to see its records twice give it weight: 2")
                seen.add(same)
        if self.streaming and self.scenes is not None:
            raise ValueError("'scenes' are drawn into files; streaming them is not supported")
        return self


class EvaluationConfig(Schema):
    """What ``quickstart`` evaluates after training."""

    limit: int | None = None
    corrupted_limit: int | None = None
    """Images in each corrupted cell."""
    corruptions: list[str] = Field(default_factory=list)
    severities: list[Severity] = Field(default=[1, 2, 3, 4, 5])
    batch_size: int = 64
    max_new_tokens: int = 16
    routing: bool = False
    """Measures how far the routers' decisions move under corruption (``docs/routing-drift.md``)."""


class Recipe(Schema):
    """A complete training run."""

    name: str
    description: str = ""
    seed: int = 0
    model: ModelConfig
    data: DataConfig = DataConfig()
    stages: list[StageConfig] = Field(min_length=1)
    monitor: MonitorConfig = MonitorConfig()
    """Reports and warnings while training (``docs/monitoring.md``)."""
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ, got {names}")
        upcycling = [stage.name for stage in self.stages if stage.upcycle]
        if len(upcycling) > 1:
            raise ValueError(f"only one stage can upcycle, got {upcycling}")
        if upcycling and self.model.moe is None:
            raise ValueError(f"stage {upcycling[0]!r} upcycles but model.moe is not set")
        self._check_kinds()
        own = self.model.vision.resize_mode if self.model.vision else None
        if own in ("anyres", "encoder") and any(stage.resize_mode is not None for stage in self.stages):
            raise ValueError(f"with model.vision.resize_mode {own} a stage cannot have a 'resize_mode' of its own")
        if self.data.streaming:
            self._check_streaming()
        cached = [stage.name for stage in self.stages if stage.cache_features]
        if self.data.augmentation is not None and cached:
            raise ValueError(
                f"'data.augmentation' shows every picture otherwise in each epoch, and 'cache_features' of stage "
                f"{cached[0]!r} encodes it once; leave out one of them"
            )
        return self

    @property
    def is_language(self) -> bool:
        """Whether it trains a language model alone, on plain text."""
        return self.stages[0].kind == "language"

    def _check_kinds(self) -> None:
        if len({stage.kind == "language" for stage in self.stages}) > 1:
            raise ValueError("language stages stand alone: a recipe has stages of that kind only, or none")
        if not self.is_language:
            if self.model.vision is None:
                raise ValueError("'model.vision' is missing: every kind of stage but language needs a vision tower")
            if self.data.text is not None or self.model.language.tokenizer == "word_level":
                raise ValueError("'data.text' and 'tokenizer: word_level' belong to language stages")
            return
        if self.model.vision is not None:
            raise ValueError("a recipe of language stages has no 'model.vision'")
        if self.data.text is None:
            raise ValueError("language stages train on plain text: give 'data.text.train'")
        if self.model.moe is not None and (self.model.language.name or self.model.start):
            raise ValueError(
                "'model.moe' makes new sparse layers of a new model; upcycle a saved one first (symphony-vlm upcycle) "
                "and name its folder in 'model.language.name'"
            )

    def _check_streaming(self) -> None:
        for stage in self.stages:
            if stage.kind != "multimodal":
                raise ValueError(
                    f"stage {stage.name!r} is a {stage.kind} stage, which needs its data as a whole; data.streaming "
                    "works with multimodal stages (begin from trained parts: model.start, or names of pretrained ones)"
                )
            if stage.packing or stage.group_by != "none" or stage.cache_features:
                raise ValueError(
                    f"stage {stage.name!r}: 'packing', 'group_by' and 'cache_features' need the data as a whole, "
                    "which data.streaming never has"
                )
            if stage.max_steps <= 0:
                raise ValueError(
                    f"stage {stage.name!r} has no max_steps; a stream has no epochs, so give the number of steps"
                )
