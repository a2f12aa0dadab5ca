"""Reading what a stranger uploaded: limits first, then one decoder, and messages that a visitor can act on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from symphony_vlm.data.images import load_image
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.errors import InputError

__all__ = [
    "MAX_PICTURES",
    "MAX_UPLOAD_BYTES",
    "MAX_UPLOAD_PIXELS",
    "Upload",
    "for_visitors",
    "open_upload",
    "private_upload_folder",
    "read_uploads",
    "restore_upload",
]

MAX_PICTURES = 8
"""Of one question."""
MAX_UPLOAD_BYTES = 10 * 2**20
MAX_UPLOAD_PIXELS = 50_000_000
"""More than telephones take; decoded, about 150 MB."""


@dataclass(frozen=True)
class Upload:
    """What is kept of an upload for as long as its question is shown: the file as it came, not the larger pixels."""

    name: str
    data: bytes


def read_uploads(files: Sequence[Path | Upload]) -> tuple[list[Upload], list[Image.Image], InputError | None]:
    """Uploads and their pictures up to the first that cannot be read, and what is wrong with that one."""
    uploads: list[Upload] = []
    pictures: list[Image.Image] = []
    for file in files:
        try:
            upload = file if isinstance(file, Upload) else _read(file)
            pictures.append(open_upload(upload))
        except InputError as error:
            return uploads, pictures, error
        uploads.append(upload)
    return uploads, pictures, None


def open_upload(upload: Upload) -> Image.Image:
    """Decodes an upload.

    Raises:
        InputError: it is no picture, or has too many pixels.
    """
    # As bytes, so that messages name the upload and not where the server put it.
    return load_image(ImageRef(data=upload.data, name=upload.name), max_pixels=MAX_UPLOAD_PIXELS)


def restore_upload(upload: Upload, folder: Path) -> Path:
    """Writes an upload into the folder of uploads again, for a question that is to be changed."""
    place = Path(tempfile.mkdtemp(dir=folder)) / Path(upload.name).name
    place.write_bytes(upload.data)
    return place


def _read(file: Path) -> Upload:
    try:
        size = file.stat().st_size
        if size > MAX_UPLOAD_BYTES:
            raise InputError(f"has {size:,} bytes; the limit is {MAX_UPLOAD_BYTES:,}", where=f"image {file.name!r}")
        return Upload(name=file.name, data=file.read_bytes())
    except OSError as error:
        raise InputError("the upload is gone", where=f"image {file.name!r}", remedy="Upload it again.") from error


def for_visitors(error: InputError) -> str:
    """The message without remedies that only whoever runs the server could follow."""
    verb = error.problem.startswith(("is ", "has "))
    text = (
        f"{error.where}{' ' if verb else ': '}{error.problem}" if error.where not in (None, "chat") else error.problem
    )
    text = text.rstrip(".")
    remedy = error.remedy if error.where == "chat" else "Choose another picture." if "image" in text else None
    return f"{text[:1].upper()}{text[1:]}. {remedy or ''}".strip()


def private_upload_folder() -> Path:
    """Where gradio keeps uploads: a folder of this process alone, deleted at its end.

    gradio's default is one folder for all processes and users of the machine.
    """
    global _upload_folder
    if _upload_folder is None and "GRADIO_TEMP_DIR" not in os.environ:
        _upload_folder = tempfile.TemporaryDirectory(prefix="symphony_vlm-")
        os.environ["GRADIO_TEMP_DIR"] = _upload_folder.name
    return Path(os.environ["GRADIO_TEMP_DIR"]).resolve()


_upload_folder: tempfile.TemporaryDirectory[str] | None = None
