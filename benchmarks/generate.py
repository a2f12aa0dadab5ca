"""Answers token by token: time to the first token, and tokens per second after it.

Prompts of a picture's features and some text, greedy answers of a fixed length. Two models with random weights: a dense
one in transformers' own classes, and a vision-language model with four experts, two for each token and each half
as wide, so that both do the same arithmetic per token. In a large batch every expert is hit, and a step reads twice the
dense layers' weights. On a CPU the sizes are those of the recipe ``instruct_small``, in fp32; on a GPU 1.4 and 2.5
billion parameters in bf16.

A growing cache is transformers' default. A static one has one size from the first token to the last; on a GPU the steps
with it are one compiled graph (``fullgraph``), replayed without the host. What compiling takes is told, not counted. A
contender that fails says why, and the others go on. In fp32 all caches must give the same tokens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, PreTrainedConfig, StaticCache

from benchmarks.measure import Case, Plan, Result, Work
from symphony_vlm.model.configuration import SymphonyVLMConfig
from symphony_vlm.model.vision import VisionConfig
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.moe.configuration import MoEConfig

__all__ = ["PLAN", "cases", "summary"]

PLAN = Plan(rounds=1, alternations=5, seconds=0.0)

DENSE, GROWING, STATIC = "dense, growing cache", "experts, growing cache", "experts, static cache"
DENSE_STATIC = "dense, static cache"

Answer = Callable[[int], Tensor]
"""Number of new tokens -> their ids ``[B, N]``."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one device's models and prompts."""

    hidden: int
    intermediate: int
    """Of an expert; the dense model's layer is twice as wide."""
    layers: int
    heads: tuple[int, int]
    """Of queries, and of keys and values."""
    vocabulary: int
    image_tokens: int
    text_tokens: int
    new_tokens: int
    batch_sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def prompt_tokens(self) -> int:
        """Length of a prompt."""
        return self.image_tokens + self.text_tokens


TINY = Sizes(
    hidden=32,
    intermediate=48,
    layers=2,
    heads=(2, 1),
    vocabulary=64,
    image_tokens=4,
    text_tokens=4,
    new_tokens=4,
    batch_sizes=(2,),
    dtype=torch.float32,
)
ON_CPU = Sizes(
    hidden=192,
    intermediate=512,
    layers=4,
    heads=(6, 2),
    vocabulary=4096,
    image_tokens=36,
    text_tokens=24,
    new_tokens=32,
    batch_sizes=(1, 16),
    dtype=torch.float32,
)
ON_GPU = Sizes(
    hidden=2048,
    intermediate=5632,
    layers=16,
    heads=(16, 8),
    vocabulary=32768,
    image_tokens=576,
    text_tokens=32,
    new_tokens=64,
    batch_sizes=(1, 32),
    dtype=torch.bfloat16,
)


def cases(*, tiny: bool, device: torch.device) -> Iterator[Case]:
    """For each batch size a case of one new token, the time to the first, and one of as many as an answer has.

    Args:
        tiny: sizes for a test of the benchmark.
        device: where the models are.
    """
    sizes = TINY if tiny else ON_GPU if device.type == "cuda" else ON_CPU
    dense, sparse = _dense_model(sizes, device), _sparse_model(sizes, device)
    for batch_size in sizes.batch_sizes:
        answers = _answers(dense, sparse, sizes, batch_size, device)
        answers = _those_that_work(answers, sizes, batch_size)
        for number in (1, sizes.new_tokens):
            yield Case(
                settings={"batch": batch_size, "prompt tokens": sizes.prompt_tokens, "new tokens": number},
                contenders={name: _work(answer, number) for name, answer in answers.items()},
                items=("tokens", batch_size * number),
            )


def summary(results: Sequence[tuple[Case, Result]]) -> str:
    """Time to the first token, and the rate of those after it, for each batch size."""
    lines = []
    for (case, first), (longer, whole) in zip(results[::2], results[1::2], strict=True):
        later = int(case.settings["batch"]) * (int(longer.settings["new tokens"]) - 1)
        seconds = {name: timing.seconds - first.timings[name].seconds for name, timing in whole.timings.items()}
        # In the sizes of a test the difference of two medians can be nothing.
        rates = {name: later / max(taken, 1e-9) for name, taken in seconds.items()}
        baseline = next(iter(rates.values()))
        lines += [
            f"batch {case.settings['batch']}, {name}: first token after {1e3 * first.timings[name].seconds:,.3g} ms, "
            f"then {rate:,.1f} tokens/s ({rate / baseline:.2f}x)"
            for name, rate in rates.items()
        ]
    return "\n".join(lines)


def _answers(dense: Any, sparse: Any, sizes: Sizes, batch_size: int, device: torch.device) -> dict[str, Answer]:
    generator = torch.Generator().manual_seed(0)
    # The placeholder is the last id; it stands for the picture alone.
    ids_BS = torch.randint(3, sizes.vocabulary - 1, (batch_size, sizes.prompt_tokens), generator=generator)
    features = 0.02 * torch.randn(batch_size, sizes.image_tokens, sizes.hidden, generator=generator)
    text = {"input_ids": ids_BS.to(device), "attention_mask": torch.ones_like(ids_BS).to(device)}
    ids_BS = ids_BS.clone()
    ids_BS[:, 1 : 1 + sizes.image_tokens] = sizes.vocabulary - 1
    picture = text | {"input_ids": ids_BS.to(device), "image_features": features.to(device, sizes.dtype)}
    answers = {
        DENSE: _growing(dense, text),
        GROWING: _growing(sparse, picture),
        STATIC: _static(sparse, picture, sizes),
    }
    if device.type == "cuda" and batch_size == 1:
        answers[DENSE_STATIC] = _static(dense, text, sizes)
    return answers


def _growing(model: Any, prompt: dict[str, Any]) -> Answer:
    def answer(number: int) -> Tensor:
        ids: Tensor = model.generate(**prompt, max_new_tokens=number, do_sample=False)
        return ids[:, -number:]

    return answer


def _static(model: Any, prompt: dict[str, Any], sizes: Sizes) -> Answer:
    """With one cache for all calls, emptied in between: CUDA graphs are recorded for the addresses of a cache."""
    cache = StaticCache(
        config=model.config.get_text_config(decoder=True), max_cache_len=sizes.prompt_tokens + sizes.new_tokens
    )
    compiled = {"compile_config": CompileConfig(fullgraph=True, dynamic=False)} if model.device.type == "cuda" else {}

    def answer(number: int) -> Tensor:
        cache.reset()
        ids: Tensor = model.generate(
            **prompt, **compiled, past_key_values=cache, max_new_tokens=number, do_sample=False
        )
        return ids[:, -number:]

    return answer


def _those_that_work(answers: dict[str, Answer], sizes: Sizes, batch_size: int) -> dict[str, Answer]:
    """Calls each once, which compiles what is compiled, and leaves out those that raise."""
    found: dict[str, Tensor] = {}
    for name, answer in answers.items():
        start = time.monotonic()
        try:
            found[name] = answer(sizes.new_tokens).cpu()
        except Exception as error:  # a compiler has errors of many kinds
            print(f"batch {batch_size}: {name} failed: {type(error).__name__}: {error}"[:2000], file=sys.stderr)
            continue
        print(f"batch {batch_size}: {name}: first call {time.monotonic() - start:.1f} s", file=sys.stderr)
    if GROWING in found and STATIC in found:
        equal = (found[GROWING] == found[STATIC]).double().mean()
        print(f"batch {batch_size}: {equal:.1%} of the tokens are equal with both caches", file=sys.stderr)
        assert sizes.dtype != torch.float32 or equal == 1
    return {name: answers[name] for name in found}


def _work(answer: Answer, number: int) -> Work:
    """The models differ, so what must be equal is how many tokens came."""

    def run() -> Sequence[Tensor]:
        return (torch.tensor(float(answer(number).numel())),)

    return run


def _text_config(sizes: Sizes, intermediate: int) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "qwen3",
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads[0],
        num_key_value_heads=sizes.heads[1],
        head_dim=sizes.hidden // sizes.heads[0],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def _dense_model(sizes: Sizes, device: torch.device) -> Any:
    with device:
        model = AutoModelForCausalLM.from_config(_text_config(sizes, 2 * sizes.intermediate))
    return _with_random_weights(model, sizes)


def _sparse_model(sizes: Sizes, device: torch.device) -> Any:
    tower = {"image_size": 28, "patch_size": 14, "width": 32, "layers": 1, "head_width": 16}
    vision = VisionConfig(
        backend="open_clip", architecture={"embed_dim": 32, "vision_cfg": tower}, image_size=28, feature_layer=-1
    )
    config = SymphonyVLMConfig(
        vision_config=vision.to_dict(),
        text_config=_text_config(sizes, sizes.intermediate),
        image_token_id=sizes.vocabulary - 1,
        num_image_tokens=sizes.image_tokens,
        moe=MoEConfig(num_experts=4, num_experts_per_tok=2, router="symphony_smoe").to_dict(),
    )
    with device:
        model = SymphonyVLMForConditionalGeneration(config)
    return _with_random_weights(model, sizes)


@torch.no_grad()
def _with_random_weights(model: Any, sizes: Sizes) -> Any:
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.dim() >= 2:
            weight.normal_(0.0, 0.02)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(sizes.dtype).eval()
