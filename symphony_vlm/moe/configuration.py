"""Every setting of a mixture-of-experts layer and of its router, and the named presets. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from symphony_vlm.errors import InputError
from symphony_vlm.text import nearest

__all__ = ["PRESETS", "MoEConfig"]

PRESETS: dict[str, dict[str, Any]] = {
    "smoe": {"gate": "linear", "expert_graph": "none"},
    "xmoe": {"gate": "cosine", "expert_graph": "none"},
    "glam": {"gate": "linear", "expert_graph": "none", "layers": "alternate"},
    "symphony_smoe": {"gate": "linear", "expert_graph": "symphony"},
    "symphony_xmoe": {"gate": "cosine", "expert_graph": "symphony"},
    "symphony_glam": {"gate": "linear", "expert_graph": "symphony", "layers": "alternate"},
    "similarity_smoe": {"gate": "linear", "expert_graph": "none", "token_graph": "similarity"},
    "attention_smoe": {"gate": "linear", "expert_graph": "none", "token_graph": "attention"},
}
"""Router presets: one line of composition each. Symphony is its baseline plus a graph of the experts. Routers of your
own join with `symphony_vlm.moe.router.register_router`."""

PARTS: dict[str, Any] = {"gate": "linear", "expert_graph": "none", "token_graph": "none", "layers": "all"}
"""What a preset may choose, with the value of a part it does not name."""

COUNTED_GRAPHS = ("symphony", "uniform", "random", "shuffled")
"""Kinds of expert graph that move with co-selection counts."""


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Settings of the sparse layers. `router` names a preset; a part set explicitly wins over the preset's.

    Raises:
        InputError: a value is out of range, unknown, or the combination is undefined (e.g. K = 1 with hard counts).
    """

    num_experts: int = 4
    num_experts_per_tok: int = 2
    router: str = "symphony_smoe"

    gate: Literal["linear", "cosine"] | None = None
    """How a token becomes logits: ``linear`` (SMoE, GLaM) or ``cosine`` (XMoE). None: as the preset says."""
    cosine_dim: int | None = None
    """Size of the cosine gate's routing space. None: the larger of 8 and num_experts // 2."""
    cosine_temperature: float = 0.3
    """What the cosine gate divides by; its first value where it is learnt."""
    cosine_learnable_temperature: bool = False
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become gate values."""
    renormalize: bool = True
    """Whether the K chosen gate values are divided by their sum. Needed for exact upcycling."""
    jitter_noise: float = 0.0
    """Half width of the uniform factor on the router's input in training (Switch Transformer, arXiv 2101.03961)."""

    expert_graph: Literal["none", "symphony", "learnable", "fixed", "uniform", "random", "shuffled"] | None = None
    """``symphony`` moves with the co-selection counts, ``learnable`` is trained by gradient, ``fixed`` stays what
    `set_expert_graph_` made it. Negative controls: ``uniform``, ``random`` and ``shuffled`` move as ``symphony`` does,
    with counts that have lost what they say (`expert_graph.ControlGraph`). None: as the preset says."""
    smooth: Literal["probs", "logits"] = "probs"
    """What the graph smooths: gate values, the paper's g_sym_j = sum_k a_jk g_k(x), or the logits before the score."""
    strength: float = 0.5
    """Share of the co-selection graph in the target matrix; the rest is the identity."""
    momentum: float = 0.99
    """Share of the old graph kept at each optimizer step."""
    normalization: Literal["row", "symmetric", "sinkhorn", "frequency"] = "row"
    counts: Literal["hard", "soft"] = "hard"
    """Co-selection of the chosen sets (one-hot), or of the top-K weights (top two if K is 1)."""
    diagonal: Literal["drop", "keep"] = "drop"
    """Whether an expert's count with itself enters the normalisation."""
    applies_to: Literal["both", "selection", "weights"] = "both"
    """Whether the smoothed values choose the experts, weigh them, or both."""
    active: Literal["always", "train", "eval"] = "always"
    """When the expert graph takes part. ``eval`` is Symphony after the fact: counted in training, used afterwards."""

    token_graph: Literal["none", "similarity", "attention"] | None = None
    """Whose gate values a token's routing listens to besides its own (arXiv 2505.00792). None: as the preset says."""
    token_graph_temperature: float = 0.1
    """Temperature of ``similarity``: small, a token listens to its likes; large, to all."""
    token_graph_dim: int | None = None
    """Rank of the ``similarity`` matrix W_s, and the numbers per token that a KV cache holds for it. None: full."""

    layers: Literal["all", "alternate"] | tuple[int, ...] | None = None
    """Which decoder layers become sparse. ``alternate`` is 0, 2, 4, ... None: as the preset says, else all. With
    ``vision`` among the `modules` the same choice is made among the vision tower's blocks."""
    modules: tuple[Literal["language", "projector", "vision"], ...] = ("language",)
    """Which parts of a vision-language model get experts (CuMo, arXiv 2405.05949, has them in all three)."""
    shared_expert: bool = False
    """Whether every token also passes a dense copy, weighted by a sigmoid gate that starts at 1/2 (Qwen2-MoE)."""
    expert_split: int = 1
    """Slices of a feed-forward that become separate, narrower experts (fine-grained experts, arXiv 2410.07524): E
    experts are E / expert_split copies. Must divide E and K, or no choice of K slices adds up to whole layers."""
    expert_init_noise: float = 0.0
    """Standard deviation of the noise added to each expert's copy, relative to the dense weights' own."""

    experts_implementation: Literal["auto", "segments", "fused", "grouped_mm", "batched_mm", "deepgemm", "sonicmoe"] = (
        "auto"
    )
    """How experts are computed; ``auto`` chooses by device and shape, see `experts.Experts`."""

    balance_loss_weight: float = 0.01
    z_loss_weight: float = 0.001

    def __post_init__(self) -> None:
        if self.router not in PRESETS:
            raise InputError(
                f"{self.router!r} is not a router preset{nearest(self.router, PRESETS)}",
                where="moe.router",
                remedy=f"Use one of {', '.join(PRESETS)}; a router of your own is there once the module that registers "
                "it has been imported (for commands: SYMPHONY_VLM_PLUGINS=FILE.py).",
            )
        defaults = {**PARTS, **PRESETS[self.router]}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        if isinstance(self.modules, (str, list)):
            modules = [self.modules] if isinstance(self.modules, str) else self.modules
            object.__setattr__(self, "modules", tuple(modules))
        self._check_choices()
        self._check_types()
        self._check_ranges()
        self._check_combinations()

    def _check_choices(self) -> None:
        for field in dataclasses.fields(self):
            choices = _CHOICES.get(field.name)
            value = getattr(self, field.name)
            if choices and isinstance(value, str) and value not in choices:
                raise InputError(
                    f"{value!r} is not one of {', '.join(choices)}{nearest(value, choices)}", where=f"moe.{field.name}"
                )

    def _check_types(self) -> None:
        for name, (kinds, requirement) in _NUMBERS.items():
            value = getattr(self, name)
            _require(isinstance(value, kinds) and not isinstance(value, bool), name, value, requirement)
        for name in _SWITCHES:
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        for name in ("cosine_dim", "token_graph_dim"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            _require(value is None or (whole and value >= 1), name, value, "a whole number of at least 1")

    def _check_ranges(self) -> None:
        _require(self.num_experts >= 1, "num_experts", self.num_experts, "at least 1")
        _require(
            1 <= self.num_experts_per_tok <= self.num_experts,
            "num_experts_per_tok",
            self.num_experts_per_tok,
            f"from 1 to num_experts ({self.num_experts})",
        )
        known = _CHOICES["modules"]
        good = isinstance(self.modules, tuple) and all(module in known for module in self.modules)
        good = good and 0 < len(set(self.modules)) == len(self.modules)
        _require(good, "modules", self.modules, f"one or more of {', '.join(known)}, each once")
        _require(self.expert_split >= 1, "expert_split", self.expert_split, "at least 1")
        for name in ("num_experts", "num_experts_per_tok"):
            whole = getattr(self, name) % self.expert_split == 0
            _require(whole, name, getattr(self, name), f"a multiple of expert_split ({self.expert_split})")
        for name in ("strength", "momentum"):
            _require(0.0 <= getattr(self, name) <= 1.0, name, getattr(self, name), "in [0, 1]")
        for name in ("jitter_noise", "expert_init_noise", "balance_loss_weight", "z_loss_weight"):
            _require(getattr(self, name) >= 0.0, name, getattr(self, name), "0 or more")
        for name in ("cosine_temperature", "token_graph_temperature"):
            _require(getattr(self, name) > 0.0, name, getattr(self, name), "above 0")
        if isinstance(self.layers, tuple):
            distinct = 0 < len(set(self.layers)) == len(self.layers)
            good = distinct and all(isinstance(i, int) and i >= 0 for i in self.layers)
            _require(good, "layers", self.layers, "one or more distinct layer indices counted from 0")

    def _check_combinations(self) -> None:
        if self.expert_graph in COUNTED_GRAPHS and self.num_experts_per_tok == 1 and self.counts == "hard":
            raise InputError(
                "with num_experts_per_tok=1 no two experts are ever selected together, so hard co-selection counts "
                "are diagonal and the graph stays the identity",
                where="moe.counts",
                remedy="Set counts: soft (it counts the top two gate values), or num_experts_per_tok >= 2.",
            )
        if self.token_graph != "none" and self.modules != ("language",):
            raise InputError(
                f"{self.token_graph!r} asks which tokens come earlier, and the features of a picture have no order",
                where="moe.token_graph",
                remedy="Use a router without token graph, or modules: [language].",
            )
        if self.expert_graph == "learnable":
            self._check_that_the_graph_can_learn()

    def _check_that_the_graph_can_learn(self) -> None:
        """A learnable graph gets its gradient through the experts' weights in training, and from nowhere else."""
        constant_weights = self.num_experts_per_tok == 1 and self.num_experts > 1 and self.renormalize
        for name, without_gradient, remedy in (
            ("applies_to", self.applies_to == "selection", "Set applies_to: both or weights."),
            ("active", self.active == "eval", "Set active: always or train."),
            ("num_experts_per_tok", constant_weights, "Set renormalize: false, or num_experts_per_tok >= 2."),
        ):
            if without_gradient:
                value = getattr(self, name)
                raise InputError(
                    f"with {value!r} no gradient reaches a learnable graph", where=f"moe.{name}", remedy=remedy
                )

    def sparse_layers(self, num_layers: int) -> tuple[int, ...]:
        """Indices of the decoder layers that become sparse, out of ``num_layers``."""
        if self.layers == "all":
            return tuple(range(num_layers))
        if self.layers == "alternate":
            return tuple(range(0, num_layers, 2))
        assert isinstance(self.layers, tuple)
        _require(max(self.layers, default=0) < num_layers, "layers", self.layers, f"below the {num_layers} layers")
        return tuple(sorted(self.layers))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping; `from_dict` restores an equal object."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoEConfig:
        """Builds the settings from a mapping; an unknown key is an `InputError` that names the nearest valid one."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise InputError(f"unknown setting {key!r}{nearest(key, known)}", where="moe")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)


def _require(good: bool, name: str, value: object, requirement: str) -> None:
    if not good:
        raise InputError(f"{value!r} must be {requirement}", where=f"moe.{name}")


def _choices_of(annotation: Any) -> tuple[str, ...]:
    """The strings that a ``Literal[...]`` (alone or in a union) allows."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for part in get_args(annotation) for choice in _choices_of(part) if isinstance(choice, str))


def _literal_fields(cls: type) -> dict[str, tuple[str, ...]]:
    from typing import get_type_hints

    hints = get_type_hints(cls)
    return {name: choices for name, hint in hints.items() if (choices := _choices_of(hint))}


_CHOICES = _literal_fields(MoEConfig)

_NUMBERS: dict[str, tuple[tuple[type, ...], str]] = {
    field.name: ((int,), "a whole number") if field.type == "int" else ((int, float), "a number")
    for field in dataclasses.fields(MoEConfig)
    if field.type in ("int", "float")
}
_SWITCHES = [field.name for field in dataclasses.fields(MoEConfig) if field.type == "bool"]
