"""Several sources as one training set: weights, which source a sample came from, and records left out."""

from __future__ import annotations

import random
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symphony_vlm.data.sample import Sample

__all__ = ["MixturePart", "SampleList", "WithoutRecords", "repeated"]


@dataclass(frozen=True, kw_only=True)
class MixturePart:
    """Chosen samples of one source, by index, in order; an index may occur several times."""

    label: str
    """How logs name the source."""
    source: Sequence[Sample]
    indices: Sequence[int]


class SampleList(Sequence[Sample]):
    """Chosen samples of several sources, in order, read when asked for."""

    def __init__(self, parts: Sequence[MixturePart]) -> None:
        self.labels: tuple[str, ...] = tuple(dict.fromkeys(part.label for part in parts))
        """The sources by name."""
        self._sources = [part.source for part in parts]
        self._label_numbers = [self.labels.index(part.label) for part in parts]
        # Two flat arrays: a list of pairs would take ten times the memory, and forked workers would copy it.
        self._parts = array("H")
        self._indices = array("q")
        for number, part in enumerate(parts):
            self._parts.extend([number] * len(part.indices))
            self._indices.extend(part.indices)

    @classmethod
    def join(cls, lists: Sequence[SampleList]) -> SampleList:
        """All samples of several lists, one after the other."""
        return cls([part for samples in lists for part in samples.parts()])

    def with_images(self) -> SampleList:
        """Those that have an image."""
        kept = []
        for part in self.parts():
            has_image = {index: bool(part.source[index].images) for index in set(part.indices)}
            indices = [index for index in part.indices if has_image[index]]
            kept.append(MixturePart(label=part.label, source=part.source, indices=indices))
        return SampleList(kept)

    def parts(self) -> list[MixturePart]:
        """The sources with their chosen indices."""
        chosen: list[list[int]] = [[] for _ in self._sources]
        for part, index in zip(self._parts, self._indices, strict=True):
            chosen[part].append(index)
        return [
            MixturePart(label=self.labels[number], source=source, indices=indices)
            for number, source, indices in zip(self._label_numbers, self._sources, chosen, strict=True)
        ]

    def source_number(self, index: int) -> int:
        """Which of `labels` a sample is from."""
        return self._label_numbers[self._parts[index]]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._sources[self._parts[index]][self._indices[index]]


def repeated(indices: Sequence[int], weight: float, *, seed: int, label: str) -> list[int]:
    """The indices that an epoch sees of a source with a weight.

    Args:
        indices: one source's records.
        weight: 2 gives every index twice, 0.5 a random half, 2.5 every index twice and a random half a third time.
        seed: with `label`, which records the random share has. It is the same in every epoch.
        label: the source's name, so that two sources of the same length draw differently.

    Returns:
        The chosen indices; first the whole copies, then the random share in ascending order of position.
    """
    copies, share = int(weight), weight - int(weight)
    # A string seeds by its SHA-512: the same in every process and Python version.
    chosen = random.Random(f"weight:{seed}:{label}").sample(range(len(indices)), round(share * len(indices)))
    return [*(list(indices) * copies), *(indices[position] for position in sorted(chosen))]


class WithoutRecords(Sequence[Sample]):
    """A source as if some of its records were not there.

    Args:
        source: any source.
        left_out: indices of the records to leave out.
    """

    def __init__(self, source: Sequence[Sample], left_out: Collection[int]) -> None:
        self.path = getattr(source, "path", Path())
        """The source's file."""
        self._source = source
        self.indices = [index for index in range(len(source)) if index not in left_out]
        """The remaining records' indices in the source."""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._source[i] for i in self.indices[index]]
        return self._source[self.indices[index]]
