"""How fast a stage trains: tokens, images and samples per second, waiting for data, memory, model FLOPs utilisation.

Time is counted from asking for the data of an optimizer step to the step's end; evaluation and checkpoints are left
out. Whatever depends on a clock or on memory has a name that begins with ``runtime/``, for no two runs share it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from symphony_vlm.training.batch_sizes import BatchSizes
from symphony_vlm.training.flops import TrainingFlops

__all__ = ["Throughput", "short_figures", "with_prefix"]

GIB = 2**30


class Throughput:
    """Counts steps and reads them at log steps.

    Args:
        flops: of the model, None if they are not known.
        peak_tflops: of one device, None if it is not known: then there is no utilisation.
        device: whose memory is watched.
    """

    def __init__(self, flops: TrainingFlops | None, peak_tflops: float | None, device: torch.device) -> None:
        self._flops = flops
        self._peak = peak_tflops
        self._device = device
        self._began: float | None = None
        self._sums = [0.0] * 9

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Around waiting for the data of a step, with which the step begins."""
        self._began = time.perf_counter()
        yield
        self._sums[1] += time.perf_counter() - self._began

    def take(self, batches: Sequence[BatchSizes]) -> None:
        """Notes what an optimizer step of this process is made of."""
        for sizes in batches:
            flops = 0.0 if self._flops is None else self._flops.of(sizes)
            new = (sizes.samples, sizes.tokens, sizes.supervised, sizes.places, sizes.images, flops)
            for index, value in enumerate(new, start=2):
                self._sums[index] += value

    def step_done(self) -> None:
        """Ends what `loading` began."""
        if self._began is not None:
            self._sums[0] += time.perf_counter() - self._began
            self._sums[8] += 1
            self._began = None

    def read(self) -> dict[str, float]:
        """Figures since the last call, of all processes together (so every one must call); empty without a step."""
        mine, self._sums = [*self._sums, self._memory()], [0.0] * 9
        everyone = [mine]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            everyone = [[]] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        columns = list(zip(*everyone, strict=True))
        seconds, steps = max(columns[0]), columns[8][0]
        if not steps or not seconds:
            return {}
        samples, tokens, supervised, places, images, flops = (sum(column) for column in columns[2:8])
        figures = {"samples": samples, "tokens": tokens, "supervised_tokens": supervised, "images": images}
        entries = {f"runtime/{name}_per_second": value / seconds for name, value in figures.items() if value}
        entries["runtime/step_seconds"] = seconds / steps
        entries["runtime/data_share"] = sum(columns[1]) / sum(columns[0])
        entries["runtime/memory_gib"] = max(columns[9]) / GIB
        if flops:
            entries["runtime/model_tflops"] = flops / seconds / 1e12 / len(everyone)
            if self._peak is not None:
                entries["runtime/mfu"] = entries["runtime/model_tflops"] / self._peak
        if places:
            entries["padding_share"] = 1 - tokens / places
            entries["supervised_tokens"] = supervised
        return {name: float(f"{value:.5g}") for name, value in entries.items()}

    def _memory(self) -> float:
        """Bytes: on CUDA the most that was allocated so far, on a CPU what the process has in memory now."""
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device))
        import psutil

        return float(psutil.Process().memory_info().rss)


def short_figures(logs: Mapping[str, Any]) -> list[str]:
    """The figures of a log entry for a line on the terminal, the most telling first."""
    found = []
    for name, unit in (("tokens", "tok/s"), ("samples", "samples/s")):
        if (value := logs.get(f"runtime/{name}_per_second")) is not None:
            found.append(f"{with_prefix(value)} {unit}")
            break
    if (mfu := logs.get("runtime/mfu")) is not None:
        found.append(f"MFU {100 * mfu:.0f} %" if mfu >= 0.01 else f"MFU {100 * mfu:.1f} %")
    if (memory := logs.get("runtime/memory_gib")) is not None:
        found.append(f"{memory:.1f} GiB")
    return found


def with_prefix(value: float) -> str:
    """Three digits: ``412``, ``4.12k``, ``41.2k``, ``1.24M``."""
    for unit in ("", "k", "M", "G"):
        if value < 999.5 or unit == "G":
            break
        value /= 1000
    digits = 0 if value >= 99.95 or (not unit and value >= 9.995) else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}{unit}"
