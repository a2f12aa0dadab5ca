"""Questions, answers and captions of a generated scene.

Questions are chosen so that the text alone says little: yes and no are equally frequent, and a "no" question about a
pair of attributes mixes those that the picture does show; counts are drawn by answer first; the letters of choices are
uniform. An object is named by the shortest description that fits it alone, so every question has one right answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest
from typing import TypeVar

import numpy as np

from symphony_vlm.data.scene_drawing import (
    COLORS,
    HELD_OUT_PAIRS,
    POSITIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    SceneNumber,
    SceneObject,
)

__all__ = ["QUESTION_TYPES", "Question", "caption", "questions"]

T = TypeVar("T")

QUESTION_TYPES = (
    "yes_no",
    "count",
    "color",
    "shape",
    "size",
    "texture",
    "position",
    "relation",
    "multiple_choice",
    "number",
)

VALUES: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "size": SIZES,
    "texture": TEXTURES,
    "position": tuple(POSITIONS),
    "number": tuple("0123456789"),
}

ATTRIBUTE_FORMS: dict[str, tuple[str, ...]] = {
    "color": ("What color is {}?", "Which color is {}?"),
    "shape": ("What shape is {}?", "Which shape is {}?"),
    "size": ("Is {} small or large?",),
    "texture": ("What texture is {}?", "Which texture is {}?"),
    "position": ("Where is {}?",),
}
YES_NO_FORMS = ("Is there {}?", "Can you see {}?")
COUNT_FORMS = ("How many {} are there?", "Count the {}.")
NUMBER_FORMS = ("What number is shown?", "Which number is shown?")
RELATION_FORMS = {
    "shape": ("What shape is {}?", "Which shape is {}?"),
    "color": ("What color is the shape {}?", "Which color is the shape {}?"),
}
CHOICE_ENDING = "Answer with the option's letter."

RARE_SHARE = 0.25
"""How often a scene asks a relation or a choice among its first questions. Both need two steps of reasoning; the other
types are what a small model can learn from a few thousand pictures."""

PAIR_SHARE = 0.2
"""How often a scene's yes/no questions are all about pairs of attributes; otherwise those about one come first."""

DIRECTIONS: dict[str, tuple[int, int]] = {"left of": (-2, 0), "right of": (2, 0), "above": (0, -2), "below": (0, 2)}
"""Column and row steps, in quarters of the picture."""

COUNT_WEIGHTS = {0: 0.8, 1: 0.8, 2: 3.2, 3: 16.0}
"""How eagerly an answer is chosen where a scene allows it; few scenes allow 3, so it weighs most."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a scene; ``answer`` is a word or a digit, or the letter of a choice."""

    type: str
    question: str
    answer: str


def caption(scene: Scene) -> str:
    """Returns one sentence that names every item in the scene's order."""
    parts = [_describe_item(item) for item in scene.items]
    listing = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{listing}."


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Returns distinct questions about a scene; any first part of the list mixes the types.

    Args:
        scene: The scene to ask about.
        rng: Chooses questions, their wording and their order.

    Returns:
        At least 12 questions: at most one of each type in random order, then second ones of each type, and so on.
    """
    by_type: list[Sequence[Question | None]] = [
        _yes_no_questions(scene, rng),
        _count_questions(scene, rng),
        *(_attribute_questions(scene, rng, attribute) for attribute in ATTRIBUTE_FORMS),
        _mostly_later(rng, _relation_questions(scene, rng)),
        _mostly_later(rng, _choice_questions(scene, rng)),
        _number_questions(scene, rng),
    ]
    rounds = zip_longest(*by_type)
    ordered = [question for one in rounds for question in _shuffled(rng, [q for q in one if q is not None])]
    return list({question.question: question for question in ordered}.values())


def _mostly_later(rng: np.random.Generator, found: list[Question]) -> list[Question | None]:
    """Leaves the first round to the other types, except in `RARE_SHARE` of the scenes."""
    return [*found] if rng.random() < RARE_SHARE else [None, *found]


def _describe_item(item: SceneObject | SceneNumber) -> str:
    place = item.position
    where = (
        f"on the {place}"
        if place in ("left", "right")
        else f"in the {place}"
        if place == "center"
        else f"at the {place}"
    )
    if isinstance(item, SceneNumber):
        return f"the number {item.value} {where}"
    texture = "" if item.texture == "plain" else f"{item.texture} "
    return f"a {item.size} {item.color} {texture}{item.shape} {where}"


def _yes_no_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Asks for a colour, a shape or a pair of attributes; each that is there is matched by one that is not."""
    firsts, seconds = _single_yes_no_questions(scene, rng)
    if rng.random() < PAIR_SHARE:
        firsts, seconds = [], []
    for attribute in ("color", "size", "texture"):
        present = sorted({(getattr(item, attribute), item.shape) for item in scene.objects})
        absent = _near_misses(scene, rng, attribute)
        for pair, miss in zip(_shuffled(rng, present), absent, strict=False):
            first, second = _shuffled(rng, [_yes_no(rng, pair, "yes"), _yes_no(rng, miss, "no")])
            firsts.append(first)
            seconds.append(second)
    return [*firsts, *seconds]


def _single_yes_no_questions(scene: Scene, rng: np.random.Generator) -> tuple[list[Question], list[Question]]:
    """Asks for one colour and one shape that are there and for ones that are not."""
    firsts: list[Question] = []
    seconds: list[Question] = []
    for attribute in _shuffled(rng, ("color", "shape")):
        present = {str(getattr(item, attribute)) for item in scene.objects}
        absent = [value for value in VALUES[attribute] if value not in present]
        asked = [(_pick(rng, sorted(present)), "yes"), (_pick(rng, absent), "no")]
        both = [_yes_no(rng, (v, "shape") if attribute == "color" else ("", v), answer) for v, answer in asked]
        first, second = _shuffled(rng, both)
        firsts.append(first)
        seconds.append(second)
    return firsts, seconds


def _near_misses(scene: Scene, rng: np.random.Generator, attribute: str) -> list[tuple[str, str]]:
    """Returns pairs that are not in the scene although a part of each is; half the time both parts are."""
    present = {(getattr(item, attribute), item.shape) for item in scene.objects}
    values, shapes = {value for value, _ in present}, {shape for _, shape in present}
    near: list[tuple[str, str]] = []
    nearest: list[tuple[str, str]] = []
    for value in VALUES[attribute]:
        for shape in SHAPES:
            known = (value in values) + (shape in shapes)
            # A training question about a held-out pair could only have the answer no, which would teach that answer.
            hidden = (value, shape) in HELD_OUT_PAIRS and not scene.held_out
            if known and (value, shape) not in present and not hidden:
                (nearest if known == 2 else near).append((value, shape))
    near, nearest = _shuffled(rng, near), _shuffled(rng, nearest)
    return [*nearest, *near] if rng.integers(2) else [*near, *nearest]


def _yes_no(rng: np.random.Generator, pair: tuple[str, str], answer: str) -> Question:
    name = " ".join(pair).strip()
    article = "an" if name[0] in "aeiou" else "a"
    text = _pick(rng, YES_NO_FORMS).format(f"{article} {name}")
    return Question(type="yes_no", question=text, answer=answer)


def _count_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    nouns_by_count: dict[int, list[str]] = {}
    for noun, count in _countable(scene):
        nouns_by_count.setdefault(count, []).append(noun)
    found: list[Question] = []
    while nouns_by_count and len(found) < 4:
        counts = sorted(nouns_by_count)
        weights = np.array([COUNT_WEIGHTS[count] for count in counts])
        drawn = int(np.searchsorted(np.cumsum(weights), rng.random() * weights.sum(), side="right"))
        count = counts[drawn]
        noun = _pick(rng, nouns_by_count.pop(count))
        text = _pick(rng, COUNT_FORMS).format(noun)
        found.append(Question(type="count", question=text, answer=str(count)))
    return found


def _countable(scene: Scene) -> Iterator[tuple[str, int]]:
    """Yields what can be counted and how many there are."""
    yield "shapes", len(scene.objects)
    for attribute in ("color", "size", "texture"):
        for value in VALUES[attribute]:
            yield f"{value} shapes", sum(getattr(item, attribute) == value for item in scene.objects)
    for shape in SHAPES:
        yield f"{shape}s", sum(item.shape == shape for item in scene.objects)


def _attribute_questions(scene: Scene, rng: np.random.Generator, attribute: str) -> list[Question]:
    return [
        Question(type=attribute, question=_pick(rng, ATTRIBUTE_FORMS[attribute]).format(name), answer=answer)
        for name, answer in _named_values(scene, rng, attribute)
    ]


def _named_values(scene: Scene, rng: np.random.Generator, attribute: str) -> list[tuple[str, str]]:
    """Returns the names of the items that can be named without the attribute, each with the attribute's value."""
    found = []
    for item in scene.objects:
        name = _name(scene, rng, item, without=attribute)
        if name is not None:
            found.append((name, str(getattr(item, attribute))))
    if attribute == "position" and scene.number is not None:
        found.append(("the number", scene.number.position))
    return _shuffled(rng, found)


def _name(scene: Scene, rng: np.random.Generator, item: SceneObject, without: str) -> str | None:
    """Returns a shortest description that fits only this item, or None if there is none."""
    usable = [name for name in ("size", "color", "texture", "shape") if name != without]
    for length in range(1, len(usable) + 1):
        fits = [chosen for chosen in combinations(usable, length) if _is_unique(scene, item, chosen)]
        if fits:
            chosen = _pick(rng, fits)
            words = [str(getattr(item, name)) for name in chosen]
            return f"the {' '.join(words if 'shape' in chosen else [*words, 'object'])}"
    return None


def _is_unique(scene: Scene, item: SceneObject, attributes: Sequence[str]) -> bool:
    return all(
        other is item or any(getattr(other, name) != getattr(item, name) for name in attributes)
        for other in scene.objects
    )


def _relation_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    found = []
    for reference in scene.objects:
        for direction, step in DIRECTIONS.items():
            target = _only_neighbour(scene, reference, step)
            name = _name(scene, rng, reference, without="position") if target is not None else None
            if target is None or name is None:
                continue
            asked = _pick(rng, ("shape", "color"))
            text = _pick(rng, RELATION_FORMS[asked]).format(f"{direction} {name}")
            found.append(Question(type="relation", question=text, answer=str(getattr(target, asked))))
    return _shuffled(rng, found)


def _only_neighbour(scene: Scene, reference: SceneObject, step: tuple[int, int]) -> SceneObject | None:
    """Returns the one shape on that side, or None; a shape only half a step off would leave room for doubt."""
    column, row = POSITIONS[reference.position]
    beyond = []
    for item in scene.objects:
        distance = (POSITIONS[item.position][0] - column) * step[0] + (POSITIONS[item.position][1] - row) * step[1]
        if distance > 0:
            beyond.append((distance, item))
    return beyond[0][1] if len(beyond) == 1 and beyond[0][0] == 4 else None


def _choice_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    attributes = _shuffled(rng, ("color", "shape", "position", "number"))
    stems = [_choice_stem(scene, rng, attribute) for attribute in attributes]
    return [_choice(rng, *stem) for stem in stems if stem is not None]


def _choice_stem(scene: Scene, rng: np.random.Generator, attribute: str) -> tuple[str, str, tuple[str, ...]] | None:
    """Returns a question, its answer and all values the answer could have, or None if the scene does not allow it."""
    if attribute == "number":
        if scene.number is None:
            return None
        return _pick(rng, NUMBER_FORMS), str(scene.number.value), VALUES["number"]
    named = _named_values(scene, rng, attribute)
    if not named:
        return None
    name, answer = named[0]
    return _pick(rng, ATTRIBUTE_FORMS[attribute]).format(name), answer, VALUES[attribute]


def _choice(rng: np.random.Generator, stem: str, answer: str, values: Sequence[str]) -> Question:
    wrong = _shuffled(rng, [value for value in values if value != answer])[:3]
    options = _shuffled(rng, [answer, *wrong])
    lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True)]
    text = "\n".join([stem, *lines, CHOICE_ENDING])
    return Question(type="multiple_choice", question=text, answer="ABCD"[options.index(answer)])


def _number_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    if scene.number is None:
        return []
    return [Question(type="number", question=_pick(rng, NUMBER_FORMS), answer=str(scene.number.value))]


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


def _shuffled(rng: np.random.Generator, values: Sequence[T]) -> list[T]:
    return [values[index] for index in rng.permutation(len(values))]
