"""Experts on a CPU by operations of our own (`fused.cpp`), compiled where they are first used.

In fp32, gated by SiLU, without biases: Llama's, Qwen's, Mistral's and Mixtral's. Fetching, activation, weighting and
sums are one pass each over rows that are in the cache, in place of one over memory for every operation; and of what
the backward pass needs only the first products' results are kept: two fifths of what autograd keeps if F = 2D, never
more than half.

Chosen by name alone, ``experts_implementation: fused``: sums have another order than those of ``segments``, and the
bits of a run must not hang on whether there is a compiler.

Shape letters: T tokens, D input size, F expert hidden size, O output size, E experts, K experts per token.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import cpp_extension

__all__ = ["compute_fused", "is_available", "warn_of_segments"]

_log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
VECTORS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-DCPU_CAPABILITY_AVX512"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"],
}
"""By what torch says that this processor can; of others the compiler's own choice. Not ``-march=native``: a home folder
may be that of several machines."""


def compute_fused(x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor, up_EHD: Tensor, down_EOF: Tensor) -> Tensor:
    """The weighted sum over each token's experts: ``[T, D] -> [T, O]``. Once differentiable.

    Args:
        x_TD: tokens, fp32 on a CPU, as all that follows.
        weights_TK: combination weights.
        indices_TK: which experts; no token has one twice.
        up_EHD: first weights, gate and up one after the other, H = 2F.
        down_EOF: second weights.

    Raises:
        IndexError, ValueError: indices name an expert that does not exist, or one of a token's twice.
    """
    output_TO: Tensor = _fused(x_TD, weights_TK, indices_TK, up_EHD, down_EOF, torch.is_grad_enabled())
    return output_TO


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor, up_EHD: Tensor, down_EOF: Tensor, keep: bool
    ) -> Tensor:
        parts = (x_TD, weights_TK, indices_TK, up_EHD, down_EOF)
        output_TO, hidden_NH = torch.ops.symphony_vlm.experts(*parts, keep and any(ctx.needs_input_grad))
        ctx.save_for_backward(*parts, hidden_NH)
        result: Tensor = output_TO
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, _, _, needs_up, needs_down, _ = ctx.needs_input_grad
        grad_x_TD, grad_weights_TK, grad_up_EHD, grad_down_EOF = torch.ops.symphony_vlm.experts_backward(
            grad_TO, *ctx.saved_tensors, needs_x, needs_up, needs_down
        )
        return grad_x_TD, grad_weights_TK, None, grad_up_EHD, grad_down_EOF, None


_fused: Callable[..., Tensor] = _Fused.apply


@functools.cache
def is_available() -> bool:
    """Whether the operations are there, after `load`; where they are not, a warning says why, once."""
    try:
        load()
    except OSError as error:
        _log.warning(
            "experts_implementation 'fused' is not available: %s. 'segments' computes the experts, with the same "
            "results but for rounding; with a C++ compiler (g++, or the one that CXX names) 'fused' builds itself.",
            error,
        )
        return False
    return True


@functools.cache
def warn_of_segments(device: str, dtype: torch.dtype) -> None:
    """Says, once for each, where ``fused`` was asked for and is not what is computed."""
    _log.warning(
        "experts_implementation 'fused' is for fp32 on a CPU; 'segments' computes the experts in %s on %s",
        dtype,
        device,
    )


def load() -> None:
    """Makes the operations known to torch. The first call on a machine compiles them, which takes some ten seconds.

    They are kept where torch keeps its extensions (``TORCH_EXTENSIONS_DIR``, else torch's cache folder), by everything
    that they hang on.

    Raises:
        OSError: they cannot be compiled, kept or loaded.
    """
    library = _library()
    if not library.exists():
        _compile(library)
    torch.ops.load_library(library)


def _library() -> Path:
    """Where the compiled operations belong."""
    parts = [SOURCE.read_text(encoding="utf-8"), torch.__version__, torch.__file__, *_flags()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    return Path(folder) / "symphony_vlm" / f"fused-{digest}.so"


def _flags() -> list[str]:
    return [
        "-std=c++20",
        "-O3",
        "-shared",
        "-fPIC",
        "-fopenmp",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *VECTORS.get(torch.backends.cpu.get_cpu_capability(), []),
    ]


def _compile(library: Path) -> None:
    """In a folder of its own and then renamed, so that several processes at once, or one that is killed, do no harm.

    torch's own ``load`` needs ninja, and waits for ever for the lock of a process that was killed.
    """
    _log.info("compiling %s for this machine, once", SOURCE.name)
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [cpp_extension.get_cxx_compiler(), *_flags(), str(SOURCE), "-o", str(built)]
        command += [f"-I{path}" for path in cpp_extension.include_paths("cpu")]
        command += [f"-L{path}" for path in cpp_extension.library_paths("cpu")]
        command += ["-ltorch", "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.splitlines()
            reason = next((line for line in lines if "error" in line), lines[0] if lines else "")
            raise OSError(f"{command[0]} fails with exit status {done.returncode}: {reason.strip()}")
        built.replace(library)
