"""A benchmark of one's own: how many things are in the picture, in a JSON list of id, image, question and count."""

import re

from symphony_vlm.evaluation.item import EvaluationItem, Scored
from symphony_vlm.evaluation.metrics import mean_of
from symphony_vlm.evaluation.rows import read_rows
from symphony_vlm.evaluation.task import Task


def load(data, image_folder, scratch, seed):
    return [
        EvaluationItem(
            id=row.text("id"),
            question=row.text("question") + "\nAnswer with a number.",
            answers=(row.text("count"),),
            images=row.images("image", folder=image_folder or data.parent),
            image_key=row.text("image"),
        )
        for row in read_rows(data)
    ]


def score(prediction, item):
    numbers = re.findall(r"\d+", prediction)
    if not numbers:
        return Scored(score=0.0, parsed="", status="unparsed" if prediction.strip() else "empty")
    return Scored(score=float(numbers[0] == item.answers[0]), parsed=numbers[0])


def near(outcome):
    return float(abs(int(outcome.scored.parsed or -9) - int(outcome.item.answers[0])) <= 1)


def metrics(outcomes):
    return [mean_of("accuracy"), mean_of("within_one", near)]


TASK = Task(name="counting", split="test", load=load, score=score, metrics=metrics)
