"""What a template and a tokenizer make of the records: lengths, labels, and what the limit on length would cut."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from symphony_vlm.data.conversation import IGNORE_INDEX, EncodedConversation, encode_conversation
from symphony_vlm.data.sample import ImageRef, Sample
from symphony_vlm.data.templates import Layout
from symphony_vlm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenCheck", "Tokenization", "percentiles"]


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """How records become tokens."""

    tokenizer: PreTrainedTokenizerBase
    template: Layout
    image_token_id: int
    num_image_tokens: int
    """Tokens in the place of each image; where images become tiles, of one tile."""
    count_image_tokens: Callable[[Sequence[ImageRef]], list[int] | None] | None = None
    """Tokens of each image, where its size matters; None, or the result None: `num_image_tokens`."""
    max_length: int | None = None

    def image_tokens(self, sample: Sample) -> list[int]:
        """Tokens of each of the sample's images."""
        counted = self.count_image_tokens(sample.images) if self.count_image_tokens else None
        return [self.num_image_tokens] * len(sample.images) if counted is None else counted

    def encode(self, sample: Sample) -> EncodedConversation:
        """The whole sample, whatever its length.

        Raises:
            InputError: An answer does not survive tokenisation, or nothing is supervised.
        """
        return encode_conversation(
            sample.messages,
            template=self.template,
            tokenizer=self.tokenizer,
            image_token_id=self.image_token_id,
            num_image_tokens=self.image_tokens(sample),
            origin=sample.origin,
        )


class TokenCheck:
    """Tokenises records one by one and keeps their lengths.

    Args:
        tokenization: How.
    """

    def __init__(self, tokenization: Tokenization) -> None:
        self.tokenization = tokenization
        self.lengths = array("I")
        """Tokens of each record, image placeholders included, before any cut."""
        self.n_supervised = 0
        self.n_image_tokens = 0
        self.n_truncated = 0
        """Records longer than ``max_length``."""

    def check(self, sample: Sample) -> InputError | None:
        """Counts one record; returns why training could not use it, if so."""
        try:
            encoded = self.tokenization.encode(sample)
        except InputError as error:
            nothing = "no supervised token" in error.problem
            error.kind = error.kind or ("nothing_supervised" if nothing else "tokens")
            return error
        ids, labels = encoded.input_ids, encoded.labels
        self.lengths.append(len(ids))
        self.n_supervised += len(labels) - labels.count(IGNORE_INDEX)
        self.n_image_tokens += ids.count(self.tokenization.image_token_id) if sample.images else 0
        limit = self.tokenization.max_length
        if limit is None or len(ids) <= limit:
            return None
        self.n_truncated += 1
        return self._problem_of_cut(sample, ids, labels, limit)

    def _problem_of_cut(self, sample: Sample, ids: list[int], labels: list[int], limit: int) -> InputError | None:
        remedy = "Raise max_length, or split the record."
        if sample.images and self.tokenization.image_token_id in ids[limit:]:
            problem = f"{len(ids)} tokens, and the limit of {limit} would cut an image's tokens"
            return InputError(problem, where=sample.origin, remedy=remedy, kind="image_cut")
        if all(label == IGNORE_INDEX for label in labels[:limit]):
            problem = f"{len(ids)} tokens, and nothing is supervised within the limit of {limit}"
            return InputError(problem, where=sample.origin, remedy=remedy, kind="nothing_supervised")
        return None

    @property
    def supervised_share(self) -> float | None:
        """Supervised tokens over all tokens, image placeholders included; None if there are none."""
        total = sum(self.lengths)
        return self.n_supervised / total if total else None

    def to_dict(self) -> dict[str, Any]:
        """For ``check.json``."""
        made = self.tokenization
        return {
            "tokenizer": str(made.tokenizer.name_or_path),
            "template": made.template.name,
            "num_image_tokens": made.num_image_tokens,
            "max_length": made.max_length,
            "records": len(self.lengths),
            "tokens": int(sum(self.lengths)),
            "supervised_tokens": self.n_supervised,
            "image_tokens": self.n_image_tokens,
            "longer_than_max_length": self.n_truncated,
            "lengths": percentiles(self.lengths),
        }


def percentiles(values: array[int]) -> dict[str, float]:
    """Mean, least, median, 90th, 95th and 99th percentile and greatest; nothing of no values."""
    if not values:
        return {}
    numbers = np.frombuffer(values, dtype=np.dtype(values.typecode))
    p50, p90, p95, p99 = (float(p) for p in np.percentile(numbers, (50, 90, 95, 99), method="inverted_cdf"))
    return {
        "mean": round(float(numbers.mean()), 1),
        "min": float(numbers.min()),
        "p50": p50,
        "p90": p90,
        "p95": p95,
        "p99": p99,
        "max": float(numbers.max()),
    }
