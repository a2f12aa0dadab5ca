"""Upcycles a saved dense model into a saved sparse one, one layer at a time.

The in-place `upcycle_` needs the dense and the sparse model to fit into memory layer by layer, but all of the sparse
one in the end. Here weights go from the shards of one folder to the shards of another: no more than one layer and one
output shard are in memory. The proof of equal logits then opens one model after the other, never both.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from symphony_vlm.cards.writing import CARD, write_model_card
from symphony_vlm.errors import InputError
from symphony_vlm.files import write_json
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.feed_forward import placements, recognise
from symphony_vlm.moe.installation import language_model_config, layer_from_dense
from symphony_vlm.moe.proof import largest_difference, logits_of_probe, prove_equal
from symphony_vlm.moe.upcycle import check_dense, fill_, is_exact

__all__ = ["upcycle_checkpoint"]

INDEX = "model.safetensors.index.json"
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx"}


def upcycle_checkpoint(
    source: Path,
    output: Path,
    config: MoEConfig,
    *,
    seed: int = 0,
    max_shard_bytes: int = 4 * 2**30,
    report: Callable[[str], None] = lambda text: None,
) -> float:
    """Writes the upcycled model of a folder to another folder and proves that its function is the same.

    The result is what `upcycle_` with the same seed would have saved: a causal LM becomes a ``symphony_lm``, a
    ``symphony_vlm`` stays one. Tokenizer and processor files are copied.

    Args:
        source: folder with config.json and safetensors.
        output: folder to create; it appears when everything is done and proven.
        config: the settings.
        seed: of gates and noise.
        max_shard_bytes: about the size of an output file, and of what is in memory while writing.
        report: is told what happens.

    Returns:
        The largest absolute difference of fp32 logits. It is a proof where the settings make upcycling exact.

    Raises:
        InputError: the model cannot be upcycled, its files do not fit its configuration, or `output` exists.
        RuntimeError: the logits changed; nothing is left at `output`.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError("the folder exists and is not empty", where=str(output), remedy="Give a new folder.")
    values = _read_json(source / "config.json")
    if values.get("adapter"):
        raise InputError(
            "the folder has adapters and not a whole model",
            where=str(source),
            remedy=f"Merge them first: symphony-vlm merge --model {source} --output DIR.",
        )
    is_vlm = values.get("model_type") == "symphony_vlm"
    auto_class: Any = AutoModelForImageTextToText if is_vlm else AutoModelForCausalLM
    try:
        dense_config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            skeleton = auto_class.from_config(dense_config)
    except (OSError, ValueError) as error:
        raise InputError(str(error).splitlines()[0], where=str(source), remedy="Give a causal LM's folder.") from error
    check_dense(skeleton, config)
    files = _weight_files(source)
    _check_names(skeleton, files, source)

    report("logits of the dense model")
    before = _logits(auto_class, source)
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_weights(skeleton, files, temporary, config, seed, max_shard_bytes, report)
        _copy_other_files(source, temporary)
        if is_vlm:
            write_json(temporary / "config.json", values | {"moe": config.to_dict()})
        else:
            language_model_config(AutoConfig.from_pretrained(source), config).save_pretrained(temporary)
        write_model_card(temporary, source=source)
        report("logits of the upcycled model")
        after = _logits(auto_class, temporary)
        difference = prove_equal(before, after, "upcycling") if is_exact(config) else largest_difference(before, after)
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return difference


def _logits(auto_class: Any, folder: Path) -> Tensor:
    """Logits in fp32, whatever precision is saved: 16 bits could not show a difference of 1e-5."""
    return logits_of_probe(auto_class.from_pretrained(folder, dtype=torch.float32))


def _weight_files(source: Path) -> dict[str, Path]:
    """The file that holds each weight."""
    if (source / INDEX).is_file():
        weight_map = _read_json(source / INDEX).get("weight_map", {})
        files = {name: source / file for name, file in weight_map.items()}
    elif (source / "model.safetensors").is_file():
        with safe_open(source / "model.safetensors", framework="pt") as opened:
            files = dict.fromkeys(opened.keys(), source / "model.safetensors")
    else:
        raise InputError(
            "the folder has no model.safetensors",
            where=str(source),
            remedy="Open the model with transformers and save it again with save_pretrained.",
        )
    for path in set(files.values()):
        if not path.is_file():
            raise InputError("the index names a file that is not there", where=str(path))
    return files


def _check_names(skeleton: PreTrainedModel, files: dict[str, Path], source: Path) -> None:
    """The names in the files must be those of the model, but for tied weights and what its class ignores."""
    names = set(skeleton.state_dict())
    ignored = [re.compile(pattern) for pattern in skeleton._keys_to_ignore_on_load_unexpected or ()]
    for name in [name for name in files if any(pattern.search(name) for pattern in ignored)]:
        del files[name]
    faults = {"missing": names - set(skeleton.all_tied_weights_keys) - set(files), "unexpected": set(files) - names}
    problems = [f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])})" for kind, keys in faults.items() if keys]
    if problems:
        raise InputError(
            f"the weights do not fit the configuration: {'; '.join(problems)}",
            where=str(source),
            remedy="Open the model with transformers and save it again with save_pretrained.",
        )


def _write_weights(
    skeleton: PreTrainedModel,
    files: dict[str, Path],
    folder: Path,
    config: MoEConfig,
    seed: int,
    max_shard_bytes: int,
    report: Callable[[str], None],
) -> None:
    places = list(placements(skeleton, config))
    owners = {place.owner for place in places}
    names = {module: name for name, module in skeleton.named_modules() if module in owners}
    prefixes = [f"{names[place.owner]}.{place.name}.".lstrip(".") for place in places]
    writer = ShardWriter(folder, max_shard_bytes)

    def read(name: str) -> Tensor:
        # Opened for each weight: while a file is open, whatever was read of it stays mapped into memory.
        with safe_open(files[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    for name in files:
        if not name.startswith(tuple(prefixes)):
            writer.add(name, read(name))
    for number, (place, prefix) in enumerate(zip(places, prefixes, strict=True), start=1):
        report(f"{place.label} ({number} of {len(places)})")
        dense = place.mlp
        dense.load_state_dict({name: read(prefix + name) for name in dense.state_dict()}, assign=True)
        sparse = layer_from_dense(place, config)
        fill_(sparse, recognise(dense, place.label), config, seed)
        for name, tensor in sparse.state_dict().items():
            writer.add(prefix + name, tensor)
        place.replace(nn.Identity())  # frees the dense layer
        del dense, sparse
    writer.close()


class ShardWriter:
    """Collects tensors and writes them in files of about one size, with the index that transformers reads."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._pending: dict[str, Tensor] = {}
        self._num_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor; writes what was collected if it would become too much."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._num_bytes + size > self._max_bytes:
            self._write()
        self._pending[name] = tensor.contiguous()
        self._num_bytes += size
        self._total_bytes += size

    def close(self) -> None:
        """Writes the rest and gives the files their names, which say how many there are."""
        self._write()
        count = len(self._shards)
        finals = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            finals = ["model.safetensors"]
        else:
            weight_map = {name: file for file, names in zip(finals, self._shards, strict=True) for name in names}
            write_json(self._folder / INDEX, {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map})
        for i, final in enumerate(finals):
            self._path(i).rename(self._folder / final)

    def _write(self) -> None:
        save_file(self._pending, self._path(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._num_bytes = {}, 0

    def _path(self, index: int) -> Path:
        return self._folder / f"part-{index}.safetensors"


def _copy_other_files(source: Path, folder: Path) -> None:
    """Tokenizer, processor, generation settings, licence: all but weights, the configuration and its card."""
    for path in _other_files(source):
        shutil.copy2(path, folder / path.name)


def _other_files(source: Path) -> Iterator[Path]:
    for path in sorted(source.iterdir()):
        weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name not in ("config.json", CARD) and not path.name.startswith("."):
            yield path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError("no such file", where=str(path), remedy="Give the folder of a saved model.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error})", where=str(path)) from error
    if not isinstance(values, dict):
        raise InputError("a JSON object is expected", where=str(path))
    return values
