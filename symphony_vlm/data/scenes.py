"""The built-in data set: generated pictures of a few shapes, with questions, answers and captions.

It needs no download and trains on a small computer, so that every command can be tried from end to end. Some pairs of
colour and shape occur only in the test split; they show whether a model learned the parts or memorised the pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL

from symphony_vlm.data.scene_drawing import (
    COLORS,
    HELD_OUT_PAIRS,
    MAX_JITTER,
    POSITIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Background,
    Rgb,
    Scene,
    SceneNumber,
    SceneObject,
    draw_scene,
)
from symphony_vlm.data.scene_questions import QUESTION_TYPES, Question, caption, questions
from symphony_vlm.errors import InputError

__all__ = [
    "HELD_OUT_PAIRS",
    "QUESTION_TYPES",
    "Question",
    "Scene",
    "SceneNumber",
    "SceneObject",
    "ScenesSummary",
    "caption",
    "draw_scene",
    "generate_scenes",
    "questions",
    "sample_scene",
]

T = TypeVar("T")
Record = dict[str, Any]

GENERATOR_VERSION = 3
"""Raise it with every change that alters a picture or a record for equal arguments."""

MANIFEST = "manifest.json"
PARTIAL_MANIFEST = "manifest.json.partial"
SPLITS = ("train", "test")
MAX_QUESTIONS = 12
MIN_IMAGE_SIZE = 32
HELD_OUT_SHARE = 1 / 4
ITEM_COUNT_SHARES = (0.7, 0.22, 0.08)
NUMBER_SHARE = 0.7
REPEAT_SHARE = 0.3
CAPTION_PROMPT = "Describe the image."

BACKGROUND_KINDS = ("flat", "gradient", "noise", "stripes")
BACKGROUND_TONES: tuple[Rgb, ...] = (
    (150, 170, 185),
    (168, 180, 158),
    (190, 172, 158),
    (178, 165, 188),
    (160, 160, 160),
    (185, 182, 165),
    (146, 172, 170),
    (192, 168, 172),
)
"""Muted and of middle lightness, so that black and white both stand out."""


@dataclass(frozen=True, kw_only=True)
class ScenesSummary:
    """What ``generate_scenes`` wrote.

    Args:
        output: The folder; image paths in the records are relative to it.
        train_images: Pictures (and records) of the training split.
        test_images: Pictures of the test split.
        train_questions: Question and answer turns of the training split.
        test_questions: Records of the test split, one per question.
        held_out_images: Test pictures with a colour and shape pair that training never shows.
        sha256: Digest of the four record files.
    """

    output: Path
    train_images: int
    test_images: int
    train_questions: int
    test_questions: int
    held_out_images: int
    sha256: str

    @property
    def train_json(self) -> Path:
        """Conversations of the training split."""
        return self.output / "train.json"

    @property
    def test_json(self) -> Path:
        """Single questions of the test split."""
        return self.output / "test.json"

    @property
    def captions_train_json(self) -> Path:
        """Captions of the training pictures."""
        return self.output / "captions_train.json"

    @property
    def captions_test_json(self) -> Path:
        """Captions of the test pictures."""
        return self.output / "captions_test.json"

    @property
    def manifest_json(self) -> Path:
        """Arguments, counts, versions and digest; written last."""
        return self.output / MANIFEST


def generate_scenes(
    output: Path,
    *,
    train: int,
    test: int,
    seed: int = 0,
    image_size: int = 64,
    questions_per_image: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> ScenesSummary:
    """Writes the data set, or returns at once if the folder already holds the same one.

    Equal arguments give the same bytes with the same version of Pillow. Picture ``i`` of a split depends on the seed
    and ``i``, not on how many pictures there are. A generation that was interrupted is started again from the
    beginning by the next call with the same arguments.

    Args:
        output: Folder to write to; created if needed.
        train: Number of training pictures.
        test: Number of test pictures.
        seed: Not negative.
        image_size: Width and height in pixels, at least 32.
        questions_per_image: Distinct questions about each picture, 1 to 12.
        progress: Called after each picture with the number done and the total.

    Raises:
        InputError: An argument is out of range, or the folder holds something else.
    """
    arguments = {
        "train": train,
        "test": test,
        "seed": seed,
        "image_size": image_size,
        "questions_per_image": questions_per_image,
    }
    _check_arguments(arguments)
    output = Path(output)
    plan: Record = {"generator": "scenes", "version": GENERATOR_VERSION, "arguments": arguments}
    finished = _read_finished(output, plan)
    if finished is not None:
        return _summary(output, finished)
    # The partial manifest comes first, so that an interrupted folder is recognised as ours, and the real one last.
    partial = output / PARTIAL_MANIFEST
    output.mkdir(parents=True, exist_ok=True)
    _write_atomically(partial, plan)
    for split in SPLITS:
        (output / "images" / split).mkdir(parents=True, exist_ok=True)
    digest, counts = _write_splits(output, arguments, progress)
    manifest = {**plan, "pillow": PIL.__version__, "counts": counts, "sha256": digest}
    _write_atomically(partial, manifest)
    partial.replace(output / MANIFEST)
    return _summary(output, manifest)


def sample_scene(rng: np.random.Generator, split: str) -> Scene:
    """Draws a scene.

    Args:
        rng: Source of every choice.
        split: ``"train"`` (no held-out pair of colour and shape) or ``"test"`` (a held-out pair in one scene of four).
    """
    total = 1 + _pick_weighted(rng, ITEM_COUNT_SHARES)
    with_number = total > 1 and rng.random() < NUMBER_SHARE
    held_out = split == "test" and rng.random() < HELD_OUT_SHARE
    looks = _sample_looks(rng, total - with_number, held_out)
    positions = _shuffled(rng, _pick(rng, LAYOUTS[total]))
    items: list[SceneObject | SceneNumber] = [
        SceneObject(
            color=color,
            shape=shape,
            size=size,
            texture=texture,
            position=position,
            jitter=_sample_jitter(rng),
            angle=int(rng.integers(-10, 11)),
        )
        for (color, shape, size, texture), position in zip(looks, positions, strict=False)
    ]
    if with_number:
        value, tile = int(rng.integers(10)), bool(rng.integers(2))
        items.append(SceneNumber(value=value, position=positions[-1], jitter=_sample_jitter(rng), tile=tile))
    return Scene(items=tuple(_shuffled(rng, items)), background=_sample_background(rng))


def _disjoint_layouts(count: int) -> tuple[tuple[str, ...], ...]:
    """Returns every set of positions whose cells do not overlap."""

    def apart(one: str, other: str) -> bool:
        return any(abs(a - b) >= 2 for a, b in zip(POSITIONS[one], POSITIONS[other], strict=True))

    return tuple(
        layout for layout in combinations(POSITIONS, count) if all(apart(*pair) for pair in combinations(layout, 2))
    )


LAYOUTS = {count: _disjoint_layouts(count) for count in (1, 2, 3)}
SEEN_PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT_PAIRS)
UNSEEN_PAIRS = tuple(sorted(HELD_OUT_PAIRS))


def _sample_looks(rng: np.random.Generator, count: int, held_out: bool) -> list[tuple[str, str, str, str]]:
    """Draws different combinations of colour, shape, size and texture.

    Some scenes repeat a colour or a shape, or counting would nearly always give 0 or 1.
    """
    color, shape = _pick(rng, UNSEEN_PAIRS if held_out else SEEN_PAIRS)
    looks = [(color, shape, _pick(rng, SIZES), _pick(rng, TEXTURES))]
    draw = rng.random()
    repeated: Sequence[tuple[str, str]] = SEEN_PAIRS
    if draw < 2 * REPEAT_SHARE:
        repeated = [pair for pair in SEEN_PAIRS if (pair[0] == color if draw < REPEAT_SHARE else pair[1] == shape)]
    while len(looks) < count:
        pair = _pick(rng, repeated if rng.random() < 0.75 else SEEN_PAIRS)
        look = (*pair, _pick(rng, SIZES), _pick(rng, TEXTURES))
        if look not in looks:  # Two alike could not be told apart in a question.
            looks.append(look)
    return looks


def _sample_jitter(rng: np.random.Generator) -> tuple[float, float]:
    x, y = rng.integers(-100, 101, 2)
    return int(x) * MAX_JITTER / 100, int(y) * MAX_JITTER / 100


def _sample_background(rng: np.random.Generator) -> Background:
    first, second = _shuffled(rng, BACKGROUND_TONES)[:2]
    return Background(kind=_pick(rng, BACKGROUND_KINDS), first=first, second=second, seed=int(rng.integers(2**31)))


def _check_arguments(arguments: dict[str, int]) -> None:
    limits: dict[str, tuple[int, int | None]] = {
        "train": (1, None),
        "test": (1, None),
        "seed": (0, None),
        "image_size": (MIN_IMAGE_SIZE, None),
        "questions_per_image": (1, MAX_QUESTIONS),
    }
    for name, (low, high) in limits.items():
        value = arguments[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            allowed = f"at least {low}" if high is None else f"from {low} to {high}"
            raise InputError(f"{value!r} is not a whole number {allowed}", where=name)


def _read_finished(output: Path, plan: Record) -> Record | None:
    """Returns the manifest of an equal, finished data set; None where there is none and writing is safe."""
    for name in (MANIFEST, PARTIAL_MANIFEST):
        path = output / name
        if not path.is_file():
            continue
        found = _read_manifest(path)
        different = [key for key in plan if found.get(key) != plan[key]]
        if different:
            has = ", ".join(f"{key} {found.get(key)}" for key in different)
            wants = ", ".join(f"{key} {plan[key]}" for key in different)
            raise InputError(
                f"the folder holds another data set ({has}; asked for {wants})",
                where=str(path),
                remedy="Choose another folder, or delete this one",
            )
        return found if name == MANIFEST else None
    own = f"{PARTIAL_MANIFEST}.tmp"  # All that an interruption in the first instant can leave behind.
    if output.exists() and (not output.is_dir() or any(path.name != own for path in output.iterdir())):
        raise InputError(
            "it exists and is not a folder made by this generator", where=str(output), remedy="Choose a new folder"
        )
    return None


def _read_manifest(path: Path) -> Record:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError("not a manifest of this generator", where=str(path), remedy="Choose another folder")
    return found


def _write_splits(
    output: Path, arguments: dict[str, int], progress: Callable[[int, int], None] | None
) -> tuple[str, dict[str, int]]:
    """Writes pictures and record files; returns the digest of the record files, and counts."""
    records: dict[str, list[Record]] = {"train": [], "test": [], "captions_train": [], "captions_test": []}
    total, done = arguments["train"] + arguments["test"], 0
    for split in SPLITS:
        for index in range(arguments[split]):
            scene, asked = _make_example(arguments["seed"], split, index, arguments["questions_per_image"])
            image = f"images/{split}/{index:06d}.png"
            draw_scene(scene, arguments["image_size"]).save(output / image, compress_level=4)
            name = f"scenes-{split}-{index:06d}"
            if split == "train":
                records["train"].append(_conversation(name, image, [(q.question, q.answer) for q in asked]))
            else:
                records["test"].extend(_test_records(name, image, scene, asked))
            captioned = _conversation(name, image, [(CAPTION_PROMPT, caption(scene))])
            records[f"captions_{split}"].append(captioned)
            done += 1
            if progress is not None:
                progress(done, total)
    counts = {
        "train_images": arguments["train"],
        "test_images": arguments["test"],
        "train_questions": arguments["train"] * arguments["questions_per_image"],
        "test_questions": len(records["test"]),
        "held_out_images": len({record["image"] for record in records["test"] if record["held_out"]}),
    }
    return _write_records(output, records), counts


def _make_example(seed: int, split: str, index: int, count: int) -> tuple[Scene, list[Question]]:
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = sample_scene(rng, split)
    asked = questions(scene, rng)[:count]
    assert len(asked) == count, f"{split} scene {index} of seed {seed} allows only {len(asked)} questions"
    return scene, _shuffled(rng, asked)


def _conversation(name: str, image: str, turns: Sequence[tuple[str, str]]) -> Record:
    conversation = []
    for number, (question, answer) in enumerate(turns):
        prefix = "<image>\n" if number == 0 else ""
        conversation.append({"from": "human", "value": f"{prefix}{question}"})
        conversation.append({"from": "gpt", "value": answer})
    return {"id": name, "image": image, "conversations": conversation, "source": "scenes"}


def _test_records(name: str, image: str, scene: Scene, asked: Sequence[Question]) -> list[Record]:
    return [
        {
            **_conversation(f"{name}-{number:02d}", image, [(question.question, question.answer)]),
            "type": question.type,
            "held_out": scene.held_out,
        }
        for number, question in enumerate(asked)
    ]


def _write_records(output: Path, records: dict[str, list[Record]]) -> str:
    digest = hashlib.sha256()
    for name, rows in records.items():
        # One record a line: the file stays readable and two versions can be compared with a line-based tool.
        text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
        (output / f"{name}.json").write_bytes(text.encode())
        digest.update(text.encode())
    return digest.hexdigest()


def _write_atomically(path: Path, content: Record) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes((json.dumps(content, indent=2) + "\n").encode())
    temporary.replace(path)


def _summary(output: Path, manifest: Record) -> ScenesSummary:
    return ScenesSummary(output=output, sha256=manifest["sha256"], **manifest["counts"])


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


def _pick_weighted(rng: np.random.Generator, shares: Sequence[float]) -> int:
    return int(np.searchsorted(np.cumsum(shares)[:-1], rng.random(), side="right"))


def _shuffled(rng: np.random.Generator, values: Sequence[T]) -> list[T]:
    return [values[index] for index in rng.permutation(len(values))]
