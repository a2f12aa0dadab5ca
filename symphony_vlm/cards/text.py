"""The words of a model card, in Markdown under a YAML header."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from symphony_vlm.cards.facts import Facts, without_paths

__all__ = ["card_text"]

PAPER = "https://arxiv.org/abs/2510.16411"

_TASKS = {
    "symphony_vlm": "image-text-to-text",
    "llava": "image-text-to-text",
    "open_clip": "zero-shot-image-classification",
}
"""Pipeline tags of the hub by kind of model; every other model here writes text."""

_ROUTER_SETTINGS = ("router", "num_experts", "num_experts_per_tok", "gate", "score", "expert_graph", "token_graph")
_GRAPH_SETTINGS = ("smooth", "strength", "momentum", "normalization", "counts", "diagonal", "applies_to", "active")
_LAYER_SETTINGS = ("layers", "modules", "shared_expert", "expert_split", "balance_loss_weight", "z_loss_weight")


def card_text(facts: Facts) -> str:
    """The card, without its seal."""
    parts = [_header(facts), _introduction(facts), _loading(facts), _architecture(facts)]
    parts += [_training(facts), _evaluation(facts), _use(facts)]
    return without_paths("\n\n".join(part.strip("\n") for part in parts if part)) + "\n"


def _header(facts: Facts) -> str:
    from huggingface_hub import ModelCardData

    tags = ["symphony-vlm"]
    if facts.config.get("moe"):
        tags += ["mixture-of-experts", facts.config["moe"]["router"]]
    library = {"symphony_vlm": "symphony_vlm", "symphony_lm": "symphony_vlm", "open_clip": "open_clip"}
    data = ModelCardData(
        library_name=library.get(facts.kind, "transformers"),
        pipeline_tag=_TASKS.get(facts.kind, "text-generation"),
        license=facts.licence,
        base_model=list(facts.base_models) or None,
        tags=tags,
    )
    return f"---\n{data.to_yaml()}\n---"


def _introduction(facts: Facts) -> str:
    recipe, stages = facts.training.get("recipe"), facts.training.get("stages") or []
    title = f"{recipe}, stage {stages[-1]['name']}" if recipe and stages else recipe or f"A {facts.kind} model"
    moe = facts.config.get("moe")
    kind = {
        "symphony_vlm": "A LLaVA-style vision-language model: it answers questions about pictures",
        "symphony_lm": "A language model",
        "llava": "A LLaVA model for stock transformers, exported from symphony_vlm",
        "open_clip": "An image and text encoder (CLIP), trained to be the eyes of a vision-language model",
    }.get(facts.kind, f"A language model ({facts.kind})")
    experts = (
        f"; its feed-forward layers are mixtures of {moe['num_experts']} experts, of which a token passes "
        f"{moe['num_experts_per_tok']}, chosen by the router `{moe['router']}`"
        if moe
        else ""
    )
    lines = [f"# {title}", "", f"{kind}{experts}. Made with symphony_vlm (router graphs: {PAPER})."]
    if facts.config.get("adapter"):
        lines += ["", "This folder holds adapters, which need the model that they were trained on beside them."]
    return "\n".join(lines)


def _loading(facts: Facts) -> str:
    lines = {
        "symphony_vlm": [
            "import symphony_vlm as sv",
            'model = sv.load("FOLDER_OR_HUB_ID")',
            'print(model.chat("What is in the picture?", images="picture.png"))',
        ],
        "symphony_lm": [
            "import symphony_vlm as sv",
            'model = sv.load_language_model("FOLDER_OR_HUB_ID")',
            "# its tokenizer, where there is one: transformers.AutoTokenizer.from_pretrained of the same name",
        ],
        "llava": [
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            'model = AutoModelForImageTextToText.from_pretrained("FOLDER_OR_HUB_ID")',
            'processor = AutoProcessor.from_pretrained("FOLDER_OR_HUB_ID")',
        ],
        "open_clip": [
            "import open_clip",
            'model, preprocess = open_clip.create_model_from_pretrained("local-dir:FOLDER")',
            "# text is numbered by the tokenizer of the run, not by CLIP's",
        ],
    }.get(
        facts.kind,
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_HUB_ID")',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_HUB_ID")',
        ],
    )
    return "\n".join(["## How to load it", "", "```python", *lines, "```"])


def _architecture(facts: Facts) -> str:
    rows: list[tuple[str, object]] = []
    for part in facts.training.get("parts", []):
        rows.append(
            (f"pretrained {part['part']}", f"{part['name']} ({part['licence'] or 'licence: see its own card'})")
        )
    if facts.num_parameters:
        rows.append(("numbers in the weight files", f"{facts.num_parameters:,}"))
    vision, text = facts.config.get("vision_config"), facts.config.get("text_config")
    if isinstance(vision, Mapping):
        form = vision.get("architecture") or vision
        tower = form.get("vision_cfg", form) if isinstance(form, Mapping) else {}
        size = tower.get("image_size", vision.get("image_size"))
        depth = tower.get("layers", tower.get("num_hidden_layers"))
        rows.append(("vision tower", f"{vision.get('backend', 'CLIP')}, {depth} layers, pictures of {size} pixels"))
        if facts.config.get("num_image_tokens"):
            rows.append(("tokens a picture or tile", facts.config["num_image_tokens"]))
        rows.append(("projector", facts.config.get("projector", facts.config.get("projector_hidden_act"))))
    decoder = text if isinstance(text, Mapping) else facts.config
    sizes = {"num_hidden_layers": "layers", "hidden_size": "hidden size", "vocab_size": "vocabulary"}
    known = [f"{name} {decoder[key]}" for key, name in sizes.items() if key in decoder]
    if "open_clip" not in facts.config:
        rows.append(("language model", ", ".join([str(decoder.get("model_type")), *known])))
    moe = facts.config.get("moe")
    if moe:
        names = [*_ROUTER_SETTINGS, *(_GRAPH_SETTINGS if moe["expert_graph"] != "none" else ()), *_LAYER_SETTINGS]
        rows += [(f"moe.{name}", _value(moe[name])) for name in names if name in moe]
    return _section("Architecture", _table(("part", "value"), rows)) if rows else ""


def _training(facts: Facts) -> str:
    record = facts.training
    if not record:
        return ""
    provenance = record.get("provenance", {})
    paragraphs: list[list[str]] = []
    if stages := record.get("stages"):
        paragraphs.append(["Stages, up to the one that this model is the result of:"])
        paragraphs.append(_stages(stages, record.get("log", [])))
    counts: Mapping[str, Mapping[str, Any]] = provenance.get("counts") or {}
    if counts:
        rows = [
            (label, *(_value(count.get(name)) for name in ("records", "train", "validation", "faults")))
            for label, count in counts.items()
        ]
        paragraphs.append(_table(("data", "records", "trained on", "held out", "left out"), rows))
    if hashes := provenance.get("data_sha256"):
        listed = ", ".join(f"{name} `{str(digest)[:16]}`" for name, digest in hashes.items())
        paragraphs.append([f"sha256 of the data: {listed}."])
    versions, hardware, git = (provenance.get(name) or {} for name in ("versions", "hardware", "git"))
    known = [
        f"recipe `{record.get('recipe')}` (sha256 `{str(provenance.get('recipe_sha256'))[:16]}`)",
        f"seed {provenance.get('seed')}",
        *(f"{name} {versions[name]}" for name in ("symphony-vlm", "torch", "transformers") if name in versions),
        *([f"commit `{git['commit'][:12]}`{' with changes' if git.get('dirty') else ''}"] if git else []),
        *([str(hardware["device"])] if hardware.get("device") else []),
    ]
    paragraphs.append([f"Provenance: {', '.join(known)}."])
    return _section("Training", ["\n\n".join("\n".join(lines) for lines in paragraphs)])


def _stages(stages: Sequence[Mapping[str, Any]], log: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for stage in stages:
        lines = [line for line in log if line.get("stage") == stage["name"]]
        loss, validation = (
            next((f"{line[key]:.4f}" for line in reversed(lines) if key in line), "") for key in ("loss", "eval_loss")
        )
        trained = ", ".join(f"{name} {rate:g}" for name, rate in stage["rates"].items())
        steps = max((line["step"] for line in lines if "step" in line), default="")
        rows.append((stage["name"], stage["kind"], trained, steps, loss, validation))
    columns = ("stage", "kind", "what trained, at which rate", "steps", "last loss", "validation loss")
    return _table(columns, rows)


def _evaluation(facts: Facts) -> str:
    if not facts.evaluation:
        return _section("Evaluation", ["Not evaluated here: `symphony-vlm eval --model FOLDER ...` does it."])
    rows = [
        (entry["task"], entry["metric"], *(_figure(entry[name]) for name in ("clean", "mean_corrupted", "retention")))
        for entry in facts.evaluation
    ]
    columns = ("task", "metric", "clean", "mean over corruptions", "retention")
    return _section("Evaluation", [*_table(columns, rows), "", "In brackets: 95 % intervals, by picture."])


def _figure(quantity: Mapping[str, Any]) -> str:
    if quantity.get("value") is None:
        return str(quantity.get("reason", ""))
    if quantity.get("ci_low") is None:
        return f"{quantity['value']:.4f}"
    return f"{quantity['value']:.4f} [{quantity['ci_low']:.4f}, {quantity['ci_high']:.4f}]"


def _use(facts: Facts) -> str:
    terms = (
        "the licence in the header is that of the model it was made of"
        if facts.licence
        else "no licence is stated. Those of the data and of the models it was made of apply; name one before sharing"
    )
    return _section(
        "Intended use and limits",
        [
            "For research on routing and robustness, and as a start for training of your own. Its answers can be wrong "
            "however sure they sound, on corrupted pictures more often; it has the biases of its data and no safety "
            "training. Not for decisions about people, nor where an error does harm. What was not measured above is "
            f"not known. Terms: {terms}.",
        ],
    )


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *lines])


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    ]


def _value(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)
