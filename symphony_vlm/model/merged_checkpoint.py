"""Writes the plain model of a folder with adapters: base and adapters in one set of weights, proven equal."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from symphony_vlm.cards.writing import write_model_card
from symphony_vlm.errors import InputError
from symphony_vlm.model.adapters import merge_adapters_
from symphony_vlm.model.loading import adapter_record, load, local_folder
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.moe.proof import logits_of_probe, prove_equal

__all__ = ["merge_checkpoint"]


def merge_checkpoint(name: str | Path, output: Path) -> float:
    """Merges the adapters of a saved model.

    The proof is in fp32, whatever is saved: logits of fixed random inputs with the adapters beside the weights, and of
    the merged model, opened again from its files. A model in 16 bits is proven before it is rounded, and its files
    must then hold exactly the rounded weights.

    Args:
        name: folder of a model with adapters or of a finished run, or a hub name.
        output: folder to create; it appears when everything is done and proven.

    Returns:
        The largest absolute difference of fp32 logits.

    Raises:
        InputError: there are no adapters, their model is not there or another, or `output` exists.
        RuntimeError: the merged model is not the same; nothing is left at `output`.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError("the folder exists and is not empty", where=str(output), remedy="Give a new folder.")
    folder = local_folder(name)
    record = adapter_record(folder)
    if record is None:
        raise InputError("there are no adapters to merge; this is a whole model", where=str(folder))
    model = SymphonyVLMForConditionalGeneration.with_adapters(folder, record, dtype="auto").eval()
    saved_dtype = model.dtype
    model.float()
    before = logits_of_probe(model)
    merge_adapters_(model)
    difference = prove_equal(before, logits_of_probe(model), "merging")
    model.to(saved_dtype)

    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        for path in folder.iterdir():  # the processor, the record of training
            if path.is_file() and ".safetensors" not in path.name and not (temporary / path.name).exists():
                shutil.copy2(path, temporary / path.name)
        write_model_card(temporary)  # with the record of training, which was not there before
        opened = load(temporary, device="cpu")
        for key, weight in model.state_dict().items():
            if not torch.equal(opened.state_dict()[key], weight):
                raise RuntimeError(f"{key} is not what was written when the merged model is opened again")
        if saved_dtype == torch.float32:
            difference = max(difference, prove_equal(before, logits_of_probe(opened), "merging"))
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return difference
