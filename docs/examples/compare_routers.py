"""Two routers from one start, on clean and on noisy pictures, compared item by item.

    python docs/examples/compare_routers.py [FOLDER]

Draws pictures of a coloured square, trains a dense model on them, makes two mixtures of experts of it that differ in
the router alone, evaluates both under a corruption, and asks whether one loses less. Half a minute on one CPU core, and
nothing is downloaded. So few pictures and such small models tell nothing about routers; the steps are those of a study.
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image
from rich.console import Console

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.evaluation.compare_report import write_comparison
from symphony_vlm.evaluation.plan import EvaluationPlan
from symphony_vlm.evaluation.sweep import evaluate_models
from symphony_vlm.training.run import train

COLOURS = {
    "red": (190, 70, 70),
    "orange": (200, 130, 70),
    "yellow": (190, 180, 80),
    "green": (80, 160, 90),
    "blue": (80, 100, 190),
    "purple": (150, 80, 170),
}
ROUTERS = ("smoe", "symphony_smoe")
RECIPE = Path(__file__).with_name("colours.yaml")
QUIET = Console(quiet=True)


def draw(folder: Path, count: int, seed: int) -> Path:
    """Pictures of a square on grey, each with a question about its colour."""
    draws = random.Random(seed)
    folder.mkdir(parents=True)
    with (folder / "questions.jsonl").open("w") as file:
        for number in range(count):
            colour = draws.choice(list(COLOURS))
            picture = Image.new("RGB", (32, 32), (draws.randrange(90, 160),) * 3)
            left, top = draws.randrange(16), draws.randrange(16)
            picture.paste(COLOURS[colour], (left, top, left + 16, top + 16))
            picture.save(folder / f"{number}.png")
            record = {"id": str(number), "image": f"{number}.png", "question": "Which colour?", "answer": colour}
            file.write(json.dumps(record) + "\n")
    return folder / "questions.jsonl"


def train_routers(folder: Path, data: Path) -> list[str]:
    """The folders of two sparse models that were one dense model, and saw the same records in the same order."""
    recipe = load_recipe(str(RECIPE), [f"data.train={data}"])
    dense, sparse = recipe.stages
    train(recipe.model_copy(update={"stages": [dense]}), folder / "dense", console=QUIET)
    models = []
    for router in ROUTERS:
        settings = [f"data.train={data}", f"model.start={folder / 'dense/model'}", f"model.moe.router={router}"]
        own = load_recipe(str(RECIPE), settings).model_copy(update={"stages": [sparse]})
        train(own, folder / router, console=QUIET)
        models.append(str(folder / router / "model"))
    return models


def main(folder: Path) -> None:
    models = train_routers(folder, draw(folder / "train", count=300, seed=0))
    plan = EvaluationPlan(
        model=models[0],
        tasks=("short_answer",),
        data=draw(folder / "test", count=80, seed=1),
        corruptions=("gaussian_noise",),
        severities=(5,),
        max_new_tokens=6,
    )
    summary = evaluate_models(plan, models, folder / "evaluation", console=QUIET)
    for router, cells in summary.headline.items():
        print(router, {cell: round(value, 3) for cell, value in cells.items() if value is not None})
    comparison = write_comparison(*summary.folders, folder / "comparison")
    print(*comparison.verdicts, sep="\n")
    print(comparison.html)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/compare_routers"))
