"""What lmms-eval 0.7 has where the adapter touches it: same modules, names and signatures, and the checks it makes.

Written from its documentation and behaviour. Where lmms-eval is installed the tests use it instead.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any


class lmms(abc.ABC):
    is_simple: bool = True

    def __init__(self) -> None:
        self._rank = 0
        self._world_size = 1
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        pairs = [part.split("=", 1) for part in arg_string.split(",") if part]
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{name: _value(text) for name, text in pairs}, **given)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.isnumeric():
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


@dataclass
class GenerationResult:
    text: str
    token_counts: Any = None


def unwrap_generation_output(output: Any) -> tuple[Any, Any]:
    if isinstance(output, GenerationResult):
        return output.text, output.token_counts
    return (output if isinstance(output, str) else str(output)), None


@dataclass
class Instance:
    request_type: str
    arguments: tuple[Any, ...]
    idx: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class ModelRegistryV2:
    def __init__(self) -> None:
        self._manifests: dict[str, ModelManifest] = {}

    def register_manifest(self, manifest: ModelManifest, *, overwrite: bool = False) -> None:
        self._manifests[manifest.model_id] = manifest

    def _coerce_payload_to_manifests(self, payload: Any) -> list[ModelManifest]:
        payload = payload() if callable(payload) else payload
        listed = [payload] if isinstance(payload, ModelManifest) else list(payload)
        assert all(isinstance(item, ModelManifest) for item in listed)
        return listed

    def get_model_class(self, model_name: str, force_simple: bool = False) -> type:
        manifest = self._manifests[model_name]
        path = manifest.simple_class_path if force_simple else manifest.chat_class_path
        assert path is not None
        module, name = path.rsplit(".", 1)
        found: type = getattr(import_module(module), name)
        if not issubclass(found, lmms):
            raise TypeError("not a subclass of lmms")
        if getattr(found, "is_simple", True) is not force_simple:
            raise TypeError("is_simple does not fit the kind of model")
        return found


def modules() -> dict[str, ModuleType]:
    """For ``sys.modules``."""
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.api.instance": {
            "Instance": Instance,
            "GenerationResult": GenerationResult,
            "unwrap_generation_output": unwrap_generation_output,
        },
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest, "ModelRegistryV2": ModelRegistryV2},
    }
    built = {}
    for name, values in contents.items():
        built[name] = ModuleType(name)
        vars(built[name]).update(values)
    return built
