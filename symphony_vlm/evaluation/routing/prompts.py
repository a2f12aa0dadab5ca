"""The routing of prompts, as it is recorded, stored and compared.

Shape letters: T tokens of all prompts one after the other, L sparse layers, E experts, K selected experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from numpy.typing import NDArray

from symphony_vlm.evaluation.routing.shards import take_items

__all__ = ["IMAGE", "MODALITIES", "TEXT", "RoutedPrompts"]

MODALITIES = ("image", "text")
IMAGE, TEXT = range(2)

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class RoutedPrompts:
    """What the routers decided about the prompts of some items, padding left out."""

    lengths: Array
    """int ``[I]``, tokens of each item."""
    is_image_T: Array
    """bool; the other tokens are text."""
    selected_TLK: Array
    """Selected experts, best first; uint8, above 256 experts uint16."""
    plain_TLK: Array
    """What would have been selected without the expert graph, on the same hidden states."""
    weights_TLK: Array
    """float16 combination weights."""
    scores_TLE: Array
    """float16 gate values that the selection saw, after the graph where there is one."""
    plain_TLE: Array
    """float16 gate values before the expert graph."""

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.scores_TLE.shape[-1])

    @property
    def num_selected(self) -> int:
        """K."""
        return int(self.selected_TLK.shape[-1])

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.selected_TLK.shape[1])

    def arrays(self) -> dict[str, Array]:
        """By name, for a file."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> RoutedPrompts:
        """The inverse of `arrays`."""
        return cls(**{field.name: arrays[field.name] for field in fields(cls)})

    def take(self, items: Sequence[int]) -> RoutedPrompts:
        """The prompts of some items, in that order."""
        return RoutedPrompts.from_arrays(take_items(self.arrays(), items))
