"""CIDEr and BLEU of captions, by pycocoevalcap and sacrebleu (the extra ``captions``).

COCO's own tokenizer needs Java. Here both figures are of the same tokens: sacrebleu's ``13a`` tokenizer, lower case,
tokens without a letter or digit dropped (as COCO's tokenizer drops punctuation). That is close to COCO's figures, not
equal to them: contractions stay one word.

Shape letters: N captions; order n of n-grams, 1 to 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.statistics import Floats

__all__ = ["bleu", "bleu_statistics", "check_libraries", "cider", "sentence_bleu", "tokenize"]

ORDER = 4


def _missing(error: ImportError) -> InputError:
    return InputError(
        f"captions are scored with pycocoevalcap and sacrebleu, and {error.name!r} is not installed",
        where="task captions",
        remedy="Run: pip install 'symphony-vlm[captions]'",
    )


@lru_cache(maxsize=1)
def _tools() -> tuple[Any, Any, Any]:
    """Tokenizer, BLEU of tokenized text, class of CIDEr."""
    try:
        from pycocoevalcap.cider.cider import Cider
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    except ImportError as error:
        raise _missing(error) from error
    return Tokenizer13a(), BLEU(tokenize="none", force=True), Cider


def check_libraries() -> None:
    """The error of a missing library, before a model has answered anything."""
    _tools()


def tokenize(text: str) -> str:
    """The tokens that are compared, with spaces between them."""
    tokens = _tools()[0](text.strip()).lower().split()
    return " ".join(token for token in tokens if any(character.isalnum() for character in token))


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """CIDEr-D of each caption (Vedantam et al., arXiv 1411.5726), 0 to 10; a corpus' score is the mean.

    An n-gram's weight comes from how many pictures have it among their references, so that the score of a caption
    depends on the corpus: of one picture alone it is 0.

    Args:
        captions: N texts, not tokenized.
        references: At least one text for each.

    Returns:
        ``[N]``.
    """
    given = {number: [tokenize(text)] for number, text in enumerate(captions)}
    wanted = {number: [tokenize(text) for text in texts] for number, texts in enumerate(references)}
    _, scores = _tools()[2]().compute_score(wanted, given)
    return np.asarray(scores, dtype=np.float64)


def bleu_statistics(caption: str, references: Sequence[str]) -> Floats:
    """What BLEU needs of one caption: matches and n-grams of each order, its length, and its closest reference's.

    Returns:
        ``[10]``; the sum over captions is the corpus'.
    """
    score = _tools()[1].corpus_score([tokenize(caption)], [[tokenize(text)] for text in references])
    return np.array([*score.counts, *score.totals, score.sys_len, score.ref_len], dtype=np.float64)


def bleu(sums: Floats) -> Floats:
    """BLEU-4 of a corpus (Papineni et al. 2002), 0 to 100, with sacrebleu's default smoothing.

    Args:
        sums: ``[..., 10]`` sums of `bleu_statistics`, perhaps with whole weights, as a bootstrap has.

    Returns:
        ``[...]``; NaN where there is no reference.
    """
    compute = _tools()[1].compute_bleu
    flat = sums.reshape(-1, sums.shape[-1])
    values = [_compute(compute, row.tolist(), effective_order=False) if row[-1] > 0 else np.nan for row in flat]
    return np.array(values).reshape(sums.shape[:-1])


def sentence_bleu(caption: str, references: Sequence[str]) -> float:
    """BLEU of one caption, 0 to 100, over the orders it has n-grams of."""
    statistics = bleu_statistics(caption, references).tolist()
    return _compute(_tools()[1].compute_bleu, statistics, effective_order=True) if statistics[-1] else 0.0


def _compute(compute: Any, row: Sequence[float], *, effective_order: bool) -> float:
    whole = [round(value) for value in row]
    matches, totals, (length, reference_length) = whole[:ORDER], whole[ORDER : 2 * ORDER], whole[2 * ORDER :]
    return float(
        compute(matches, totals, length, reference_length, smooth_method="exp", effective_order=effective_order).score
    )
