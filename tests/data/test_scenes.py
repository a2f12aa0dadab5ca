"""The generated data set: reproducible, well formed, and answerable only from the picture."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops

from symphony_vlm.data import scenes
from symphony_vlm.data.scene_drawing import COLORS, GLYPHS, POSITIONS, SHAPES, SIZES, TEXTURES, Background
from symphony_vlm.data.scenes import (
    HELD_OUT_PAIRS,
    QUESTION_TYPES,
    Question,
    Scene,
    SceneNumber,
    SceneObject,
    caption,
    draw_scene,
    generate_scenes,
    questions,
    sample_scene,
)
from symphony_vlm.errors import InputError

TWO_WAY_TYPES = ("yes_no", "size")
SAMPLE = 2000


@cache
def sample(split: str) -> tuple[tuple[Scene, tuple[Question, ...]], ...]:
    """Scenes with all the questions they allow."""
    examples = []
    for index in range(SAMPLE):
        rng = np.random.default_rng([11, index])
        scene = sample_scene(rng, split)
        examples.append((scene, tuple(questions(scene, rng))))
    return tuple(examples)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("scenes") / "data"
    generate_scenes(output, train=30, test=20, seed=3)
    return output


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))


# --- files -----------------------------------------------------------------------------------------------------------


def test_equal_arguments_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    generate_scenes(tmp_path / "again", train=30, test=20, seed=3)
    assert digests(tmp_path / "again") == digests(folder)


def test_another_seed_gives_other_pictures_and_records(folder: Path, tmp_path: Path) -> None:
    generate_scenes(tmp_path / "other", train=30, test=20, seed=4)
    ours, theirs = digests(folder), digests(tmp_path / "other")
    assert ours.keys() == theirs.keys()
    assert all(ours[name] != theirs[name] for name in ours)


def test_an_image_does_not_depend_on_how_many_there_are(folder: Path, tmp_path: Path) -> None:
    generate_scenes(tmp_path / "few", train=5, test=4, seed=3)
    ours, few = digests(folder), digests(tmp_path / "few")
    assert all(ours[name] == digest for name, digest in few.items() if name.endswith(".png"))
    assert load(folder / "train.json")[:5] == load(tmp_path / "few" / "train.json")
    tests = load(tmp_path / "few" / "test.json")
    assert load(folder / "test.json")[: len(tests)] == tests


def test_counts_and_records(folder: Path) -> None:
    summary = generate_scenes(folder, train=30, test=20, seed=3)
    train, test = load(summary.train_json), load(summary.test_json)
    assert (summary.train_images, summary.test_images) == (len(train), 20) == (30, 20)
    assert (summary.train_questions, summary.test_questions) == (240, len(test)) == (240, 160)
    assert summary.held_out_images == len({record["image"] for record in test if record["held_out"]}) > 0
    assert len({record["id"] for record in train + test}) == 190
    for record in train:
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * 8
        assert turns[0]["value"].startswith("<image>\n")
        assert sum("<image>" in turn["value"] for turn in turns) == 1
        assert len({turn["value"] for turn in turns[::2]}) == 8
        assert record["source"] == "scenes"
    for record in test:
        assert len(record["conversations"]) == 2
        assert record["type"] in QUESTION_TYPES
    assert [record["conversations"][0]["value"] for record in load(summary.captions_test_json)] == [
        "<image>\nDescribe the image."
    ] * 20
    assert len(load(summary.captions_train_json)) == 30
    manifest = json.loads(summary.manifest_json.read_text())
    assert manifest["arguments"]["seed"] == 3
    assert manifest["sha256"] == summary.sha256


@pytest.mark.parametrize("image_size", [32, 45, 96])
def test_every_image_opens_with_the_right_size(tmp_path: Path, image_size: int) -> None:
    summary = generate_scenes(tmp_path / "data", train=6, test=3, image_size=image_size, questions_per_image=1)
    for record in load(summary.train_json) + load(summary.test_json):
        with Image.open(summary.output / record["image"]) as image:
            image.load()
            assert (image.mode, image.size, image.format) == ("RGB", (image_size, image_size), "PNG")


def test_progress_is_reported_and_a_finished_folder_is_not_redrawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    first = generate_scenes(tmp_path / "data", train=3, test=2, progress=lambda *call: calls.append(call))
    assert calls == [(done, 5) for done in range(1, 6)]
    monkeypatch.setattr(scenes, "draw_scene", lambda *_: pytest.fail("drew again"))
    assert generate_scenes(tmp_path / "data", train=3, test=2) == first


def test_an_interrupted_generation_is_not_taken_for_a_finished_one(tmp_path: Path) -> None:
    output = tmp_path / "data"

    def stop(done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_scenes(output, train=4, test=2, progress=stop)
    assert not (output / "manifest.json").exists()
    (output / "images" / "train" / "000001.png").write_bytes(b"half")
    with pytest.raises(InputError, match="another data set"):
        generate_scenes(output, train=5, test=2)
    generate_scenes(output, train=4, test=2)
    generate_scenes(tmp_path / "whole", train=4, test=2)
    assert digests(output) == digests(tmp_path / "whole")


def test_a_folder_with_other_content_is_refused_and_left_alone(folder: Path, tmp_path: Path) -> None:
    before = digests(folder)
    with pytest.raises(InputError, match="another data set.*seed"):
        generate_scenes(folder, train=30, test=20, seed=5)
    assert digests(folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.json").write_text("[]")
    with pytest.raises(InputError, match="not a folder made by this generator"):
        generate_scenes(tmp_path / "mine", train=1, test=1)
    assert (tmp_path / "mine" / "train.json").read_text() == "[]"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError):
        generate_scenes(tmp_path / "file", train=1, test=1)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="not a manifest"):
        generate_scenes(tmp_path / "broken", train=1, test=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train", 0),
        ("test", -1),
        ("seed", -1),
        ("image_size", 31),
        ("questions_per_image", 0),
        ("questions_per_image", 13),
        ("train", 2.0),
        ("test", True),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    arguments: dict[str, Any] = {"train": 1, "test": 1, name: value}
    with pytest.raises(InputError, match=name):
        generate_scenes(tmp_path / "data", **arguments)
    assert not (tmp_path / "data").exists()


# --- scenes and pictures ---------------------------------------------------------------------------------------------


def test_training_never_shows_or_asks_for_a_held_out_pair_but_every_part_of_one() -> None:
    seen = {(item.color, item.shape) for scene, _ in sample("train") for item in scene.objects}
    assert not seen & HELD_OUT_PAIRS
    assert len(seen) == len(COLORS) * len(SHAPES) - len(HELD_OUT_PAIRS)
    assert {color for color, _ in HELD_OUT_PAIRS} <= {color for color, _ in seen} == set(COLORS)
    assert {shape for _, shape in HELD_OUT_PAIRS} <= {shape for _, shape in seen} == set(SHAPES)
    phrases = [f"{color} {shape}" for color, shape in HELD_OUT_PAIRS]
    for scene, asked in sample("train"):
        text = " ".join([caption(scene), *(question.question for question in asked)])
        assert not any(phrase in text for phrase in phrases)


def test_a_fair_share_of_test_scenes_has_a_held_out_pair() -> None:
    assert 0.2 < np.mean([scene.held_out for scene, _ in sample("test")]) < 0.3
    shown = {(item.color, item.shape) for scene, _ in sample("test") for item in scene.objects}
    assert shown >= HELD_OUT_PAIRS


def test_items_never_overlap() -> None:
    plain = Background(kind="flat", first=(255, 0, 255), second=(255, 0, 255))
    empty = Image.new("RGB", (64, 64), plain.first)
    for scene, _ in sample("test")[:200]:
        covered = np.zeros((64, 64), dtype=int)
        for item in scene.items:
            alone = draw_scene(replace(scene, items=(item,), background=plain), 64)
            covered += np.asarray(ImageChops.difference(alone, empty)).max(axis=-1) > 0
            column, row = POSITIONS[item.position]
            inside = np.zeros((64, 64), dtype=bool)
            inside[row * 16 : row * 16 + 32, column * 16 : column * 16 + 32] = True
            drawn = np.asarray(ImageChops.difference(alone, empty)).max(axis=-1) > 0
            assert drawn.sum() > 60
            assert not (drawn & ~inside).any()
        assert covered.max() <= 1


def test_no_item_is_cut_off_by_its_cell() -> None:
    plain = Background(kind="flat", first=(255, 0, 255), second=(255, 0, 255))
    limit = scenes.MAX_JITTER
    items: list[SceneObject | SceneNumber] = [
        SceneObject(
            shape=shape, color="red", size="large", texture="plain", position="center", jitter=(x, y), angle=angle
        )
        for shape in SHAPES
        for x, y in [(limit, limit), (-limit, -limit)]
        for angle in (-10, 10)
    ]
    items += [
        SceneNumber(value=value, position="center", jitter=(x, x), tile=tile)
        for value in GLYPHS
        for x in (limit, -limit)
        for tile in (True, False)
    ]
    for item in items:
        pixels = np.asarray(draw_scene(Scene(items=(item,), background=plain), 256)).astype(int)
        changed = np.abs(pixels - plain.first).max(axis=-1) > 8
        border = np.concatenate([changed[64, 64:192], changed[191, 64:192], changed[64:192, 64], changed[64:192, 191]])
        assert not border.any(), item


def test_scenes_vary() -> None:
    drawn = [scene for scene, _ in sample("train")]
    items = [item for scene in drawn for item in scene.items]
    objects = [item for item in items if isinstance(item, SceneObject)]
    assert {len(scene.items) for scene in drawn} == {1, 2, 3}
    assert {item.position for item in items} == set(POSITIONS)
    assert {item.size for item in objects} == set(SIZES)
    assert {item.texture for item in objects} == set(TEXTURES)
    assert {scene.number.value for scene in drawn if scene.number} == set(range(10))
    assert {scene.background.kind for scene in drawn} == {"flat", "gradient", "noise", "stripes"}
    # Of one shape there are about 1,300 descriptions; backgrounds, offsets and angles differ besides.
    assert len({caption(scene) for scene in drawn}) > 0.7 * len(drawn)


def test_caption_names_every_item_in_order() -> None:
    background = Background(kind="flat", first=(0, 0, 0), second=(0, 0, 0))
    items: tuple[SceneObject | SceneNumber, ...] = (
        SceneObject(shape="circle", color="red", size="large", texture="striped", position="top left"),
        SceneObject(shape="star", color="white", size="small", texture="plain", position="bottom left"),
        SceneNumber(value=7, position="right"),
    )
    assert caption(Scene(items=items, background=background)) == (
        "a large red striped circle at the top left, a small white star at the bottom left"
        " and the number 7 on the right."
    )
    center = replace(items[2], position="center")
    assert caption(Scene(items=(center,), background=background)) == "the number 7 in the center."


# --- questions -------------------------------------------------------------------------------------------------------

WORDS: dict[str, str] = {
    **dict.fromkeys(COLORS, "color"),
    **dict.fromkeys(SHAPES, "shape"),
    **dict.fromkeys(SIZES, "size"),
    **dict.fromkeys(TEXTURES, "texture"),
}
SIDES = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}


def matching(scene: Scene, phrase: str) -> list[SceneObject]:
    """Returns the shapes that a phrase such as "the small red circle" or "dotted shapes" fits."""
    wanted = {}
    for word in phrase.split():
        word = word.removesuffix("s")
        if word in WORDS:
            wanted[WORDS[word]] = word
        else:
            assert word in ("the", "a", "an", "shape", "object"), phrase
    return [item for item in scene.objects if all(getattr(item, name) == word for name, word in wanted.items())]


def answers(scene: Scene, text: str) -> list[str]:
    """Works out every right answer from the words of a question, independently of the generator."""
    if match := re.fullmatch(r"(.+)\nA\. (.+)\nB\. (.+)\nC\. (.+)\nD\. (.+)\nAnswer with the option's letter\.", text):
        stem, *options = match.groups()
        assert len(set(options)) == 4
        return [letter for letter, option in zip("ABCD", options, strict=True) if option in answers(scene, stem)]
    if re.search(r"number is|digit", text):
        return [str(scene.number.value)] if scene.number else []
    if match := re.fullmatch(r"(?:Is there|Can you see|Does the image show) (.+)\?", text):
        return ["yes" if matching(scene, match[1]) else "no"]
    if match := re.fullmatch(r"(?:How many (.+) (?:are there|do you see)\?|Count the (.+)\.)", text):
        return [str(len(matching(scene, match[1] or match[2])))]
    if match := re.fullmatch(r"Is (.+) (?:small or large|large or small)\?", text):
        return [item.size for item in matching(scene, match[1])]
    if match := re.fullmatch(r"Where is (.+)\?|What is the position of (.+)\?|Where can you see (.+)\?", text):
        phrase = next(group for group in match.groups() if group)
        if phrase == "the number":
            return [scene.number.position] if scene.number else []
        return [item.position for item in matching(scene, phrase)]
    if match := re.fullmatch(
        r"(?:What|Which) (shape|color) is (?:the shape )?(left of|right of|above|below) (.+)\?", text
    ):
        asked, side, phrase = match.groups()
        (reference,) = matching(scene, phrase)
        near, far = SIDES[side]
        # Clear cases only: the reference is fully on one side and the answer fully on the other.
        assert far in reference.position
        others = [item for item in scene.objects if item is not reference and far not in item.position]
        assert all(near in item.position for item in others), "half a step off"
        return [getattr(item, asked) for item in others]
    match = re.fullmatch(r"(?:What|Which) (?:is the )?(color|shape|texture) (?:is|of|does) (the .+?)(?: have)?\?", text)
    assert match, text
    return [getattr(item, match[1]) for item in matching(scene, match[2])]


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_question_has_exactly_one_right_answer(split: str) -> None:
    for scene, asked in sample(split)[:1000]:
        for question in asked:
            assert answers(scene, question.question) == [question.answer], (question, scene)


def test_answers_are_single_words_except_corners() -> None:
    corners = {position for position in POSITIONS if " " in position}
    for _, asked in sample("train"):
        for question in asked:
            plain = question.answer in corners or re.fullmatch(r"[a-z]+|\d", question.answer)
            assert plain or (question.type == "multiple_choice" and question.answer in "ABCD")


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_scene_allows_enough_distinct_questions_of_mixed_types(split: str) -> None:
    for scene, asked in sample(split):
        assert len({question.question for question in asked}) == len(asked) >= scenes.MAX_QUESTIONS
        assert len({question.type for question in asked[:5]}) == 5
        assert any(question.type == "number" for question in asked) == (scene.number is not None)


@pytest.mark.parametrize("per_image", [8, 12])
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_cannot_be_guessed_from_the_type(split: str, per_image: int) -> None:
    by_type: dict[str, Counter[str]] = {name: Counter() for name in QUESTION_TYPES}
    for _, asked in sample(split):
        for question in asked[:per_image]:
            by_type[question.type][question.answer] += 1
    for name, counted in by_type.items():
        # Relations need two shapes and come last, so they are the rarest.
        assert counted.total() > 50, name
        best = max(counted.values()) / counted.total()
        # Most scenes have one shape, so most counts are 0 or 1.
        bound = 0.55 if name in TWO_WAY_TYPES else {"count": 0.48, "texture": 0.40}.get(name, 0.35)
        assert best <= bound, (name, counted)
    total = sum(counted.total() for counted in by_type.values())
    assert sum(max(counted.values()) for counted in by_type.values()) / total <= 0.40


def test_answers_cannot_be_guessed_from_the_wording() -> None:
    def key(question: Question) -> str:
        return question.type if question.type == "multiple_choice" else question.question

    known: dict[str, Counter[str]] = defaultdict(Counter)
    for _, asked in sample("train"):
        for question in asked[:8]:
            known[key(question)][question.answer] += 1
            known[question.type][question.answer] += 1
    right = []
    for _, asked in sample("test"):
        for question in asked[:8]:
            best = known.get(key(question), known[question.type]).most_common(1)[0][0]
            right.append(best == question.answer)
    assert np.mean(right) <= 0.40


def test_a_no_question_about_a_pair_mixes_what_the_picture_shows() -> None:
    pairs = 0
    for scene, asked in sample("train")[:500]:
        for question in asked:
            value, shape = question.question.rstrip("?").split()[-2:]
            about_a_pair = value in WORDS and shape in SHAPES
            if question.type == "yes_no" and question.answer == "no" and about_a_pair:
                pairs += 1
                assert any(item.shape == shape or getattr(item, WORDS[value]) == value for item in scene.objects)
    assert pairs > 300
