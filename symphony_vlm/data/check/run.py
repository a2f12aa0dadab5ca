"""Check every record and every picture of the data files, in one pass over each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from symphony_vlm.data.check.fault_log import FaultLog
from symphony_vlm.data.check.faults import Fault, fault_of_record, printable
from symphony_vlm.data.check.images import ImageLimits, check_image
from symphony_vlm.data.check.keys import KeyColumn, content_key, id_key
from symphony_vlm.data.check.report import CheckReport, FileCount, Note
from symphony_vlm.data.check.scan import ImageLedger, ScannedRecord, picture_key, scan
from symphony_vlm.data.check.spans import SampleView, choose_places, view_sample
from symphony_vlm.data.check.tokens import TokenCheck, Tokenization
from symphony_vlm.data.sample import Sample
from symphony_vlm.errors import InputError

__all__ = ["CheckOptions", "Source", "check_data", "choose_views"]

Progress = Callable[[int, int], None]
_NOTE_EXAMPLES = 10


class Source(Protocol):
    """A data file, as `open_samples` returns it."""

    path: Path

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What counts as a fault."""

    limits: ImageLimits = field(
        default_factory=lambda: ImageLimits(max_pixels=89_478_485, max_bytes=100_000_000, max_aspect_ratio=100.0)
    )
    """By default pictures from which Pillow warns of a decompression bomb (2**28 / 3 pixels), files of more than
    100 MB, and strips a hundred times as long as wide."""
    duplicate_ids: Literal["fault", "note"] = "fault"
    """What different records with the same id are. Some data sets name the picture by it."""


def check_data(
    sources: Sequence[Source],
    *,
    options: CheckOptions | None = None,
    tokens: TokenCheck | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Read every record, decode every distinct picture once, tokenise if asked to, and look for duplicates.

    Args:
        sources: Data files. Ids and records are compared within a file, pictures across all.
        options: Limits, and what counts as a fault.
        tokens: Tokenises the records and keeps what it counts.
        progress: Called after each record with the number done and the number of all.

    Returns:
        The report. The same data gives the same report, in the order of the records.
    """
    options = options or CheckOptions()
    started = time.monotonic()
    report = CheckReport(ledger=ImageLedger(partial(check_image, limits=options.limits)), tokens=tokens)
    n_all = sum(len(source) for source in sources)
    repeated_content = _Repeats()
    repeated_ids = _Repeats()
    for source in sources:
        before = len(report.faults)
        _FilePass(source, report, options, repeated_content, repeated_ids).run(progress, n_all)
        n_faults = len(report.faults) - before
        report.files.append(
            FileCount(name=source.path.name, path=str(source.path), records=len(source), faults=n_faults)
        )
    report.notes += _notes(report, sources, repeated_content, repeated_ids)
    report.seconds = time.monotonic() - started
    return report


@dataclass
class _Repeats:
    """A count with a few examples."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        self.count += 1
        if len(self.examples) < _NOTE_EXAMPLES:
            self.examples.append(example)


class _FilePass:
    """The pass over one file, then the duplicates in it."""

    def __init__(
        self,
        source: Source,
        report: CheckReport,
        options: CheckOptions,
        repeated_content: _Repeats,
        repeated_ids: _Repeats,
    ) -> None:
        self._source = source
        self._file = source.path.name
        self._report = report
        self._options = options
        self._repeated_content = repeated_content
        self._repeated_ids = repeated_ids
        self._ids = KeyColumn()
        self._contents = KeyColumn()

    def run(self, progress: Progress | None, n_all: int) -> None:
        report, first_place = self._report, self._report.n_records
        found = FaultLog()
        for record in scan(self._source, report.ledger, first_place=first_place):  # type: ignore[arg-type]
            for fault in self._faults(record):
                found.add(fault)
            report.n_records += 1
            if progress is not None:
                progress(report.n_records, n_all)
        report.faults.add_merged(found, self._duplicates())
        found.close()

    def _faults(self, record: ScannedRecord) -> Iterator[Fault]:
        sample = record.sample
        if sample is None:
            assert record.error is not None
            yield fault_of_record(record.error, index=record.index, file=self._file)
            return
        self._count(sample, record.index)
        fault = partial(Fault, index=record.index, id=printable(sample.id), file=self._file)
        for finding in dict.fromkeys(record.findings):
            if finding.kind is not None:
                yield fault(kind=finding.kind, reason=printable(f"{sample.origin}: {finding.reason}"))
        if self._report.tokens is not None:
            error = self._report.tokens.check(sample)
            if error is not None:
                yield fault(kind=error.kind or "tokens", reason=printable(str(error)))

    def _count(self, sample: Sample, index: int) -> None:
        report = self._report
        report.n_image_uses += len(sample.images)
        report.images_per_record[len(sample.images)] += 1
        report.turns_per_record[sum(message.role == "assistant" for message in sample.messages)] += 1
        report.characters.append(sum(len(message.text) for message in sample.messages))
        self._contents.add(content_key(sample), index)
        key = id_key(sample)
        if key is not None:
            self._ids.add(key, index)

    def _duplicates(self) -> Iterator[Fault]:
        """The later of two records with the same id, or without ids but the same in everything."""
        first_with_id = dict(zip(*(values.tolist() for values in self._ids.repeats()), strict=True))
        first_with_content = dict(zip(*(values.tolist() for values in self._contents.repeats()), strict=True))
        for index in sorted({*first_with_id, *first_with_content}):
            sample = self._source[index]
            same_id, same_content = first_with_id.get(index), first_with_content.get(index)
            if same_id is not None and same_content == first_with_content.get(same_id, same_id):
                kind, text = "duplicate_record", f"is record {same_id} again, with the same id"
            elif same_id is not None:
                kind, text = "duplicate_id", f"has the id of record {same_id}, which is another"
            elif id_key(sample) is None:
                kind, text = "duplicate_record", f"is record {same_content} again"
            else:
                self._repeated_content.add(f"{self._file}: record {index} (id {sample.id!r}) as record {same_content}")
                continue
            if kind == "duplicate_id" and self._options.duplicate_ids == "note":
                self._repeated_ids.add(f"{self._file}: record {index} has the id {sample.id!r} of record {same_id}")
                continue
            remedy = "Give each record an id of its own." if kind == "duplicate_id" else "Remove one of them."
            reason = str(InputError(text, where=sample.origin, remedy=remedy))
            yield Fault(index=index, id=printable(sample.id), kind=kind, reason=printable(reason), file=self._file)


def choose_views(sources: Sequence[Source], n_wanted: int, tokenization: Tokenization | None) -> list[SampleView]:
    """Readable records spread evenly over all files, to look at. An unreadable one gives way to the next."""
    n_all = sum(len(source) for source in sources)
    views: list[SampleView] = []
    taken = -1
    for place in choose_places(n_all, n_wanted):
        for other in range(max(place, taken + 1), n_all):
            source, index = _locate(sources, other)
            try:
                sample = source[index]
            except InputError:
                continue
            views.append(view_sample(sample, source.path.name, index, tokenization))
            taken = other
            break
    return views


def _locate(sources: Sequence[Source], place: int) -> tuple[Source, int]:
    """(source, index) of a record by its place among the records of all sources."""
    for source in sources:
        if place < len(source):
            return source, place
        place -= len(source)
    raise IndexError(place)


def _notes(
    report: CheckReport, sources: Sequence[Source], repeated_content: _Repeats, repeated_ids: _Repeats
) -> Iterator[Note]:
    later, first = report.ledger.contents.repeats()
    if len(later):
        names = tuple(_names(report, sources, group) for group in report.ledger.contents.groups(_NOTE_EXAMPLES))
        n_pictures = len(set(first.tolist()))
        text = f"{n_pictures:,} pictures have several names: {len(later):,} image files are copies of others"
        yield Note(kind="duplicate_image", text=text, count=len(later), examples=names)
    if repeated_content.count:
        text = f"{repeated_content.count:,} records repeat the picture and the words of another under their own id"
        yield _note("repeated_conversation", text, repeated_content)
    if repeated_ids.count:
        yield _note("duplicate_id", f"{repeated_ids.count:,} records have the id of another record", repeated_ids)
    if report.tokens is not None and report.tokens.n_truncated:
        limit, count = report.tokens.tokenization.max_length, report.tokens.n_truncated
        text = f"{count:,} records are longer than max_length {limit:,}; training cuts their end"
        yield Note(kind="longer_than_max_length", text=text, count=count)


def _note(kind: str, text: str, repeats: _Repeats) -> Note:
    return Note(kind=kind, text=text, count=repeats.count, examples=tuple(printable(e) for e in repeats.examples))


def _names(report: CheckReport, sources: Sequence[Source], numbers: Sequence[int]) -> str:
    """What records call a picture that has several names."""
    names = []
    for number in numbers[:4]:
        source, index = _locate(sources, report.ledger.first_uses[number])
        ref = next(ref for ref in source[index].images if report.ledger.number(picture_key(ref)) == number)
        names.append(ref.name)
    more = f" and {len(numbers) - 4} more" if len(numbers) > 4 else ""
    return printable(" = ".join(names) + more)
