"""The loss that an attack on a picture raises: cross entropy of the reference answer, pixels as variables.

Shape letters: N pictures, H, W height and width, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from symphony_vlm.data.conversation import IGNORE_INDEX
from symphony_vlm.data.sample import Message, TextPart
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.model.loss import targets_of
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["ReferenceLoss", "reference_answer"]


def reference_answer(item: EvaluationItem) -> str:
    """The most frequent of the accepted answers, the first of equals."""
    return Counter(item.answers).most_common(1)[0][0]


class ReferenceLoss:
    """Mean cross entropy of an item's reference answer after its prompt, as a function of the pixels.

    Dropout and router noise are off, the router losses are no part of it, and no parameter gets a gradient.

    Args:
        model: with its processor, one square a picture.
        item: with at least one picture and an answer.
    """

    def __init__(self, model: SymphonyVLMForConditionalGeneration, item: EvaluationItem) -> None:
        assert model.processor is not None
        assert not model.training
        self._model = model
        answer = Message(role="assistant", parts=(TextPart(text=reference_answer(item)),))
        encoded = model.processor.encode([*item.messages, answer], origin=f"item {item.id!r}")
        self._ids_1S = torch.tensor([encoded.input_ids], device=model.device)
        targets_1S = targets_of(torch.tensor([encoded.labels]), IGNORE_INDEX)
        # Of the logits before the answer nothing is needed, and with a large vocabulary they are large.
        first = int((targets_1S[0] != IGNORE_INDEX).nonzero()[0])
        self._targets_S = targets_1S[0, first:].to(model.device)

    def squares(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 ``[H, W, 3]`` after the geometric part of preprocessing: fp32 ``[N, 3, size, size]`` in [0, 1]."""
        processor = self._model.processor
        assert processor is not None
        prepared = [processor.image_processor.prepare(Image.fromarray(image)) for image in images]
        stacked = torch.from_numpy(np.stack(prepared)).permute(0, 3, 1, 2)
        return (stacked.float() / 255).to(self._model.device)

    def features(self, z_N3HW: Tensor) -> list[Tensor]:
        """What the language model reads of pictures of [0, 1]; for 8-bit values the same as without an attack."""
        processor = self._model.processor
        assert processor is not None
        images = processor.image_processor
        mean = torch.tensor(images.image_mean, device=z_N3HW.device).view(3, 1, 1)
        std = torch.tensor(images.image_std, device=z_N3HW.device).view(3, 1, 1)
        return self._model.get_image_features((z_N3HW * (255 * images.rescale_factor) - mean) / std)

    def __call__(self, z_N3HW: Tensor) -> Tensor:
        """The loss, a scalar."""
        output = self._model(
            input_ids=self._ids_1S,
            image_features=self.features(z_N3HW),
            attention_mask=torch.ones_like(self._ids_1S),
            use_cache=False,
            logits_to_keep=len(self._targets_S),
        )
        return F.cross_entropy(output.logits[0].float(), self._targets_S, ignore_index=IGNORE_INDEX)

    def with_gradient(self, z_N3HW: Tensor) -> tuple[float, Tensor]:
        """The loss and its gradient at the pixels."""
        variable = z_N3HW.detach().clone().requires_grad_()
        with torch.enable_grad(), _frozen(self._model):
            loss = self(variable)
            (gradient,) = torch.autograd.grad(loss, variable)
        return float(loss.detach()), gradient

    @torch.no_grad()
    def value(self, z_N3HW: Tensor) -> float:
        """The loss without a gradient."""
        return float(self(z_N3HW))


@contextmanager
def _frozen(model: SymphonyVLMForConditionalGeneration) -> Iterator[None]:
    """Without gradients of parameters, for which activations would be kept."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
