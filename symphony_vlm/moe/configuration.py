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
    "symphony_smoe": {"gate": "linear", "expert_graph": "symphony"},
    "glam": {"gate": "linear", "expert_graph": "none", "layers": "alternate"},
    "symphony_glam": {"gate": "linear", "expert_graph": "symphony", "layers": "alternate"},
}
"""Router presets: one line of composition each. Symphony is its baseline plus a graph of the experts."""


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Settings of the sparse layers. `router` names a preset; a part set explicitly wins over the preset's.

    Raises:
        InputError: a value is out of range, unknown, or the combination is undefined (e.g. K = 1 with hard counts).
    """

    num_experts: int = 4
    num_experts_per_tok: int = 2
    router: str = "symphony_smoe"

    gate: Literal["linear"] | None = None
    """How a token becomes logits: ``linear`` (SMoE, GLaM). None: as the preset says."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become gate values."""
    renormalize: bool = True
    """Whether the K chosen gate values are divided by their sum. Needed for exact upcycling."""
    jitter_noise: float = 0.0
    """Half width of the uniform factor on the router's input in training (Switch Transformer, arXiv 2101.03961)."""

    expert_graph: Literal["none", "symphony"] | None = None
    """None: as the preset says."""
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
    active: Literal["always", "train", "eval"] = "always"

    layers: Literal["all", "alternate"] | tuple[int, ...] | None = None
    """Which decoder layers become sparse. ``alternate`` is 0, 2, 4, ... None: as the preset says, else all."""
    expert_init_noise: float = 0.0
    """Standard deviation of the noise added to each expert's copy, relative to the dense weights' own."""

    balance_loss_weight: float = 0.01
    z_loss_weight: float = 0.001

    def __post_init__(self) -> None:
        if self.router not in PRESETS:
            raise InputError(
                f"{self.router!r} is not a router preset{nearest(self.router, PRESETS)}",
                where="moe.router",
                remedy=f"Use one of {', '.join(PRESETS)}.",
            )
        defaults = {"layers": "all", **PRESETS[self.router]}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        self._check_choices()
        self._check_types()
        self._check_ranges()

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
        _require(isinstance(self.renormalize, bool), "renormalize", self.renormalize, "true or false")

    def _check_ranges(self) -> None:
        _require(self.num_experts >= 1, "num_experts", self.num_experts, "at least 1")
        _require(
            1 <= self.num_experts_per_tok <= self.num_experts,
            "num_experts_per_tok",
            self.num_experts_per_tok,
            f"from 1 to num_experts ({self.num_experts})",
        )
        for name in ("strength", "momentum"):
            _require(0.0 <= getattr(self, name) <= 1.0, name, getattr(self, name), "in [0, 1]")
        for name in ("jitter_noise", "expert_init_noise", "balance_loss_weight", "z_loss_weight"):
            _require(getattr(self, name) >= 0.0, name, getattr(self, name), "0 or more")
        if isinstance(self.layers, tuple):
            distinct = 0 < len(set(self.layers)) == len(self.layers)
            good = distinct and all(isinstance(i, int) and i >= 0 for i in self.layers)
            _require(good, "layers", self.layers, "one or more distinct layer indices counted from 0")
        if self.expert_graph == "symphony" and self.num_experts_per_tok == 1 and self.counts == "hard":
            raise InputError(
                "with num_experts_per_tok=1 no two experts are ever selected together, so hard co-selection counts "
                "are diagonal and the graph stays the identity",
                where="moe.counts",
                remedy="Set counts: soft (it counts the top two gate values), or num_experts_per_tok >= 2.",
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
