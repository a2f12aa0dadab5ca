"""Our models as a model of lmms-eval (0.7.2 and later), and our records in its sample format.

lmms-eval finds `manifest` by the entry point group ``lmms_eval.models`` and takes ``SymphonyVLM`` from this module, or
with ``--force_simple`` ``SimpleSymphonyVLM``: it ranks continuations (output types ``loglikelihood`` and
``multiple_choice``) with models of its simple kind alone. The classes exist once they are asked for, since their base
class is theirs: nothing here imports lmms-eval before.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from symphony_vlm.corruptions import find_frost_textures, image_key, parse_corrupt_at, parse_corruptions
from symphony_vlm.corruptions.placement import MODEL_INPUT
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.placement import placed
from symphony_vlm.integrations.asking import generate_texts, log_likelihoods
from symphony_vlm.integrations.prompts import Prompt, prompt_of_messages, prompt_of_text
from symphony_vlm.model.image_processor import SymphonyImageProcessor
from symphony_vlm.model.loading import load
from symphony_vlm.model.model_input import ModelInput, check_model_input, model_input

__all__ = ["manifest", "samples"]

_log = logging.getLogger(__name__)

MODEL_ID = "symphony_vlm"
DEFAULT_NEW_TOKENS = 1024
"""Where a task sets no limit."""
_PASSED_ON = ("num_beams", "repetition_penalty")
_SAMPLING = ("temperature", "top_p", "top_k")
_UNDERSTOOD = {*_PASSED_ON, *_SAMPLING, "max_new_tokens", "until", "do_sample"}


def manifest() -> Any:
    """What lmms-eval's registry needs to know: a ``ModelManifest``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=MODEL_ID,
        chat_class_path=f"{__name__}.SymphonyVLM",
        simple_class_path=f"{__name__}.SimpleSymphonyVLM",
    )


def __getattr__(name: str) -> Any:
    adapters = {"SymphonyVLM": _Adapter, "SimpleSymphonyVLM": _SimpleAdapter}
    if name not in adapters:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from lmms_eval.api.model import lmms
    except ImportError as error:
        raise InputError(
            f"lmms-eval cannot be imported ({error})", where=name, remedy='pip install "symphony-vlm[lmms-eval]"'
        ) from error
    return _class_over(lmms, name, adapters[name])


@functools.cache
def _class_over(base: type, name: str, adapter: type) -> type:
    return type(name, (adapter, base), {"__module__": __name__, "__doc__": adapter.__doc__})


class _Adapter:
    """A model trained here, asked by lmms-eval; every argument comes from ``--model_args``.

    The corruption belongs there because lmms-eval's response cache knows a model by these arguments and a question by
    its number alone: it would give clean answers for corrupted pictures. One process evaluates one cell.

    Args:
        pretrained: folder of a model or of a finished run, or a hub name.
        device: e.g. ``cuda:1``; default: the accelerator of this process, else the CPU.
        batch_size: requests answered together.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16``.
        corruption: name of one corruption, or ``none``.
        severity: 1 to 5.
        corruption_seed: of the corruption's draws.
        corrupt_at: ``native`` (the picture's own resolution, before all preprocessing), ``long_side:N`` (resized to
            that first, clean pictures too) or ``model_input`` (after padding, resizing and cropping).

    Raises:
        InputError: an argument is none of these, or there is no model.
    """

    is_simple = False
    task_dict: dict[str, Any]
    _rank: int

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str | None = 1,
        dtype: str = "auto",
        corruption: str | None = None,
        severity: int | None = None,
        corruption_seed: int = 0,
        corrupt_at: str = "native",
    ) -> None:
        super().__init__()
        self.perturbation = _perturbation(corruption, severity, corruption_seed, corrupt_at)
        self.batch_size = _batch_size(batch_size)
        if device is None and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self._model = load(str(pretrained), device=device, dtype=dtype)
        self.device = self._model.device
        if self.perturbation["corrupt_at"] == MODEL_INPUT:
            check_model_input(self._images, self._model.vision_tower.config.scales)
        _log.info("symphony_vlm: %s, pictures: %s", pretrained, json.dumps(self.perturbation))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests, whose arguments are ``(context, doc_to_messages, generation arguments,
        doc id, task, split)``."""
        answers = [""] * len(requests)
        settings = [_generation(self._generation_arguments(request.args)) for request in requests]
        for batch in self._batches([request.args[0] for request in requests], [json.dumps(s) for s in settings]):
            prompts = [self._question(requests[i].args) for i in batch]
            arguments, until = settings[batch[0]]
            for i, text in zip(batch, generate_texts(self._model, prompts, arguments), strict=True):
                answers[i] = _cut(text, until)
        return answers

    def _generation_arguments(self, arguments: tuple[Any, ...]) -> Mapping[str, Any]:
        found: Mapping[str, Any] = arguments[2]
        return found

    def _question(self, arguments: tuple[Any, ...]) -> Prompt:
        _, doc_to_messages, _, doc_id, task, split = arguments
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        return prompt_of_messages(messages, self._perturb, origin=f"{task}/{split}/{doc_id}")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log probability and whether it is the greedy answer, in the order of the requests.

        Their arguments are ``(context, continuation or doc -> continuation, doc_to_visual, doc id, task, split)``, or
        ``(context, continuation)`` where the continuation is judged without its question.
        """
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for batch in self._batches([request.args[0] for request in requests], [""] * len(requests)):
            asked = [self._question_and_answer(requests[i].args) for i in batch]
            prompts, continuations = [prompt for prompt, _ in asked], [text for _, text in asked]
            for i, result in zip(batch, log_likelihoods(self._model, prompts, continuations), strict=True):
                found[i] = _as_result(*result)
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("symphony_vlm answers tasks of one round (generate_until, loglikelihood)")

    def _question_and_answer(self, arguments: tuple[Any, ...]) -> tuple[Prompt, str]:
        context, continuation, *rest = arguments
        if not rest:
            return prompt_of_text(context, None, self._perturb, origin="loglikelihood"), continuation
        doc_to_visual, doc_id, task, split = rest
        document = self.task_dict[task][split][doc_id]
        text = continuation(document) if callable(continuation) else continuation
        origin = f"{task}/{split}/{doc_id}"
        return prompt_of_text(context, doc_to_visual(document), self._perturb, origin=origin), str(text)

    def _batches(self, contexts: Sequence[str], kinds: Sequence[str]) -> Iterable[list[int]]:
        """Indices of requests with equal settings and contexts of similar length."""
        by_kind: dict[str, list[int]] = {}
        for i, kind in enumerate(kinds):
            by_kind.setdefault(kind, []).append(i)
        batches = []
        for group in by_kind.values():
            group.sort(key=lambda i: len(contexts[i]))
            batches += [group[start : start + self.batch_size] for start in range(0, len(group), self.batch_size)]
        # Standard output is for lmms-eval's tables.
        return track(batches, "symphony_vlm", console=Console(stderr=True), disable=self._rank != 0)

    @property
    def _images(self) -> SymphonyImageProcessor:
        assert self._model.processor is not None
        processor: SymphonyImageProcessor = self._model.processor.image_processor
        return processor

    def model_input(self, pixels: np.ndarray) -> ModelInput:
        """What the model sees of uint8 ``[H, W, 3]``, before normalisation."""
        return model_input(self._images, pixels)

    def _perturb(self, pixels: np.ndarray) -> np.ndarray:
        # Only pixels arrive here, so the key is theirs and not the file's.
        return placed(pixels, image_key(pixels), self, **self.perturbation)


class _SimpleAdapter(_Adapter):
    """The same model for ``--force_simple``, which tasks that rank continuations need; arguments as of `SymphonyVLM`.

    Generation requests have ``(context, generation arguments, doc_to_visual, doc id, task, split)``: the pictures stand
    before the context.
    """

    is_simple = True

    def _generation_arguments(self, arguments: tuple[Any, ...]) -> Mapping[str, Any]:
        found: Mapping[str, Any] = arguments[1]
        return found

    def _question(self, arguments: tuple[Any, ...]) -> Prompt:
        context, _, doc_to_visual, doc_id, task, split = arguments
        pictures = doc_to_visual(self.task_dict[task][split][doc_id])
        return prompt_of_text(context, pictures, self._perturb, origin=f"{task}/{split}/{doc_id}")


def _as_result(total: float, greedy: bool) -> tuple[float, bool]:
    """The pair, which is a ``GenerationResult`` too.

    lmms-eval 0.7.2 and 0.7.3 pass every response through ``unwrap_generation_output``, which makes a text of a plain
    pair, and the task then fails. Of a ``GenerationResult`` it takes ``text`` as it is.
    """
    from lmms_eval.api.instance import GenerationResult

    pair = _pair_class(GenerationResult)((total, greedy))
    pair.text, pair.token_counts = (total, greedy), None
    found: tuple[float, bool] = pair
    return found


@functools.cache
def _pair_class(result: type) -> Any:
    return type("Likelihood", (tuple, result), {"__eq__": tuple.__eq__, "__hash__": tuple.__hash__})


def _perturbation(name: str | None, severity: int | None, seed: int, corrupt_at: str) -> dict[str, Any]:
    where = "--model_args"
    corrupt_at = parse_corrupt_at(str(corrupt_at))
    if name is None or str(name) == "none":
        if severity not in (None, 0):
            raise InputError(f"severity={severity!r} without a corruption", where=where, remedy="Add corruption=NAME.")
        return {"corruption": "none", "severity": 0, "seed": seed, "corrupt_at": corrupt_at}
    names = parse_corruptions(str(name))
    if len(names) != 1:
        raise InputError(
            f"corruption={name!r} are {len(names)}; one process evaluates one", where=where, remedy="Start it for each."
        )
    if isinstance(severity, bool) or severity not in (1, 2, 3, 4, 5):
        raise InputError(f"severity={severity!r} of {name!r} is not one of 1, 2, 3, 4, 5", where=where)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"corruption_seed={seed!r} is no integer", where=where)
    if names[0] == "frost":
        find_frost_textures()
    return {"corruption": names[0], "severity": int(severity), "seed": seed, "corrupt_at": corrupt_at}


def _batch_size(value: int | str | None) -> int:
    text = str(1 if value is None else value)
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{value!r} is no number of requests", where="--batch_size", remedy="Give 1 or more.")
    return int(text)


def _generation(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Arguments of ``generate`` and the texts that end an answer, from a task's; others are named in a warning."""
    unknown = sorted(set(arguments) - _UNDERSTOOD)
    if unknown:
        _warn_once(f"generation arguments without effect here: {', '.join(unknown)}")
    temperature = arguments.get("temperature")
    sample = bool(arguments.get("do_sample", temperature)) and temperature != 0
    chosen: dict[str, Any] = {"max_new_tokens": int(arguments.get("max_new_tokens") or DEFAULT_NEW_TOKENS)}
    chosen["do_sample"] = sample
    names = (*_PASSED_ON, *_SAMPLING) if sample else _PASSED_ON
    chosen |= {name: arguments[name] for name in names if arguments.get(name) is not None}
    until = arguments.get("until") or []
    return chosen, [until] if isinstance(until, str) else [text for text in until if text]


@functools.cache
def _warn_once(text: str) -> None:
    _log.warning(text)


def _cut(text: str, until: Sequence[str]) -> str:
    for end in until:
        text = text.split(end)[0]
    return text.strip()


def samples(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records of an evaluation (``predictions/*.jsonl``) as lmms-eval logs samples.

    Args:
        records: as `evaluation.records.read_records` gives them.

    Returns:
        For each ``doc_id, input, target, resps, filtered_resps`` and, where there are, ``score`` and ``error``. The
        ``doc_id`` is our ``item_id``, as a record knows no row number. An item that failed has no response, rather
        than an empty one.
    """
    listed = []
    for record in records:
        answers = [] if record["prediction"] is None else [record["prediction"]]
        sample: dict[str, Any] = {
            "doc_id": record["item_id"],
            "input": record["question"],
            "target": record["answer"],
            "resps": [answers] if answers else [],
            "filtered_resps": answers,
        }
        sample |= {name: record[name] for name in ("score", "error") if record.get(name) is not None}
        listed.append(sample)
    return listed
