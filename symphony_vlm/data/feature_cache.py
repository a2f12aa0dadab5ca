"""Outputs of a frozen vision tower on disk, so that a picture is encoded once and not in every epoch and stage.

Content-addressed twice: a folder per encoder (its weights, configuration and image preparation, see
`training.features`), and inside it a key per picture (sha256 of its encoded bytes). Whatever changes, changes a key;
nothing is ever stale, and nothing is ever overwritten.

Features lie in shards, safetensors files that are read through the memory map. A shard is written beside its place and
renamed, under a name of its own: several processes, or several runs, may fill one folder at once, a kill loses at most
the shard in writing, and two shards with the same picture do no harm.

Shape letters: N pictures in a shard, R rows (one a picture, or one a tile of it), P features per row, C vision hidden
size.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symphony_vlm.errors import InputError

__all__ = ["FeatureCache"]

KEY_BYTES = 32


class FeatureCache:
    """The features of one encoder.

    Args:
        folder: of the encoder; created if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._shards: list[Path] = []
        self._place: dict[bytes, tuple[int, int, int, tuple[int, int]]] = {}
        """Shard, first row, number of rows, and the picture's height and width."""
        self._open: dict[int, Any] = {}
        self.refresh()

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, key: bytes) -> bool:
        return key in self._place

    def __getitem__(self, key: bytes) -> tuple[Tensor, tuple[int, int]]:
        """The features of a picture, ``[R, P, C]``, and its height and width before it was prepared."""
        shard, first, rows, size = self._place[key]
        if shard not in self._open:
            # The file stays open with its map; nothing is read before a slice is asked for.
            self._open[shard] = _open(self._shards[shard]).get_slice("features_RPC")
        features: Tensor = self._open[shard][first : first + rows]
        return features, size

    def add(self, keys: Sequence[bytes], features: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> None:
        """Writes one shard.

        Args:
            keys: sha256 of the pictures' bytes, N of them.
            features: of each picture, ``[rows, P, C]``.
            sizes: height and width of each picture.
        """
        from safetensors.torch import save_file

        assert len(keys) == len(features) == len(sizes) and all(len(key) == KEY_BYTES for key in keys)
        ends = np.cumsum([len(rows) for rows in features])
        tensors = {
            "features_RPC": torch.cat([rows.cpu() for rows in features]).contiguous(),
            "ends_N": torch.from_numpy(ends.astype(np.int64)),
            "sizes_N2": torch.tensor(sizes, dtype=torch.int64).view(-1, 2),
            "keys_N": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), KEY_BYTES),
        }
        name = f"{uuid.uuid4().hex}.safetensors"
        temporary = self.folder / f".{name}.tmp"
        save_file(tensors, temporary)
        temporary.rename(self.folder / name)
        self._index(self.folder / name)

    def refresh(self) -> None:
        """Takes up the shards that other processes have written."""
        known = set(self._shards)
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in known:
                self._index(path)

    def __getstate__(self) -> dict[str, Any]:
        # A data loader's worker opens the files itself.
        return self.__dict__ | {"_open": {}}

    def _index(self, path: Path) -> None:
        file = _open(path)
        keys_N = file.get_tensor("keys_N").numpy()
        ends = file.get_tensor("ends_N").tolist()
        sizes = file.get_tensor("sizes_N2").tolist()
        number = len(self._shards)
        self._shards.append(path)
        for row, first, end, (height, width) in zip(keys_N, [0, *ends[:-1]], ends, sizes, strict=True):
            self._place.setdefault(row.tobytes(), (number, first, end - first, (height, width)))


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"is not a shard of features ({error})",
            where=str(path),
            remedy="Remove the file; its pictures are encoded again.",
        ) from error
