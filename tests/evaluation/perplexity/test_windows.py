"""Windows score each token once, as transformers' guide does, or as the published full evaluation does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.perplexity.windows import Window, sliding_windows, stream_windows


@given(st.integers(2, 200), st.integers(2, 40), st.data())
def test_every_token_but_the_first_is_scored_exactly_once(num_tokens: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context - 1))
    windows = sliding_windows(num_tokens, context=context, stride=stride)
    assert [t for w in windows for t in range(w.first_target, w.end)] == list(range(1, num_tokens))
    for window in windows:
        assert window.begin < window.first_target and window.end - window.begin <= context
    # Whoever is not in the first window sees at least context - stride tokens.
    assert all(w.first_target - w.begin >= context - stride for w in windows[1:])


@given(st.integers(2, 200), st.integers(2, 40), st.data())
def test_the_windows_are_those_of_the_guides_loop(num_tokens: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    expected, previous = [], 0
    for begin in range(0, num_tokens, stride):  # the loop of transformers' "Perplexity of fixed-length models"
        end = min(begin + context, num_tokens)
        target_length = end - previous
        labels = [position if position >= end - target_length else -100 for position in range(begin, end)]
        expected.append([position for position in labels[1:] if position != -100])
        previous = end
        if end == num_tokens:
            break
    found = [list(range(w.first_target, w.end)) for w in sliding_windows(num_tokens, context=context, stride=stride)]
    assert found == [targets for targets in expected if targets]


def test_windows_that_do_not_overlap_lose_their_first_tokens() -> None:
    assert sliding_windows(9, context=3, stride=3) == [Window(0, 3, 1), Window(3, 6, 4), Window(6, 9, 7)]


def test_streams_drop_incomplete_windows_and_the_remainder() -> None:
    # Three streams of 10 of 32 tokens; windows of 4 in steps of 2 fill each to its end.
    windows = stream_windows(32, streams=3, context=4, stride=2)
    assert sum(w.num_targets for w in windows) == 3 * 9 and max(w.end for w in windows) == 30
    # Three streams of 9: the window of 8 to 9 is incomplete.
    windows = stream_windows(27, streams=3, context=4, stride=2)
    assert sum(w.num_targets for w in windows) == 3 * 7
    assert all(w.end - w.begin == 4 for w in windows)
    assert not any(w.begin < edge < w.end for w in windows for edge in (9, 18))


def test_the_published_coverage_of_wikitext_103() -> None:
    """245,569 test tokens in 48 streams and blocks of 512: nine blocks of each stream, about 90 %; in 8 about 98 %."""
    for streams, coverage in ((48, 0.90), (8, 0.98)):
        windows = stream_windows(245_569, streams=streams, context=1024, stride=512)
        assert sum(w.num_targets for w in windows) / 245_569 == pytest.approx(coverage, abs=0.006)


def test_impossible_windows_are_refused() -> None:
    with pytest.raises(InputError, match="--context"):
        sliding_windows(10, context=1, stride=1)
    with pytest.raises(InputError, match="--stride: 5 must be from 1 to the context"):
        sliding_windows(10, context=4, stride=5)
    with pytest.raises(InputError, match="are 2 in each, less than the context"):
        stream_windows(10, streams=4, context=4, stride=2)
