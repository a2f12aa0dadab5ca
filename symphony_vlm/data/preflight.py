"""Check every record and every image of a source before anything expensive starts.

A training run that meets its first broken image after six hours has wasted six hours; this pass finds all of them.
``symphony-vlm data check`` makes the same pass and looks for more, see ``check/``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from symphony_vlm.data.check.faults import Fault, fault_of_record
from symphony_vlm.data.check.images import ImageFinding, ImageLimits, check_image, check_presence
from symphony_vlm.data.check.scan import ImageLedger, scan
from symphony_vlm.data.images import MAX_PIXELS
from symphony_vlm.data.sample import ImageRef, Sample
from symphony_vlm.errors import InputError

__all__ = ["Fault", "PreflightReport", "check_samples"]

_NAMED_FAULTS = 5


@dataclass(frozen=True, kw_only=True)
class PreflightReport:
    """What a source holds."""

    n_records: int
    n_images: int
    """Distinct images."""
    n_image_uses: int
    """Places where an image is used, over all records that could be read."""
    faults: tuple[Fault, ...]
    """One for each record that cannot be used: its first."""
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
    file = getattr(source, "path", Path()).name
    ledger = ImageLedger(partial(_check_image, max_pixels) if decode_images else check_presence)
    faults: list[Fault] = []
    usable: list[int] = []
    n_image_uses = 0
    for record in scan(source, ledger):
        bad = next((finding for finding in record.findings if finding.kind is not None), None)
        if record.sample is None:
            assert record.error is not None
            faults.append(fault_of_record(record.error, index=record.index, file=file))
        else:
            n_image_uses += len(record.sample.images)
            if bad is None:
                usable.append(record.index)
            else:
                assert bad.kind is not None
                reason = f"{record.sample.origin}: {bad.reason}"
                faults.append(Fault(index=record.index, id=record.sample.id, kind=bad.kind, reason=reason, file=file))
        if progress is not None:
            progress(record.index + 1, len(source))
    if faults and (on_bad_sample == "error" or not usable):
        raise _too_many(faults, len(source), skipping=on_bad_sample == "skip")
    return PreflightReport(
        n_records=len(source),
        n_images=len(ledger),
        n_image_uses=n_image_uses,
        faults=tuple(faults),
        usable=tuple(usable),
    )


def _check_image(max_pixels: int, ref: ImageRef) -> ImageFinding:
    return check_image(ref, ImageLimits(max_pixels=max_pixels))


def _too_many(faults: Sequence[Fault], n_records: int, *, skipping: bool) -> InputError:
    named = "; ".join(f"({number}) {fault.reason}" for number, fault in enumerate(faults[:_NAMED_FAULTS], start=1))
    more = f"; and {len(faults) - _NAMED_FAULTS:,} more" if len(faults) > _NAMED_FAULTS else ""
    return InputError(
        f"{len(faults):,} of {n_records:,} records cannot be used: {named}{more}",
        remedy="None is left to train on." if skipping else "Correct them, or leave them out with on_bad_sample: skip.",
    )
