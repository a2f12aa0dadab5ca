"""Documents of a packed batch: lengths, positions and windows, compared with transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import find_packed_sequence_indices, sliding_window_causal_mask_function
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from symphony_vlm.moe.documents import Documents, window_mask

IDS = torch.tensor([[0, 0, 0, 1, 2, 2, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 2, 2, 2, 2, 2, -1]])


def test_lengths_positions_and_padding_by_hand() -> None:
    documents = Documents.from_ids(IDS)
    assert documents.lengths == (3, 1, 2, 2, 8, 1, 1, 5, 1)
    assert documents.position_ids_BS.tolist() == [
        [0, 1, 2, 0, 0, 1, 0, 1],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 0, 0, 1, 2, 3, 4, 0],
    ]
    assert documents.is_real_BS.sum(1).tolist() == [6, 8, 7]


def test_rows_that_begin_with_the_id_with_which_the_row_before_ends_are_apart() -> None:
    assert Documents.from_ids(torch.tensor([[0, 0], [0, 1], [1, 2]])).lengths == (2, 1, 1, 1, 1)


def test_a_document_in_two_places_is_refused() -> None:
    with pytest.raises(ValueError, match="side by side"):
        Documents.from_ids(torch.tensor([[0, 1, 0]]))


def test_transformers_finds_the_same_documents_in_the_positions() -> None:
    documents = Documents.from_ids(IDS)
    positions = documents.position_ids_BS
    found = find_packed_sequence_indices(positions)
    assert found is not None
    same = IDS[:, :, None] == IDS[:, None, :]
    assert torch.equal(found[:, :, None] == found[:, None, :], same)
    (ends, _), (longest, _) = prepare_fa_kwargs_from_position_ids(positions)
    arguments = documents.flash_attention_arguments
    assert torch.equal(arguments["cu_seq_lens_q"], ends) and torch.equal(arguments["cu_seq_lens_k"], ends)
    assert arguments["cu_seq_lens_q"].dtype == torch.int32
    assert arguments["max_length_q"] == arguments["max_length_k"] == longest == 8


@pytest.mark.parametrize("window", [1, 3, 6])
def test_the_window_is_that_of_transformers(window: int) -> None:
    sees = sliding_window_causal_mask_function(window)
    mask = window_mask(7, window, torch.device("cpu"))
    assert mask is not None
    expected = [[bool(sees(0, 0, torch.tensor(q), torch.tensor(k))) for k in range(7)] for q in range(7)]
    assert mask[0, 0].tolist() == expected


def test_a_window_as_long_as_the_document_needs_no_mask() -> None:
    assert window_mask(7, 7, torch.device("cpu")) is window_mask(7, None, torch.device("cpu")) is None
