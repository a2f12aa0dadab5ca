"""From the events of a profile to a table of parts: see `profiling`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

__all__ = ["DATA", "HEAD", "OPTIMIZER", "PREFIX", "REST", "VALIDATION", "EventOwners", "profile_table", "time_by_part"]

PREFIX = "part: "
"""Of the names of the ranges that `profiling` marks."""
DATA, HEAD, OPTIMIZER, VALIDATION = "data loading", "head and loss", "optimizer", "validation"
REST = "everything else"
_BACKWARD = "autograd::engine::evaluate_function"
_BY_NAME = {
    "Optimizer.": OPTIMIZER,
    "aten::cross_entropy_loss": HEAD,
    "_Chunked": HEAD,
    "aten::linalg__powsum": OPTIMIZER,
}
"""Operations that are no module's, by the beginning of their names."""


def time_by_part(events: Iterable[Any], *, on_device: bool) -> dict[str, tuple[float, float, float]]:
    """Time of each part in microseconds, the longest first.

    Args:
        events: of `torch.profiler.profile`.
        on_device: whether the work is done by a GPU; else by the processor.

    Returns:
        By part: the time of its operations forwards, and backwards, where the work is done; and the processor's time.
    """
    listed = [event for event in events if getattr(event.device_type, "name", "CPU") == "CPU"]
    finder = EventOwners(listed)
    times: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for event in listed:
        part, is_backward = finder.owner(event)
        host = event.self_cpu_time_total
        # To a marked range the profiler adds the whole span of its kernels, beside the operations that launch them.
        device = 0.0 if event.is_user_annotation else event.self_device_time_total
        times[part][int(is_backward)] += device if on_device else host
        times[part][2] += host
    return {
        part: (values[0], values[1], values[2])
        for part, values in sorted(times.items(), key=lambda item: -max(item[1][0] + item[1][1], 0.0))
    }


class EventOwners:
    """Which part an event belongs to, and whether it is of a backward pass.

    Args:
        events: of the processor.
    """

    def __init__(self, events: list[Any]) -> None:
        self._found: dict[int, tuple[str, bool]] = {}
        # By thread and number of the autograd node, the part whose forward operation made it.
        self._made: dict[tuple[int, int], str] = {}
        # In the order of time: an operation comes before its gradient.
        for event in sorted(events, key=lambda event: event.time_range.start):
            part, _ = self.owner(event)
            if event.sequence_nr >= 0 and not event.name.startswith(_BACKWARD) and part != REST:
                self._made.setdefault((event.thread, event.sequence_nr), part)

    def owner(self, event: Any) -> tuple[str, bool]:
        """The part, and whether the event is of a backward pass."""
        if event.id not in self._found:
            self._found[event.id] = self._find(event)
        return self._found[event.id]

    def _find(self, event: Any) -> tuple[str, bool]:
        inherited = (REST, False) if event.cpu_parent is None else self.owner(event.cpu_parent)
        if event.name.startswith(PREFIX):
            # The second forward pass of activation checkpointing is a part of the backward pass.
            return event.name.removeprefix(PREFIX), inherited[1]
        if event.name.startswith(_BACKWARD):
            made = self._made.get((event.fwd_thread, event.sequence_nr))
            return made or inherited[0], True
        for begin, part in _BY_NAME.items():
            if event.name.startswith(begin):
                return part, inherited[1]
        return inherited


def profile_table(events: Iterable[Any], *, steps: int, on_device: bool) -> str:
    """The times as text, a step's in milliseconds.

    Args:
        events: of `torch.profiler.profile`.
        steps: how many steps they are of.
        on_device: see `time_by_part`.
    """
    listed = list(events)
    times = time_by_part(listed, on_device=on_device)
    total = sum(forward + backward for forward, backward, _ in times.values()) or 1.0
    begin = min(event.time_range.start for event in listed)
    wall = max(event.time_range.end for event in listed) - begin
    where = "GPU" if on_device else "processor"
    heading = f"{'part':<24}{'forward':>10}{'backward':>10}{'share':>9}"
    lines = [heading + f"{'processor':>12}" * on_device]
    for part, (forward, backward, host) in times.items():
        if not any((forward, backward, host)):
            continue
        line = f"{part:<24}{forward / 1e3 / steps:>10.2f}{backward / 1e3 / steps:>10.2f}"
        line += f"{(forward + backward) / total:>9.1%}"
        lines.append(line + f"{host / 1e3 / steps:>12.2f}" * on_device)
    busy = f"; the GPU had work for {total / wall:.0%} of the time" if on_device and wall else ""
    lines.append(f"milliseconds a step of the {where}, {wall / 1e3 / steps:.1f} by the clock{busy}")
    return "\n".join(lines)
