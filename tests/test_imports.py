"""What importing the package does to other libraries' imports, and how little it does itself."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import symphony_vlm as sv
from symphony_vlm import _imports


class RecordedLibrary:
    """Stands for ``torch.library.Library`` and remembers what was declared."""

    made: list[RecordedLibrary]

    def __init__(self, namespace: str, kind: str) -> None:
        self.namespace, self.kind = namespace, kind
        self.schemas: list[str] = []
        self.made.append(self)

    def define(self, schema: str) -> None:
        self.schemas.append(schema.split("(")[0])


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> type[RecordedLibrary]:
    import torch

    RecordedLibrary.made = []
    monkeypatch.setattr(torch.library, "Library", RecordedLibrary)
    monkeypatch.setattr(_imports, "_schemas", None)
    return RecordedLibrary


def find_torchvision_in(folder: Path, monkeypatch: pytest.MonkeyPatch, *, compiled: bool) -> None:
    (folder / "__init__.py").touch()
    if compiled:
        (folder / "_C.so").touch()
    spec = types.SimpleNamespace(origin=str(folder / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


def test_a_healthy_torchvision_gets_nothing_declared(
    library: type[RecordedLibrary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    loaded: list[str] = []
    find_torchvision_in(tmp_path, monkeypatch, compiled=True)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    _imports._declare_torchvision_operators()
    assert loaded == [str(tmp_path / "_C.so")]
    assert library.made == [] and not _imports.torchvision_operators_missing()


@pytest.mark.parametrize("compiled", [True, False], ids=["library does not load", "no library"])
def test_missing_operators_are_declared_once(
    library: type[RecordedLibrary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    import torch

    def fail(path: str) -> None:
        raise OSError(f"{path}: undefined symbol")

    find_torchvision_in(tmp_path, monkeypatch, compiled=compiled)
    monkeypatch.setattr(torch.ops, "load_library", fail)
    for _ in range(2):
        _imports._declare_torchvision_operators()
    assert [(made.namespace, made.kind, made.schemas) for made in library.made] == [
        ("torchvision", "DEF", ["nms", "qnms"])
    ]
    assert _imports.torchvision_operators_missing()


def test_without_torchvision_nothing_happens(library: type[RecordedLibrary], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _imports._declare_torchvision_operators()
    assert library.made == []


def test_torchvision_transforms_work_here_whatever_the_operators_do() -> None:
    import torch
    import torchvision

    image = torchvision.transforms.functional.resize(torch.zeros(3, 8, 8), [4, 4])
    assert image.shape == (3, 4, 4)
    boxes, scores = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1)
    if _imports.torchvision_operators_missing():
        with pytest.raises(RuntimeError, match=r"load custom C\+\+ ops"):
            torchvision.ops.nms(boxes, scores, 0.5)
    else:
        assert torchvision.ops.nms(boxes, scores, 0.5).tolist() == [0]


def test_a_hooked_module_keeps_its_source_and_spec() -> None:
    import torchvision

    assert "torchvision" in inspect.getsource(torchvision)
    assert torchvision.__spec__ is not None and torchvision.__spec__.origin == torchvision.__file__


def test_installing_twice_installs_one_finder() -> None:
    _imports.install()
    _imports.install()
    assert sum(isinstance(finder, _imports._HookFinder) for finder in sys.meta_path) == 1


def test_a_hook_runs_at_once_if_its_module_is_already_there(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setitem(_imports._AFTER, "json", lambda: calls.append("json"))
    monkeypatch.setitem(_imports._AFTER, "no_such_module", lambda: calls.append("no"))
    _imports.install()
    assert calls == ["json"]


def test_hooks_run_before_and_after_a_modules_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    (tmp_path / "hooked_module.py").write_text("import builtins\nVALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(_imports._BEFORE, "hooked_module", lambda: calls.append("before"))
    monkeypatch.setitem(
        _imports._AFTER,
        "hooked_module",
        lambda: calls.append(sys.modules["hooked_module"].VALUE),  # type: ignore[attr-defined]
    )
    importlib.import_module("hooked_module")
    del sys.modules["hooked_module"]
    assert calls == ["before", 1]


def test_a_hook_waits_for_the_auto_class_that_is_importing_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where ``tokenization_auto`` comes to import ``modeling_auto``, and our classes need the tokenizer's."""
    calls: list[Any] = []
    (tmp_path / "inner_auto.py").write_text("")
    (tmp_path / "outer_auto.py").write_text("import inner_auto\nVALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_imports, "_AUTO", "outer_auto")
    monkeypatch.setitem(_imports._AFTER, "inner_auto", lambda: calls.append(sys.modules["outer_auto"].VALUE))  # type: ignore[attr-defined]
    importlib.import_module("outer_auto")
    for name in ("inner_auto", "outer_auto"):
        monkeypatch.delitem(sys.modules, name)
    assert calls == [1]


@pytest.mark.parametrize("first", ["tokenization_auto", "modeling_auto", "processing_auto", "image_processing_auto"])
def test_everything_is_registered_whichever_auto_module_comes_first(first: str) -> None:
    program = (
        f"import symphony_vlm, transformers.models.encoder_decoder, transformers.models.auto.{first}\n"
        "from transformers import AutoModelForCausalLM as C, AutoModelForImageTextToText as V, AutoProcessor\n"
        "from transformers.models.auto.processing_auto import PROCESSOR_MAPPING as P\n"
        "from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING as I\n"
        "print([len(m._extra_content) for m in (C._model_mapping, V._model_mapping, P, I)])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[1, 1, 1, 1]"


def test_bitsandbytes_is_imported_without_words() -> None:
    code = "import symphony_vlm, bitsandbytes"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_importing_the_package_is_fast_and_imports_nothing_heavy() -> None:
    program = (
        "import json, sys, time; start = time.perf_counter(); import symphony_vlm\n"
        "seconds = time.perf_counter() - start; dir(symphony_vlm); symphony_vlm.__version__\n"
        "from symphony_vlm import InputError, MoEConfig\n"
        "print(json.dumps([seconds, sorted({name.split('.')[0] for name in sys.modules})]))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(result.stdout)
    assert not {"torch", "transformers", "torchvision", "numpy", "PIL", "open_clip"} & set(modules)
    # Measured 0.03 s; torch alone would take more than a second.
    assert seconds < 0.7


@pytest.mark.parametrize("name", sv.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(sv, name) is not None
    assert name in dir(sv)


def test_an_unknown_name_is_an_ordinary_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lood'"):
        sv.lood  # noqa: B018
