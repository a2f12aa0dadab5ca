"""Nucleus sampling by inversion: the right tokens with the right frequencies."""

from __future__ import annotations

import pytest
import torch

from symphony_vlm.serving.sampling import RowSampler, SamplingSettings, draw

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


def frequencies(temperature: float, top_p: float, count: int = 20_000) -> torch.Tensor:
    """Of tokens drawn with evenly spaced numbers instead of random ones: exact to one count for each token."""
    uniforms = (torch.arange(count) + 0.5) / count
    scores = PROBABILITIES.log().expand(count, -1)
    ones = torch.ones(count)
    tokens = draw(scores, temperature * ones, top_p * ones, uniforms)
    return torch.bincount(tokens, minlength=5) / count


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    expected = (PROBABILITIES.log() / temperature).softmax(-1)
    # Each boundary between tokens may fall one of 20,000 steps to either side, and fp32 adds its rounding.
    torch.testing.assert_close(frequencies(temperature, 1.0), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.0, [1]), (0.39, [1]), (0.41, [1, 3]), (0.84, [1, 3, 4]), (0.86, [0, 1, 3, 4])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]) -> None:
    expected = torch.zeros(5)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    torch.testing.assert_close(frequencies(1.0, top_p), expected, atol=2e-4, rtol=0)


def test_the_ends_of_the_interval_give_tokens_that_may_come() -> None:
    scores = torch.tensor([[0.0, float("-inf"), 0.0, float("-inf")]]).expand(2, -1)
    tokens = draw(scores, torch.ones(2), torch.ones(2), torch.tensor([0.0, 1.0]))
    assert tokens.tolist() == [0, 2]


def test_rows_have_their_own_settings_and_numbers() -> None:
    settings = [
        SamplingSettings(max_tokens=1),
        SamplingSettings(max_tokens=1, temperature=1.0, seed=1),
        SamplingSettings(max_tokens=1, temperature=1e-9, seed=1),
        SamplingSettings(max_tokens=1, temperature=1.0, seed=2),
    ]
    scores = PROBABILITIES.log().expand(4, -1)
    sampler = RowSampler(settings)
    steps = torch.stack([sampler(torch.zeros(4, 1), scores).argmax(-1) for _ in range(50)], dim=1)
    assert set(steps[0].tolist()) == set(steps[2].tolist()) == {1}
    assert steps[1].tolist() != steps[3].tolist()
    alone = RowSampler(settings[3:])
    assert steps[3].tolist() == [alone(torch.zeros(1, 1), scores[:1]).argmax().item() for _ in range(50)]
    only = sampler(torch.zeros(4, 1), scores)
    assert (only == 0).sum(1).tolist() == [1] * 4
    assert torch.isneginf(only).sum(1).tolist() == [4] * 4
