"""The schema of a stage of training. A stage is data, not code."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from symphony_vlm.config.engines import check_engine_name
from symphony_vlm.config.lora import LoRAConfig
from symphony_vlm.config.schema import Schema
from symphony_vlm.text import nearest

__all__ = ["DataRole", "StageConfig"]

DataRole = Literal["train", "captions", "prefinetune"]
Schedule = Literal[
    "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "inverse_sqrt", "linear", "polynomial"
]
MODULES = ("vision_tower", "projector", "language_model", "image_newline")


class StageConfig(Schema):
    """One stage of training."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    kind: Literal["contrastive", "text", "multimodal", "language"]
    """contrastive: the image encoder on captions (CLIP). text: the language model alone. multimodal: the whole.
    language: a causal LM, dense or with new sparse layers (`model.moe`), on the plain text of `data.text`."""
    data: DataRole | list[DataRole] = "train"
    """Which of the recipe's data, ``train``, ``captions`` or ``prefinetune``, or several mixed."""
    train: dict[str, float] = Field(default_factory=dict)
    """Peak learning rate by module (``vision_tower``, ``projector``, ``language_model``, or a longer prefix of
    parameter names, where ``*`` is any one part; the longest match wins); what is not named is frozen."""
    lora: LoRAConfig | None = None
    """Adapters on the language model instead of training its weights. The rates of `train` then hold for its adapters
    and routers; other modules train in full."""
    upcycle: bool = False
    """Whether the dense language model becomes a mixture of experts before this stage."""
    template: str | None = None
    """A built-in template instead of the model's, e.g. ``plain`` for captions."""
    resize_mode: Literal["pad", "crop", "stretch"] | None = None
    """Instead of the vision tower's in this stage: LLaVA-1.5 crops while only the projector trains, and then pads."""
    epochs: float = Field(default=1.0, gt=0)
    max_steps: int = -1
    """Optimizer steps; overrides `epochs` if positive."""
    batch_size: int = Field(default=8, gt=0)
    """Per process and micro-batch."""
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    engine: Annotated[str, AfterValidator(check_engine_name)] = "auto"
    """How processes share the work (docs/distributed.md): ``ddp``, ``fsdp2``, ``zero1``, ``zero2``, ``zero3``,
    ``zero2_offload``, ``zero3_offload``, a DeepSpeed file (``.json``), or ``auto``: alone or, if several, by DDP."""
    global_batch_size: int | None = Field(default=None, gt=0)
    """Samples (packed: rows) in an optimizer step, over all processes. The accumulation follows from it, `batch_size`
    and the number of processes, so that another number of them trains on the same batches."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """For the kinds without `train`."""
    schedule: Schedule = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_length: int = Field(default=2048, gt=0)
    cache_features: bool = False
    """Whether a frozen vision tower sees every picture once, and the stage reads its output from `data.feature_cache`.
    It takes disk space: about 1 MB a picture for CLIP-L/14-336 in 16 bits."""
    independent_turns: bool = False
    """Whether the turns of a record are separate questions about its image: each sees the image and itself, not the
    turns before, exactly as if it stood alone, at a fraction of the cost."""
    packing: bool = False
    """Whether conversations share rows of up to `max_length` tokens, each seeing itself alone. `batch_size` then
    counts rows."""
    group_by: Literal["none", "length", "modality_length"] = "none"
    """How batches are composed. none: at random. length: of samples of nearly equal length. modality_length: of samples
    that all have an image or all have none, with nearly as many tokens in each process (LLaVA-1.5)."""
    expert_parallel_size: int = Field(default=1, gt=0)
    """Processes that share the experts of every sparse layer out among them (docs/expert-parallel.md). Multimodal
    stages with DistributedDataParallel only."""
    bf16: bool = False
    gradient_checkpointing: bool | list[Literal["vision_tower", "language_model"]] = False
    """Whether layers keep their input alone for the backward pass and run again there; or of which parts of the model
    the layers do. What has room without is a quarter faster."""
    checkpoint_every: int = Field(default=1, ge=1)
    """With `gradient_checkpointing`: only each n-th layer does."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keeps a moving average of what trains, in fp32, and validates and saves that instead of the last weights."""
    compile: bool = False
    """Whether torch.compile compiles the layers. It pays on a GPU with batches of nearly equal length."""
    validate_at_start: bool = True
    """Whether the validation loss is measured before the first step too."""
    sample_generations: int = Field(default=0, ge=0, le=64)
    """How many held-out questions are answered at each validation; see ``samples.jsonl`` in the stage's folder."""
    dataloader_workers: int = Field(default=0, ge=0)
    log_steps: int = Field(default=10, gt=0)
    save_fraction: float = Field(default=0.2, gt=0, le=1)
    """A checkpoint each time this share of the stage's steps is done."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that stay. The disk needs room for one more: an old one goes once the new one is in place."""

    @property
    def roles(self) -> list[DataRole]:
        """`data` as a list."""
        return [self.data] if isinstance(self.data, str) else self.data

    @property
    def checkpointed_parts(self) -> list[str]:
        """`gradient_checkpointing` as names of modules; the empty name stands for all of the model."""
        if isinstance(self.gradient_checkpointing, bool):
            return [""] if self.gradient_checkpointing else []
        return list(self.gradient_checkpointing)

    @model_validator(mode="after")
    def _fits_its_kind(self) -> StageConfig:
        for prefix in self.train:
            if prefix.partition(".")[0] not in MODULES:
                known = ", ".join(MODULES)
                raise ValueError(f"'train': {prefix!r} is in none of the modules {known}{nearest(prefix, MODULES)}")
        if self.kind == "multimodal":
            if not self.train:
                raise ValueError("a multimodal stage needs 'train': a learning rate for each module that trains")
            return self
        if self.train or self.upcycle:
            raise ValueError(f"'train' and 'upcycle' belong to multimodal stages; a {self.kind} stage trains one model")
        only_multimodal = {
            "independent_turns": self.independent_turns,
            "resize_mode": self.resize_mode is not None,
            "packing": self.packing,
            "group_by": self.group_by != "none",
            "expert_parallel_size": self.expert_parallel_size > 1,
            "lora": self.lora is not None,
            "sample_generations": self.sample_generations > 0,
            "cache_features": self.cache_features,
            "gradient_checkpointing: [...]": not isinstance(self.gradient_checkpointing, bool),
        }
        for name, is_set in only_multimodal.items():
            if is_set:
                raise ValueError(f"{name!r} belongs to multimodal stages")
        if self.kind == "contrastive" and self.engine not in ("auto", "ddp"):
            # CLIP's temperature; neither PyTorch's nor DeepSpeed's sharding takes a parameter without dimensions.
            raise ValueError(f"'engine: {self.engine}' cannot share out a contrastive stage, only auto and ddp can")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> StageConfig:
        if self.cache_features and any(name.startswith("vision_tower") for name in self.train):
            raise ValueError("'cache_features' needs a multimodal stage in which the vision tower is frozen")
        if self.packing and self.group_by != "none":
            raise ValueError(f"'packing' makes rows of equal length; 'group_by: {self.group_by}' has nothing to group")
        if self.packing and self.independent_turns:
            raise ValueError("'packing' and 'independent_turns' exclude each other: set one of them to false")
        if self.lora is not None and not any(name.split(".")[0] == "language_model" for name in self.train):
            raise ValueError("'lora' adapts the language model; give it a learning rate in 'train'")
        if self.global_batch_size is not None and self.gradient_accumulation_steps != 1:
            raise ValueError(
                "'global_batch_size' says how many micro-batches are accumulated; leave out "
                "'gradient_accumulation_steps'"
            )
        return self

    @model_validator(mode="after")
    def _fits_its_engine(self) -> StageConfig:
        if self.engine.startswith(("zero3", "fsdp2")):
            for name, is_set in (("ema_decay", self.ema_decay), ("sample_generations", self.sample_generations)):
                if is_set:
                    raise ValueError(
                        f"{name!r} needs whole weights in every process; 'engine: {self.engine}' has parts"
                    )
        if self.expert_parallel_size > 1:
            if self.engine not in ("auto", "ddp"):
                raise ValueError(f"'expert_parallel_size' works beside DDP alone, not beside 'engine: {self.engine}'")
            for name in ("ema_decay", "sample_generations", "lora", "compile"):
                if getattr(self, name):
                    raise ValueError(f"{name!r} and 'expert_parallel_size' exclude each other")
        return self
