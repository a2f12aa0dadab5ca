"""What the check found: counts, notes and the faults."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from symphony_vlm.data.check.fault_log import FaultLog
from symphony_vlm.data.check.scan import ImageLedger
from symphony_vlm.data.check.tokens import TokenCheck, percentiles

__all__ = ["CheckReport", "FileCount", "Note"]


@dataclass(frozen=True, kw_only=True)
class FileCount:
    """One data file."""

    name: str
    path: str
    records: int
    faults: int


@dataclass(frozen=True, kw_only=True)
class Note:
    """Something worth knowing that is no fault."""

    kind: str
    text: str
    """A sentence with the count."""
    count: int
    examples: tuple[str, ...] = ()


@dataclass(kw_only=True)
class CheckReport:
    """The whole result of `check_data`."""

    ledger: ImageLedger
    tokens: TokenCheck | None = None
    faults: FaultLog = field(default_factory=FaultLog)
    files: list[FileCount] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    n_records: int = 0
    n_image_uses: int = 0
    images_per_record: Counter[int] = field(default_factory=Counter)
    """How many readable records have so many images."""
    turns_per_record: Counter[int] = field(default_factory=Counter)
    """How many readable records have so many answers."""
    characters: array[int] = field(default_factory=lambda: array("I"))
    """Length of each readable record's text."""
    seconds: float = 0.0

    @property
    def modalities(self) -> dict[str, int]:
        """Readable records by what they hold."""
        per = self.images_per_record
        several = sum(count for n_images, count in per.items() if n_images > 1)
        return {"text_only": per[0], "one_image": per[1], "several_images": several}

    @property
    def lengths(self) -> tuple[array[int], str]:
        """Lengths of the records and their unit: tokens if there is a tokenizer, else characters."""
        return (self.tokens.lengths, "tokens") if self.tokens else (self.characters, "characters")

    def to_dict(self) -> dict[str, Any]:
        """Everything but the faults themselves, for ``check.json`` and ``--json``."""
        share = self.tokens.supervised_share if self.tokens else None
        return {
            "records": self.n_records,
            "images": len(self.ledger),
            "image_uses": self.n_image_uses,
            "supervised_tokens_share": None if share is None else round(share, 6),
            "n_faults": len(self.faults),
            "n_faulty_records": self.faults.n_faulty_records,
            "faults_by_kind": dict(self.faults.by_kind.most_common()),
            "notes": [{"kind": note.kind, "count": note.count, "text": note.text} for note in self.notes],
            "modalities": self.modalities,
            "turns": {str(turns): count for turns, count in sorted(self.turns_per_record.items())},
            "characters": percentiles(self.characters),
            "image_width": percentiles(self.ledger.widths),
            "image_height": percentiles(self.ledger.heights),
            "tokens": self.tokens.to_dict() if self.tokens else None,
            "files": [{"name": f.name, "path": f.path, "records": f.records, "faults": f.faults} for f in self.files],
            "seconds": round(self.seconds, 2),
        }
