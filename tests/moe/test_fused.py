"""`fused` against one loop in double precision, against what it replaces, and where it cannot be built."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from symphony_vlm.errors import InputError
from symphony_vlm.moe import fused
from symphony_vlm.moe.experts import Experts
from tests.moe.test_experts import TOLERANCES, check_against_the_oracle, make_experts, oracle

needs_a_compiler = pytest.mark.skipif(not fused.is_available(), reason="no C++ compiler here")


def experts_of(width: int = 16, inner: int = 24, *, num_experts: int = 5, name: str = "fused") -> Experts:
    experts = Experts(num_experts, width, inner, "silu", implementation=name)
    torch.manual_seed(0)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return experts


def inputs(num_tokens: int, width: int = 16, *, num_experts: int = 5, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(num_tokens, width, generator=generator)
    weights_TK = torch.rand(num_tokens, k, generator=generator)
    indices_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(k).indices
    return x_TD, weights_TK, indices_TK


def trained(experts: Experts, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> list[Tensor]:
    """Output and gradients."""
    x_TD, weights_TK = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
    y_TO = experts(x_TD, weights_TK, indices_TK)
    return [y_TO, *torch.autograd.grad(y_TO.square().sum(), [x_TD, weights_TK, *experts.parameters()])]


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        # Sums of some hundred fp32 products in two orders, each rounded by 6e-8 of its size.
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()


@needs_a_compiler
@pytest.mark.parametrize("output_size", [None, 40])
def test_it_equals_the_loop_in_output_and_gradients(output_size: int | None) -> None:
    check_against_the_oracle(make_experts("gated", output_size=output_size, implementation="fused"), torch.float32)


@needs_a_compiler
@pytest.mark.parametrize("inner", [1, 7, 16, 33])
@pytest.mark.parametrize("width", [1, 6, 17])
def test_widths_that_are_no_multiple_of_a_vector(width: int, inner: int) -> None:
    experts, arguments = experts_of(width, inner), inputs(40, width)
    exact = experts_of(width, inner).double()
    x_TD, weights_TK, indices_TK = arguments
    expected = oracle(exact, x_TD.double(), weights_TK.double(), indices_TK)
    assert (experts(*arguments) - expected).abs().max() <= TOLERANCES[torch.float32] * expected.abs().max()
    close(trained(experts, *arguments), trained(experts_of(width, inner, name="segments"), *arguments))


@needs_a_compiler
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 300])
def test_any_number_of_tokens_also_without_gradients(num_tokens: int) -> None:
    arguments = inputs(num_tokens)
    with torch.no_grad():
        ours, theirs = experts_of()(*arguments), experts_of(name="segments")(*arguments)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(experts_of()(*arguments), ours, atol=0, rtol=0)


@needs_a_compiler
def test_it_is_what_is_computed_and_not_segments_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Experts, "_segments", lambda *_: pytest.fail("segments were computed"))
    trained(experts_of(), *inputs(9))


@needs_a_compiler
def test_no_token_leaves_zero_gradients_and_so_does_an_expert_that_nobody_chose() -> None:
    experts = experts_of()
    x_TD, weights_TK, indices_TK = inputs(0)
    experts(x_TD.requires_grad_(), weights_TK, indices_TK).sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in experts.parameters())
    experts.zero_grad()
    x_TD, weights_TK, _ = inputs(8)
    experts(x_TD, weights_TK, torch.tensor([[3, 1]] * 8)).sum().backward()
    for weight in experts.parameters():
        assert weight.grad is not None
        assert not weight.grad[[0, 2, 4]].any() and weight.grad[[1, 3]].abs().flatten(1).max(1).values.min() > 0


@needs_a_compiler
@pytest.mark.parametrize("frozen", ["x", "weights", "up", "down", "both"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen: str) -> None:
    experts, (x_TD, weights_TK, indices_TK) = experts_of(), inputs(30)
    everything = dict(
        zip(("y", "x", "weights", "up", "down"), trained(experts, x_TD, weights_TK, indices_TK), strict=True)
    )
    parts = {"x": x_TD, "weights": weights_TK, "up": experts.gate_up_proj, "down": experts.down_proj}
    off = ("up", "down") if frozen == "both" else (frozen,)
    for name, part in parts.items():
        part.requires_grad_(name not in off)
    experts(x_TD, weights_TK, indices_TK).square().sum().backward()
    for name, part in parts.items():
        assert (part.grad is None) == (name in off)
        assert part.grad is None or torch.equal(part.grad, everything[name])


@needs_a_compiler
def test_inputs_that_do_not_lie_in_order() -> None:
    x_TD, weights_TK, indices_TK = inputs(30)
    scattered = [part.T.contiguous().T for part in (x_TD, weights_TK, indices_TK)]
    assert not scattered[0].is_contiguous()
    y_TO = experts_of()(*scattered)
    assert torch.equal(y_TO, experts_of()(x_TD, weights_TK, indices_TK))
    scattered[0].requires_grad_()
    # The gradient of a sum is expanded from one number.
    first, second = (torch.autograd.grad(experts_of()(*scattered).sum(), scattered[0])[0] for _ in range(2))
    assert torch.equal(first, second) and first.abs().sum() > 0


@needs_a_compiler
def test_under_gradient_checkpointing_and_accumulation_gradients_have_the_same_bits() -> None:
    experts, (x_TD, weights_TK, indices_TK) = experts_of(), inputs(30)
    plain = trained(experts, x_TD, weights_TK, indices_TK)
    x_TD.requires_grad_(), weights_TK.requires_grad_()
    for _ in range(2):
        y_TO: Any = checkpoint(experts, x_TD, weights_TK, indices_TK, use_reentrant=False)
        y_TO.square().sum().backward()
    for part, once in zip((x_TD, weights_TK, *experts.parameters()), plain[1:], strict=True):
        assert part.grad is not None and torch.equal(part.grad, once + once)


@needs_a_compiler
def test_two_runs_have_the_same_bits_also_by_several_threads() -> None:
    """Of another number of threads the matrix library's products may differ, in a backward pass, for `segments` too."""
    experts, arguments = experts_of(), inputs(200)
    number = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = trained(experts, *arguments)
        torch.set_num_threads(3)
        first, second = (trained(experts, *arguments) for _ in range(2))
    finally:
        torch.set_num_threads(number)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first[0], alone[0])
    close(first, alone)


@needs_a_compiler
def test_large_gates_saturate_and_what_is_not_a_number_is_not_hidden() -> None:
    experts = experts_of()
    x_TD, weights_TK, indices_TK = inputs(20)
    assert all(part.isfinite().all() for part in trained(experts, 1e4 * x_TD, weights_TK, indices_TK))
    x_TD[3] = float("nan")
    y_TO, grad_x_TD, *_ = trained(experts, x_TD, weights_TK, indices_TK)
    for rows in (y_TO, grad_x_TD):
        assert rows[3].isnan().all() and rows[[i for i in range(20) if i != 3]].isfinite().all()


@needs_a_compiler
def test_a_weight_of_zero_has_its_gradient() -> None:
    x_TD, weights_TK, indices_TK = inputs(20)
    weights_TK[4, 1] = 0.0
    ours = trained(experts_of(), x_TD, weights_TK, indices_TK)
    close(ours, trained(experts_of(name="segments"), x_TD, weights_TK, indices_TK))
    assert ours[2][4, 1].abs() > 0


@needs_a_compiler
def test_experts_that_do_not_exist_and_one_that_comes_twice_are_errors() -> None:
    x_TD, weights_TK, indices_TK = inputs(6)
    for wrong in (5, -1):
        indices_TK[2, 0] = wrong
        with pytest.raises(IndexError, match=f"expert {wrong} of 5 does not exist"):
            experts_of()(x_TD, weights_TK, indices_TK)
    indices_TK[2] = torch.tensor([3, 3])
    with pytest.raises(ValueError, match="token 2 has expert 3 twice"):
        experts_of()(x_TD, weights_TK, indices_TK)


@needs_a_compiler
def test_for_the_backward_pass_it_keeps_two_fifths_of_what_segments_keep() -> None:
    """With experts twice as wide as tokens; weights are not counted, and inputs, which somebody else keeps, neither."""
    kept = {}
    for name in ("fused", "segments"):
        experts, (x_TD, weights_TK, indices_TK) = experts_of(64, 128, name=name), inputs(200, 64)
        mine = {part.untyped_storage().data_ptr() for part in (x_TD, weights_TK, indices_TK, *experts.parameters())}
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, mine: set[int] = mine, storages: dict[int, int] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in mine:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y_TO = experts(x_TD.requires_grad_(), weights_TK.requires_grad_(), indices_TK)
        kept[name] = sum(storages.values())
        del y_TO
    assert kept["fused"] == 2 * 200 * 2 * 128 * 4
    assert kept["fused"] <= 0.42 * kept["segments"]


@needs_a_compiler
def test_sixteen_bits_and_autocast_are_computed_as_segments_and_it_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fused.warn_of_segments.cache_clear()
    x_TD, weights_TK, indices_TK = inputs(20)
    low = [experts_of(name=name).bfloat16()(x_TD.bfloat16(), weights_TK, indices_TK) for name in ("fused", "segments")]
    assert low[0].dtype == torch.bfloat16 and torch.equal(*low)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = [experts_of(name=name)(x_TD, weights_TK, indices_TK) for name in ("fused", "segments")]
    assert mixed[0].dtype == torch.bfloat16 and torch.equal(*mixed)
    assert caplog.text.count("'segments' computes the experts in torch.bfloat16 on cpu") == 1


@pytest.mark.parametrize("form", [{"gated": False}, {"bias": True}, {"hidden_act": "gelu"}], ids=str)
def test_experts_of_another_form_are_an_error_and_not_another_result(form: dict[str, Any]) -> None:
    experts = Experts(5, 16, 24, **({"hidden_act": "silu", "implementation": "fused"} | form))
    with pytest.raises(InputError, match=r"experts_implementation: 'fused' computes gated SiLU experts without biases"):
        experts(*inputs(3))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine that has not compiled anything yet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    # What was asked before stays as it was for the other tests.
    monkeypatch.setattr(fused, "is_available", fused.is_available.__wrapped__)
    yield tmp_path


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false", "complaining"])
def test_without_a_compiler_that_works_segments_are_computed_and_it_says_so(
    compiler: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if compiler == "complaining":
        script = elsewhere / compiler
        script.write_text("#!/bin/sh\necho 'fused.cpp:13: fatal error: ATen/ATen.h: no such file' >&2; exit 1\n")
        script.chmod(0o755)
        compiler = str(script)
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING):
        assert not fused.is_available()
    assert "'fused' is not available" in caplog.text and compiler in caplog.text and "'segments'" in caplog.text
    if "complaining" in compiler:
        assert "fatal error: ATen/ATen.h: no such file" in caplog.text
    monkeypatch.setattr("symphony_vlm.moe.experts.is_available", fused.is_available)
    arguments = inputs(20)
    ours, theirs = (trained(experts_of(name=name), *arguments) for name in ("fused", "segments"))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not list((elsewhere / "extensions").rglob("*.so"))


@needs_a_compiler
def test_what_a_process_has_compiled_the_next_one_loads(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = fused._library()
    fused._compile(library)
    assert [path.name for path in library.parent.iterdir()] == [library.name]
    monkeypatch.setenv("CXX", "/no/such/compiler")
    code = "from symphony_vlm.moe import fused; print(fused.is_available())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@needs_a_compiler
def test_a_file_that_is_no_library_is_told(elsewhere: Path, caplog: pytest.LogCaptureFixture) -> None:
    library = fused._library()
    library.parent.mkdir(parents=True)
    library.write_bytes(b"half a library")
    assert not fused.is_available()
    assert str(library) in caplog.text


def test_another_version_of_torch_or_of_the_source_is_compiled_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = {fused._library().name}
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    names.add(fused._library().name)
    other = tmp_path / "fused.cpp"
    other.write_text("// another")
    monkeypatch.setattr(fused, "SOURCE", other)
    names.add(fused._library().name)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    names.add(fused._library().name)
    assert len(names) == 4
