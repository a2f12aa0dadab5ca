"""What the single checks say, here and on machines that lack something."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from symphony_vlm.doctor import devices, libraries, surroundings
from symphony_vlm.doctor.devices import device_checks
from symphony_vlm.moe import fused

REPOSITORY = Path(__file__).parents[2]
REQUIREMENT = re.compile(r'^  "([A-Za-z0-9_.-]+)[^"]*",$', re.M)


def test_the_libraries_are_those_that_the_package_requires() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    block = text.partition("dependencies = [")[2].partition("]")[0]
    assert REQUIREMENT.findall(block) == list(libraries.REQUIRED)


def test_every_optional_library_is_of_an_extra_or_named_alone() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^([a-z-]+) = \[", text.partition("[project.optional-dependencies]")[2], re.M))
    for _, _, install in libraries.OPTIONAL.values():
        named = re.fullmatch(r"symphony-vlm\[([a-z-]+)\]", install)
        assert named is None or named.group(1) in extras


@pytest.mark.parametrize("name", ["numpy", "pillow", "opencv-python-headless", "safetensors", "tokenizers", "torch"])
def test_a_library_that_works_has_its_version_in_the_finding(name: str) -> None:
    outcome = libraries._try_required(name, libraries.REQUIRED[name], ">=0")
    assert outcome.status == "ok" and not outcome.remedy
    assert outcome.detail.startswith(importlib.metadata.version(name))


def test_a_library_of_another_version_is_a_warning_with_what_to_install() -> None:
    outcome = libraries._try_required("numpy", "numpy", ">=99")
    assert outcome.status == "warning"
    assert outcome.detail.endswith("and >=99 is needed") and outcome.remedy == "pip install 'numpy>=99'"


def test_a_library_that_is_not_there_is_absent() -> None:
    outcome = libraries._try_required("no-such-library", "numpy", ">=1")
    assert (outcome.status, outcome.remedy) == ("absent", "pip install 'no-such-library>=1'")
    outcome = libraries._try_optional("no-such-library", "numpy", "nothing", "symphony-vlm[x]")
    assert (outcome.status, outcome.detail) == ("absent", "for nothing")


def test_a_library_that_is_there_and_cannot_be_imported_is_broken_with_the_reason() -> None:
    outcome = libraries._try_optional("numpy", "numpy.no_such_module", "arrays", "numpy")
    assert outcome.status == "broken" and "No module named 'numpy.no_such_module'" in outcome.detail


def test_an_operation_that_gives_a_wrong_result_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safetensors.torch.load", lambda data: {"x": torch.zeros(3, dtype=torch.bfloat16)})
    outcome = libraries._try_required("safetensors", libraries.REQUIRED["safetensors"], "")
    assert outcome.status == "broken" and outcome.detail.endswith("RuntimeError: a tensor came back changed")


def test_the_sparse_layer_works_and_a_wrong_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.sparse_layer().status == "ok"

    def wrong(*arguments: Any) -> Any:
        return torch.ones(12, 16, requires_grad=True) * 1

    monkeypatch.setattr("symphony_vlm.moe.experts.Experts._segments", wrong)
    with pytest.raises(RuntimeError, match="differ from those of each token"):
        devices.sparse_layer()

    def missing(*arguments: Any) -> Any:
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr("symphony_vlm.moe.experts.Experts._segments", missing)
    outcome = devices.sparse_layer()
    assert outcome.status == "warning" and "no kernel for this device" in outcome.detail


def test_a_driver_without_a_build_for_it_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert devices.accelerators().status == "absent"
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    outcome = devices.accelerators()
    assert outcome.status == "warning" and "built for the CPU alone" in outcome.detail
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "finds no device" in devices.accelerators().detail


def test_no_compiler_is_no_fault_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert devices.cpp_compiler().status == "absent"


def test_compilation_is_tried_only_when_asked_for() -> None:
    compiled = [check.name for check in device_checks(compile_=True)][-2:]
    assert compiled == ["torch.compile", "fused experts"]
    assert not set(compiled) & {check.name for check in device_checks(compile_=False)}


def test_fused_experts_are_compared_with_the_plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused.is_available():
        pytest.skip("no C++ compiler here")
    outcome = devices.fused_experts()
    assert outcome.status == "ok" and "agree to" in outcome.detail
    # A quarter of each weight's share goes astray.
    wrong = lambda x_TD, weights_TK, *rest: fused.compute_fused(x_TD, 0.75 * weights_TK, *rest)  # noqa: E731
    monkeypatch.setattr("symphony_vlm.moe.experts.compute_fused", wrong)
    with pytest.raises(RuntimeError, match="fused experts differ from a product for each token"):
        devices.fused_experts()


def test_fused_experts_without_a_compiler_are_absent_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    outcome = devices.fused_experts()
    assert outcome.status == "absent" and "/no/such/compiler" in outcome.detail


def test_a_folder_that_cannot_be_written_to_is_broken(tmp_path: Path) -> None:
    assert surroundings.folder(str(tmp_path)).status in ("ok", "warning")
    outcome = surroundings.folder(str(tmp_path / "not there"))
    assert outcome.status == "broken" and "cannot be written to" in outcome.detail


def test_little_room_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 50 * 2**20, "total": 64 * 2**20})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    outcome = surroundings.folder(str(tmp_path))
    assert outcome.status == "warning" and outcome.detail.endswith("50 MiB free")
    if Path("/dev/shm").is_dir():
        outcome = surroundings.shared_memory()
        assert outcome.status == "warning" and outcome.detail.startswith("64 MiB")


def test_memory_that_deepspeed_has_left_behind_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 2**34, "total": 2**34})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert surroundings.shared_memory(tmp_path).status == "ok"
    for number in range(2):
        with (tmp_path / f"deepspeed_allreduce_buffer_0_localhost_{number}_0").open("wb") as file:
            file.truncate(2**29)  # sparse: takes no room
    outcome = surroundings.shared_memory(tmp_path)
    assert outcome.status == "warning"
    assert outcome.detail == "16.0 GiB, of which 2 buffers of DeepSpeed hold 1.0 GiB of memory"
    assert outcome.remedy.endswith(f"rm {tmp_path}/deepspeed_allreduce_buffer_*")


def test_the_hub_cache_says_whether_the_network_may_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "new" / "hub"))
    for offline, word in ((True, "offline: only what is there is used"), (False, "HF_HUB_OFFLINE is not set")):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        outcome = surroundings.hub_cache()
        assert outcome.status == "ok" and outcome.detail.endswith(word)
        assert outcome.detail.startswith(str(tmp_path / "new" / "hub"))
    assert not (tmp_path / "new").exists()


def test_other_pixels_than_the_published_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert surroundings.corruptions().status == "ok"
    wanted = {"canary": "other"}
    monkeypatch.setattr("symphony_vlm.corruptions.pixel_manifest.committed_manifest", lambda: wanted)
    assert surroundings.corruptions().status == "warning"


def test_every_recipe_is_read_and_none_at_all_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"\d+ recipes", surroundings.recipes().detail)
    monkeypatch.setattr("symphony_vlm.config.loading.list_recipes", list)
    with pytest.raises(RuntimeError, match="no recipe"):
        surroundings.recipes()


def test_frost_is_optional_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYMPHONY_VLM_FROST_DIR", str(tmp_path))
    outcome = surroundings.frost_textures()
    assert outcome.status == "absent" and "frost1.png" in outcome.remedy


def test_an_untried_python_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert surroundings.python().status == "ok"
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    assert surroundings.python().status == "warning"
