"""Check every record and every image of a source before anything expensive starts.

A training run that meets its first broken image after six hours has wasted six hours; this pass finds all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from symphony_vlm.data.images import MAX_PIXELS, check_image_present, image_key, load_image
from symphony_vlm.data.sample import ImageRef, Sample
from symphony_vlm.errors import InputError

__all__ = ["Fault", "PreflightReport", "check_samples"]

_NAMED_FAULTS = 5


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One record that cannot be used."""

    index: int
    id: str
    """The record's id; its index if the record could not be read."""
    reason: str
    """File, record, field or image, what is wrong and what to do, in one line."""


@dataclass(frozen=True, kw_only=True)
class PreflightReport:
    """What a source holds."""

    n_records: int
    n_images: int
    """Distinct images."""
    n_image_uses: int
    """Places where an image is used, over all records that could be read."""
    faults: tuple[Fault, ...]
    usable: tuple[int, ...]
    """Indices of the records without a fault, ascending."""


def check_samples(
    source: Sequence[Sample],
    *,
    on_bad_sample: Literal["error", "skip"] = "error",
    decode_images: bool = True,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int], None] | None = None,
) -> PreflightReport:
    """Read every record and decode every distinct image once.

    Args:
        source: What `open_samples` returned.
        on_bad_sample: ``error`` raises if any record has a fault; ``skip`` reports them and leaves them out of
            `PreflightReport.usable`.
        decode_images: Without it images are only looked for (present and not empty).
        max_pixels: Of `load_image`, which decodes them.
        progress: Called after each record with the number done and the number of all.

    Raises:
        InputError: Faults under ``error`` (the first five and the number of all), or no record left under ``skip``.
    """
    check = partial(load_image, max_pixels=max_pixels) if decode_images else check_image_present
    verdicts: dict[str, str | None] = {}
    faults: list[Fault] = []
    usable: list[int] = []
    n_image_uses = 0
    for index in range(len(source)):
        try:
            sample = source[index]
        except InputError as error:
            faults.append(Fault(index=index, id=str(index), reason=str(error)))
        else:
            n_image_uses += len(sample.images)
            reasons = [reason for ref in sample.images if (reason := _verdict(ref, verdicts, check)) is not None]
            if reasons:
                faults.append(Fault(index=index, id=sample.id, reason=f"{sample.origin}: {reasons[0]}"))
            else:
                usable.append(index)
        if progress is not None:
            progress(index + 1, len(source))
    if faults and (on_bad_sample == "error" or not usable):
        raise _too_many(faults, len(source), skipping=on_bad_sample == "skip")
    return PreflightReport(
        n_records=len(source),
        n_images=len(verdicts),
        n_image_uses=n_image_uses,
        faults=tuple(faults),
        usable=tuple(usable),
    )


def _verdict(ref: ImageRef, verdicts: dict[str, str | None], check: Callable[[ImageRef], object]) -> str | None:
    """Why the image cannot be used, or None; remembered, as many records may share an image."""
    key = image_key(ref)
    if key not in verdicts:
        try:
            check(ref)
            verdicts[key] = None
        except InputError as error:
            verdicts[key] = str(error)
    return verdicts[key]


def _too_many(faults: Sequence[Fault], n_records: int, *, skipping: bool) -> InputError:
    named = "; ".join(f"({number}) {fault.reason}" for number, fault in enumerate(faults[:_NAMED_FAULTS], start=1))
    more = f"; and {len(faults) - _NAMED_FAULTS:,} more" if len(faults) > _NAMED_FAULTS else ""
    return InputError(
        f"{len(faults):,} of {n_records:,} records cannot be used: {named}{more}",
        remedy="None is left to train on." if skipping else "Correct them, or leave them out with on_bad_sample: skip.",
    )
