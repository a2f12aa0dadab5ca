"""The language stage: a causal LM, dense or with new sparse layers, on plain text in blocks of equal length.

Shape letters: N tokens of the text, L tokens of a block.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback

from symphony_vlm.config.recipe import ModelConfig, StageConfig
from symphony_vlm.data.text_lines import TextLines
from symphony_vlm.data.word_tokenizer import with_line_ends
from symphony_vlm.errors import InputError
from symphony_vlm.model.language_model import SymphonyForCausalLM
from symphony_vlm.model.loading import load_language_model
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.installation import language_model_config
from symphony_vlm.moe.recording import sparse_layers
from symphony_vlm.training.callbacks import ExpertGraphUpdate, RoutingLog
from symphony_vlm.training.fitting import RunContext, fit, make_trainer, replace_folder
from symphony_vlm.training.parts import keep_precision_, new_language_model, set_vocabulary
from symphony_vlm.training.skeleton import language_config
from symphony_vlm.training.trainer import StageTrainer

__all__ = ["LineBlocks", "new_sparse_language_model", "prepare_language", "run_language", "token_stream"]

LINES_AT_ONCE = 1000


def run_language(stage: StageConfig, context: RunContext) -> None:
    """Trains a language model on ``data.text`` and saves it with its tokenizer."""
    trainer, model = prepare_language(stage, context)
    fit(trainer, stage, context)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        context.tokenizer.save_pretrained(folder)

    replace_folder(context.model_folder(stage.name), save)


def prepare_language(stage: StageConfig, context: RunContext) -> tuple[StageTrainer, PreTrainedModel]:
    """A language stage up to its first step: its trainer, and the model in it."""
    assert context.data.text is not None
    model = _starting_model(stage, context)
    keep_precision_(model, bf16=stage.bf16)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and stage.max_length > longest:
        raise InputError(
            f"{stage.max_length} tokens are more than the model's {longest} positions",
            where=f"stage {stage.name!r}: max_length",
            remedy="Lower it, or raise model.language.architecture.max_position_embeddings.",
        )
    blocks = partial(LineBlocks, block_size=stage.max_length)
    stream = partial(_stream_of, tokenizer=context.tokenizer)
    train = blocks(stream(context.data.text.train), name="data.text.train")
    held_out = stream(context.data.text.validation)
    validation = blocks(held_out, name="data.text.validation") if len(held_out) else None
    num_tokens = len(train) * (stage.max_length - 1)
    context.console.print(f"{stage.name}: {num_tokens} tokens an epoch in {len(train)} blocks of {stage.max_length}")
    callbacks: list[TrainerCallback] = [ExpertGraphUpdate()]
    routing = getattr(model, "routing", None)
    if routing is not None:
        board = context.folder / "tensorboard" / stage.name / "routing"
        shown = board if "tensorboard" in context.recipe.monitor.report_to else None
        callbacks.append(RoutingLog(context.folder / stage.name / "routing.jsonl", routing, tensorboard=shown))
    rates = {"": stage.learning_rate}
    trainer = make_trainer(stage, context, model, train, validation, _stack, rates=rates, callbacks=callbacks)
    return trainer, model


def new_sparse_language_model(model: ModelConfig, tokenizer: Any, *, seed: int) -> SymphonyForCausalLM:
    """A new model whose sparse layers are new too: experts are drawn one by one, not copied from a dense layer.

    Args:
        model: the recipe's, with ``language.architecture`` and ``moe``.
        tokenizer: its vocabulary and special tokens.
        seed: of the gates; everything else is drawn from torch's global random state.
    """
    assert model.moe is not None
    config = language_config(model)
    set_vocabulary(config, tokenizer)
    language_model = SymphonyForCausalLM(language_model_config(config, MoEConfig.from_dict(model.moe)))
    for _, layer in sparse_layers(language_model):
        layer.reset_routing(seed)
    return language_model


def _starting_model(stage: StageConfig, context: RunContext) -> PreTrainedModel:
    recipe = context.recipe
    earlier = context.earlier(stage, "language") or recipe.model.start
    if earlier is not None:
        return load_language_model(earlier, device="cpu")
    if recipe.model.moe is not None:
        return new_sparse_language_model(recipe.model, context.tokenizer, seed=recipe.seed)
    model: PreTrainedModel = new_language_model(recipe.model, context.tokenizer, None)
    return model


def _stream_of(texts: Sequence[TextLines], tokenizer: Any) -> Tensor:
    return token_stream(chain.from_iterable(texts), tokenizer)


def token_stream(lines: Iterable[str], tokenizer: Any) -> Tensor:
    """All lines as one stream, each with its line end: ``[N]``, int32."""
    stream = array("i")
    remaining = with_line_ends(lines)
    while some := list(islice(remaining, LINES_AT_ONCE)):
        for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            stream.extend(ids)
    return torch.frombuffer(stream, dtype=torch.int32) if stream else torch.empty(0, dtype=torch.int32)


class LineBlocks(Dataset[dict[str, Tensor]]):
    """A stream of tokens in blocks that share one token, so that an epoch predicts every token but the first once.

    Args:
        stream_N: tokens.
        block_size: L; an incomplete last block is left out.
        name: of the text, for messages.
    """

    def __init__(self, stream_N: Tensor, *, block_size: int, name: str) -> None:
        if len(stream_N) < block_size:
            raise InputError(
                f"the text makes {len(stream_N)} tokens, less than one block of {block_size}",
                where=name,
                remedy="Lower the stage's max_length or give more text.",
            )
        self._blocks_NL = stream_N.unfold(0, block_size, block_size - 1)

    def __len__(self) -> int:
        return len(self._blocks_NL)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids_L = self._blocks_NL[index].long()
        return {"input_ids": ids_L, "labels": ids_L}


def _stack(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}
