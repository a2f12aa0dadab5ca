"""Documents of a packed batch: lengths, positions and windows, compared with transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import find_packed_sequence_indices, sliding_window_causal_mask_function
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

import symphony_vlm as sv
from symphony_vlm.model.attention import attention_by_document, document_arguments
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.documents import Documents, window_mask
from symphony_vlm.moe.recording import sparse_layers

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


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_a_token_graph_listens_within_the_document_and_the_window(
    family: str, language_model: Callable[..., PreTrainedModel], token_ids: Callable[..., Tensor]
) -> None:
    """What a document's tokens choose in a packed row is what they choose alone, where attention has a window too."""
    model = language_model(family, **({} if family == "llama" else {"sliding_window": 3}))
    sv.upcycle_(model, MoEConfig(router="similarity_smoe", expert_init_noise=1.0))
    with torch.no_grad():
        for _, layer in sparse_layers(model):
            layer.router.gate.weight *= 50
    ids = token_ids(*IDS.shape)
    documents = Documents.from_ids(IDS)

    def scores(**inputs: Any) -> list[Tensor]:
        with torch.no_grad():
            model(**inputs)
        assert model.routing is not None
        return [out.scores_TE.unflatten(0, inputs["input_ids"].shape) for out in model.routing.outputs.values()]

    with attention_by_document(model):
        together = scores(input_ids=ids, **document_arguments(documents, model))
    assert model.routing is not None and model.routing.token_mask_T is not None
    assert torch.equal(model.routing.token_mask_T, IDS.flatten() >= 0)
    # Two layers of fp32 sums in another order.
    for row, start, end in ((0, 0, 3), (0, 4, 6), (1, 0, 8), (2, 2, 7)):
        for packed, alone in zip(together, scores(input_ids=ids[row : row + 1, start:end]), strict=True):
            torch.testing.assert_close(packed[row, start:end], alone[0], atol=1e-5, rtol=0)
