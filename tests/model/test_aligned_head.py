"""A head with rows of zeros added gives the same logits and gradients, and is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from symphony_vlm.model import aligned_head as module
from symphony_vlm.model.aligned_head import aligned_head
from symphony_vlm.model.loss import only_supervised_logits


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_misaligned", lambda head: head.weight.shape[0] % 8 != 0)


def head_of(vocab_size: int, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, vocab_size, bias=bias)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33])
def test_logits_and_gradients_are_the_same(vocab_size: int, bias: bool) -> None:
    head = head_of(vocab_size, bias=bias)
    hidden = torch.randn(2, 5, 16, requires_grad=True)
    direction = torch.randn(2, 5, vocab_size)

    def run() -> list[torch.Tensor]:
        logits = head(hidden)
        return [logits, *torch.autograd.grad((logits * direction).sum(), [hidden, *head.parameters()])]

    expected = run()
    with aligned_head(head):
        assert ("forward" in vars(head)) == (vocab_size % 8 != 0)
        found = run()
        assert found[0].stride(-2) % 8 == 0
    assert "forward" not in vars(head)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        # The same sums of 16, 10 and at most 33 fp32 products of numbers around 1, in the order of another kernel.
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_head_is_left_as_it_was_after_an_error() -> None:
    head = head_of(33)
    with pytest.raises(RuntimeError, match="stop"), aligned_head(head):
        raise RuntimeError("stop")
    assert "forward" not in vars(head)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_supervised_logits_come_from_it() -> None:
    head = head_of(33)
    hidden_BSD, supervised_BS = torch.randn(2, 3, 16), torch.tensor([[True, False, True], [False, False, True]])
    with only_supervised_logits(head, supervised_BS):
        logits_1NV = head(hidden_BSD)
    assert logits_1NV.stride(-2) == 40
    torch.testing.assert_close(logits_1NV[0], head(hidden_BSD)[supervised_BS], atol=2e-6, rtol=1e-5)


def test_what_is_no_plain_linear_layer_on_a_gpu_is_left_alone() -> None:
    class Quantized(nn.Linear):
        pass

    def on_cuda(head: nn.Linear) -> nn.Linear:
        weight = type("OnCuda", (), {"is_cuda": True, "shape": head.weight.shape})()
        head._parameters.pop("weight")
        object.__setattr__(head, "weight", weight)
        return head

    assert module._is_misaligned(on_cuda(head_of(33)))
    assert not module._is_misaligned(on_cuda(head_of(32)))
    assert not module._is_misaligned(on_cuda(Quantized(16, 33)))
    assert not module._is_misaligned(head_of(33))
    wrapped = on_cuda(head_of(33))
    vars(wrapped)["forward"] = wrapped.forward  # as accelerate's hooks do
    assert not module._is_misaligned(wrapped)
