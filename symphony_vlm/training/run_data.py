"""The data of a run: opened, checked record by record, and split into training and validation once for all stages."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symphony_vlm.config.recipe import DataConfig, Recipe, StageConfig
from symphony_vlm.data.datasets import SampleSource, open_samples
from symphony_vlm.data.images import image_bytes, image_key
from symphony_vlm.data.preflight import check_samples
from symphony_vlm.data.sample import ImagePart, ImageRef, Sample
from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.data.split import split_by_image
from symphony_vlm.errors import InputError
from symphony_vlm.files import write_text

__all__ = ["RunData", "SampleList", "open_run_data"]

Report = Callable[[str], None]
MAX_VALIDATION_RECORDS = 2000
"""More than this adds little to the precision of a loss and a lot to its time."""


class SampleList(Sequence[Sample]):
    """Chosen samples of several sources, in order, read when asked for."""

    def __init__(self, parts: Sequence[tuple[SampleSource, Sequence[int]]]) -> None:
        self._where = [(source, index) for source, indices in parts for index in indices]

    @classmethod
    def join(cls, lists: Sequence[SampleList]) -> SampleList:
        """All samples of several lists, one after the other."""
        joined = cls([])
        joined._where = [place for part in lists for place in part._where]
        return joined

    def with_images(self) -> SampleList:
        """Those that have an image."""
        kept = SampleList([])
        kept._where = [(source, index) for source, index in self._where if source[index].images]
        return kept

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        source, position = self._where[index]
        return source[position]


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Training and validation samples by the role they play (``train``, ``captions``)."""

    train: dict[str, SampleList]
    validation: dict[str, SampleList]
    fingerprints: dict[str, str]
    """sha256 of each data file."""
    counts: dict[str, dict[str, int]]
    """By data file: records, images, faults, training and validation records."""

    def get(self, stage: StageConfig) -> tuple[SampleList, SampleList]:
        """(training, validation) samples for a stage."""
        train = [self.train[role] for role in stage.roles]
        validation = [self.validation[role] for role in stage.roles]
        return SampleList.join(train), SampleList.join(validation)


def open_run_data(recipe: Recipe, output: Path, report: Report) -> RunData:
    """Opens every data file that the recipe's stages use, draws scenes if it asks for them, checks and splits.

    Args:
        recipe: its `data` and the stages' roles.
        output: the run's folder; scenes and ``validation.jsonl`` are written there.
        report: gets one line per file.

    Raises:
        InputError: a stage's data is not set, or a file or record cannot be used.
    """
    files = _files(recipe, output, report)
    for stage in recipe.stages:
        for role in stage.roles:
            if role not in files:
                raise InputError(
                    f"stage {stage.name!r} trains on data.{role}, which is not set",
                    where=f"data.{role}",
                    remedy=f"Add data.{role}=FILE (LLaVA JSON, JSONL or parquet).",
                )
    used = {role for stage in recipe.stages for role in stage.roles}
    train: dict[str, SampleList] = {}
    validation: dict[str, SampleList] = {}
    fingerprints: dict[str, str] = {}
    counts: dict[str, dict[str, int]] = {}
    opened = {
        role: [_open_file(path, folder, recipe.data, recipe.seed, report) for path, folder in files[role]]
        for role in sorted(used)
    }
    _keep_held_out([part for parts in opened.values() for part in parts], report)
    for role, parts in opened.items():
        train[role] = SampleList([(part.source, part.train) for part in parts])
        validation[role] = SampleList([(part.source, part.validation) for part in parts])
        fingerprints |= {part.source.path.name: part.source.fingerprint for part in parts}
        counts |= {f"{role}: {part.source.path.name}": part.counts for part in parts}
    if "train" in validation and recipe.data.scenes is None:
        _write_validation(validation["train"], output)
    return RunData(train=train, validation=validation, fingerprints=fingerprints, counts=counts)


@dataclass(frozen=True, kw_only=True)
class _Part:
    source: SampleSource
    train: list[int]
    validation: list[int]
    counts: dict[str, int]


def _keep_held_out(parts: Sequence[_Part], report: Report) -> None:
    """A picture that one file holds out must not be trained on through another file or in another stage."""
    if len(parts) < 2:
        return
    held = {image_key(ref) for part in parts for index in part.validation for ref in part.source[index].images}
    for part in parts:
        kept = [index for index in part.train if not any(image_key(ref) in held for ref in part.source[index].images)]
        if len(kept) < len(part.train):
            report(f"{part.source.path.name}: {len(part.train) - len(kept)} more left out, held out in another file")
            part.train[:] = kept
            part.counts["train"] = len(kept)


def _files(recipe: Recipe, output: Path, report: Report) -> dict[str, list[tuple[Path, Path | None]]]:
    """Data files and their image folders by role."""
    data = recipe.data
    folder = Path(data.image_folder).expanduser() if data.image_folder else None
    files: dict[str, list[tuple[Path, Path | None]]] = {}
    if data.scenes is not None:
        drawn = generate_scenes(output / "scenes", seed=recipe.seed, **data.scenes.model_dump())
        report(f"scenes: {data.scenes.train} training and {data.scenes.test} test pictures in {output / 'scenes'}")
        files["train"] = [(drawn.train_json, None)]
        files["captions"] = [(drawn.captions_train_json, None)]
    for role, value in (("train", data.train), ("captions", data.captions)):
        if value is not None:
            paths = [value] if isinstance(value, str) else value
            files[role] = [(Path(path).expanduser(), folder) for path in paths]
    return files


def _open_file(path: Path, image_folder: Path | None, data: DataConfig, seed: int, report: Report) -> _Part:
    source = open_samples(path, image_folder=image_folder)
    checked = check_samples(
        source, on_bad_sample=data.on_bad_sample, decode_images=data.check_images, max_pixels=data.max_pixels
    )
    train, validation = split_by_image(source, checked.usable, fraction=data.validation_fraction, seed=seed)
    validation = validation[:MAX_VALIDATION_RECORDS]
    counts = {
        "records": checked.n_records,
        "images": checked.n_images,
        "faults": len(checked.faults),
        "train": len(train),
        "validation": len(validation),
    }
    report(
        f"{path.name}: {checked.n_records} records, {checked.n_images} images, {len(checked.faults)} faults; "
        f"{len(train)} to train on, {len(validation)} held out"
    )
    for fault in checked.faults[:5]:
        report(f"  left out: {fault.reason}")
    return _Part(source=source, train=train, validation=validation, counts=counts)


def _write_validation(samples: SampleList, output: Path) -> None:
    """The held-out records as LLaVA JSON lines, ready for ``symphony-vlm eval --data RUN/validation.jsonl``."""
    lines = []
    seen: Counter[str] = Counter()
    for sample in samples:
        # Files without ids number their records, each from 0.
        seen[sample.id] += 1
        unique = sample.id if seen[sample.id] == 1 else f"{sample.id} ({seen[sample.id]})"
        record: dict[str, Any] = {"id": unique, **{k: v for k, v in sample.meta.items() if _is_plain(v)}}
        if sample.images:
            images = [_image_path(ref, output) for ref in sample.images]
            record["image"] = images[0] if len(images) == 1 else images
        record["conversations"] = [
            {
                "from": {"user": "human", "assistant": "gpt", "system": "system"}[message.role],
                "value": "".join("<image>" if isinstance(p, ImagePart) else p.text for p in message.parts),
            }
            for message in sample.messages
        ]
        lines.append(json.dumps(record, ensure_ascii=False))
    write_text(output / "validation.jsonl", "\n".join(lines) + "\n" if lines else "")


def _image_path(ref: ImageRef, output: Path) -> str:
    if ref.path is not None:
        return str(ref.path.resolve())
    import hashlib

    data = image_bytes(ref)
    path = output / "validation_images" / f"{hashlib.sha256(data).hexdigest()[:24]}.img"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(path.relative_to(output))


def _is_plain(value: object) -> bool:
    return isinstance(value, (str, int, float, bool, list))
