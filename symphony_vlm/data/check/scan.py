"""The pass itself: records in order, pictures decoded beside it in threads, each distinct picture once.

Pillow lets go of Python's lock while it decodes, so threads use all cores. Records come out in their own order
whatever the threads do, hence reports are the same every time.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from PIL import ImageFile

from symphony_vlm.data.check.images import ImageFinding
from symphony_vlm.data.check.keys import KEY_BYTES, KeyColumn
from symphony_vlm.data.images import image_key
from symphony_vlm.data.sample import ImageRef, Sample
from symphony_vlm.errors import InputError

__all__ = ["ImageLedger", "ScannedRecord", "picture_key", "scan"]

_CHUNK = 64
"""Records read together."""
_CHUNKS_IN_FLIGHT = 6
_TASK = 8
"""Pictures handed to a thread together: a missing file costs less than handing it over."""
_REMEMBERED_REASONS = 4096


@dataclass(frozen=True)
class ScannedRecord:
    """One record and what was found about its pictures."""

    index: int
    sample: Sample | None
    error: InputError | None
    """Why there is no sample."""
    findings: tuple[ImageFinding, ...] = ()
    """One for each of the sample's images."""


class ImageLedger:
    """What is known of each distinct picture, in about 130 bytes each.

    Args:
        check: Looks at one picture.
    """

    def __init__(self, check: Callable[[ImageRef], ImageFinding]) -> None:
        self.contents = KeyColumn()
        """Digest of each good picture, by the picture's number."""
        self.widths, self.heights = array("I"), array("I")
        """Of each picture that was decoded."""
        self.first_uses = array("q")
        """By the picture's number: the place (see `scan`) of the first record that uses it."""
        self._check = check
        self._numbers: dict[bytes, int] = {}
        self._bad = bytearray()
        self._pending: dict[bytes, tuple[Future[list[ImageFinding]], int]] = {}
        # A shared bad picture is reported with each of its records. A million different reasons are not kept.
        self._reasons: OrderedDict[int, ImageFinding] = OrderedDict()

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, key: bytes) -> int:
        """A picture's number, in the order of first use, by its `picture_key`."""
        return self._numbers[key]

    def submit(self, uses: Sequence[tuple[int, ImageRef]], pool: ThreadPoolExecutor) -> None:
        """Starts looking at the pictures that are new, given with the places of their records."""
        new: dict[bytes, ImageRef] = {}
        for place, ref in uses:
            key = picture_key(ref)
            if key not in self._numbers:
                self._numbers[key] = len(self._numbers)
                self._bad.append(0)
                self.first_uses.append(place)
                new[key] = ref
        keys = list(new)
        for start in range(0, len(keys), _TASK):
            task = keys[start : start + _TASK]
            future = pool.submit(self._check_all, [new[key] for key in task])
            self._pending |= {key: (future, position) for position, key in enumerate(task)}

    def finding(self, ref: ImageRef) -> ImageFinding:
        """What was found; waits for it if need be."""
        key = picture_key(ref)
        number = self._numbers[key]
        if key in self._pending:
            future, position = self._pending.pop(key)
            finding = future.result()[position]
            self._enter(number, finding)
            return finding
        if not self._bad[number]:
            return ImageFinding()
        if number not in self._reasons:
            self._remember(number, self._check(ref))
        return self._reasons[number]

    def _check_all(self, refs: Sequence[ImageRef]) -> list[ImageFinding]:
        return [self._check(ref) for ref in refs]

    def _enter(self, number: int, finding: ImageFinding) -> None:
        if finding.width:
            self.widths.append(finding.width)
            self.heights.append(finding.height)
        if finding.kind is not None:
            self._bad[number] = 1
            self._remember(number, finding)
        elif finding.digest is not None:
            self.contents.add(finding.digest, number)

    def _remember(self, number: int, finding: ImageFinding) -> None:
        self._reasons[number] = finding
        if len(self._reasons) > _REMEMBERED_REASONS:
            self._reasons.popitem(last=False)


def picture_key(ref: ImageRef) -> bytes:
    """16 bytes that stand for `image_key`."""
    return hashlib.blake2b(image_key(ref).encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


def scan(source: Sequence[Sample], ledger: ImageLedger, *, first_place: int = 0) -> Iterator[ScannedRecord]:
    """Every record of a source, in order.

    Args:
        source: What `open_samples` returned.
        ledger: Is filled; one may serve several sources in turn, so that a picture they share is decoded once.
        first_place: The place of the source's first record among those of all sources.
    """
    strict, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    pool = ThreadPoolExecutor(_n_threads(), thread_name_prefix="check")
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes that our own limit reports, and of metadata that nobody reads.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            waiting: deque[list[ScannedRecord]] = deque()
            for start in range(0, len(source), _CHUNK):
                chunk = [_read(source, index) for index in range(start, min(start + _CHUNK, len(source)))]
                uses = [(first_place + r.index, ref) for r in chunk if r.sample for ref in r.sample.images]
                ledger.submit(uses, pool)
                waiting.append(chunk)
                if len(waiting) > _CHUNKS_IN_FLIGHT:
                    yield from _finished(waiting.popleft(), ledger)
            for chunk in waiting:
                yield from _finished(chunk, ledger)
    finally:
        pool.shutdown(cancel_futures=True)
        ImageFile.LOAD_TRUNCATED_IMAGES = strict


def _read(source: Sequence[Sample], index: int) -> ScannedRecord:
    try:
        return ScannedRecord(index, source[index], None)
    except InputError as error:
        return ScannedRecord(index, None, error)


def _finished(chunk: Sequence[ScannedRecord], ledger: ImageLedger) -> Iterator[ScannedRecord]:
    for record in chunk:
        images = record.sample.images if record.sample else ()
        yield ScannedRecord(record.index, record.sample, record.error, tuple(ledger.finding(ref) for ref in images))


def _n_threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(2, cores))
