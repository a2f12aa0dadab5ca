"""What has to happen when other libraries are imported, without importing them ourselves.

Three things, all done by one small finder at the front of ``sys.meta_path``:

* *torchvision without its compiled operators.* torchvision wheels are compiled against one build of torch; beside
  another (a CPU build, say) its library does not load, and then ``import torchvision`` itself raises ``operator
  torchvision::nms does not exist``, and open_clip, timm and many transformers classes fail with it although they need
  none of those operators. Before torchvision's first import we try to load the library as torchvision would; only if
  that fails the two missing schemas are declared, so that the import succeeds. Transforms work then; ``ops.nms``,
  ``ops.roi_align`` and ``torchvision.io`` do not and say so when called. On a healthy install nothing is changed.
* *Registration with transformers' Auto classes.* ``import symphony_vlm`` stays free of torch and transformers (0.3 s
  instead of several); our classes register themselves when the Auto classes are first imported.
* *bitsandbytes' warning.* PEFT imports bitsandbytes where it is installed, and on processors with bf16 instructions
  that import warns of the package ``kernels``, which would fetch code from the hub. Nothing here needs it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["install", "torchvision_operators_missing"]

_schemas: Any = None
"""Keeps the ``torch.library.Library`` alive; the schemas vanish with it."""


def install() -> None:
    """Installs the hooks; a module that is already imported gets its hook at once. Safe to call twice."""
    if not any(isinstance(finder, _HookFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _HookFinder())
    for name, hook in _AFTER.items():
        if name in sys.modules:
            hook()


def torchvision_operators_missing() -> bool:
    """Whether torchvision's operators had to be declared because its compiled library does not load here."""
    return _schemas is not None


def _declare_torchvision_operators() -> None:
    global _schemas
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _schemas is not None:
        return
    import torch

    libraries = sorted(Path(spec.origin).parent.glob("_C*.so")) or sorted(Path(spec.origin).parent.glob("_C*.pyd"))
    try:
        for library in libraries:
            torch.ops.load_library(str(library))
    except OSError:
        libraries = []
    if not libraries:
        _schemas = torch.library.Library("torchvision", "DEF")
        _schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _register(**modules: str) -> Callable[[], None]:
    """A hook that registers parts, given with the modules that define them."""

    def hook() -> None:
        for part, module in modules.items():
            # If our module is the one that is importing transformers right now, its class does not exist yet; it
            # registers itself at its end.
            if f"symphony_vlm.model.{module}" not in sys.modules:
                importlib.import_module("symphony_vlm.model.registration").register(part)

    return hook


def _quiet_bitsandbytes() -> None:
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


_BEFORE: dict[str, Callable[[], None]] = {
    "bitsandbytes": _quiet_bitsandbytes,
    "torchvision": _declare_torchvision_operators,
}
_AFTER: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register(config="configuration"),
    "transformers.models.auto.modeling_auto": _register(model="vlm", language_model="language_model"),
    "transformers.models.auto.image_processing_auto": _register(image_processor="image_processor"),
    "transformers.models.auto.processing_auto": _register(processor="processor"),
}


_AUTO = "transformers.models.auto."
"""These modules import each other half-way; what is hooked after one of them has to wait for the outermost."""

_waiting: list[str] = []
_depth = threading.local()


class _HookFinder(importlib.abc.MetaPathFinder):
    """Lets the other finders find a hooked module and wraps its loader."""

    def __init__(self) -> None:
        self._busy: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        hooked = name in _BEFORE or name in _AFTER or name.startswith(_AUTO)
        if not hooked or name in self._busy:
            return None
        self._busy.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _HookLoader(spec.loader, name)
        return spec


class _HookLoader(importlib.abc.Loader):
    def __init__(self, loader: Any, name: str) -> None:
        self._loader = loader
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._loader, attribute)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        if before := _BEFORE.get(self._name):
            before()
        outside = getattr(_depth, "value", 0)
        _depth.value = outside + 1
        try:
            self._loader.exec_module(module)
        finally:
            _depth.value = outside
        if self._name in _AFTER:
            _waiting.append(self._name)
        # Our classes need Auto classes that a module around this one may not have defined yet.
        while _waiting and outside == 0:
            _AFTER[_waiting.pop(0)]()
