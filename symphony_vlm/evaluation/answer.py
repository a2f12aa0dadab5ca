"""An answer's text with what is known of how it came about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["Answer", "prompt_facts"]


class Answer(str):
    """An answer's text that also knows how it came about.

    Args:
        text: the answer.
        facts: for the record: ``prompt_sha256``, ``n_prompt_tokens``, ``n_new_tokens``, ``stop_reason`` and others.
    """

    facts: Mapping[str, Any]

    def __new__(cls, text: str, facts: Mapping[str, Any]) -> Answer:
        """A string with facts."""
        answer = super().__new__(cls, text)
        answer.facts = facts
        return answer


def prompt_facts(inputs: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Of each row of padded ``input_ids`` and ``attention_mask``: its length and the sha256 of its ids as JSON."""
    facts = []
    for ids, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
        prompt = [token for token, real in zip(ids, mask, strict=True) if real]
        digest = hashlib.sha256(json.dumps(prompt).encode()).hexdigest()
        facts.append({"prompt_sha256": digest, "n_prompt_tokens": len(prompt)})
    return facts
