"""The six photographed frost textures of ImageNet-C: where they are found, checked, and enlarged over an image.

The files are not part of this package. They are ``frost1.png`` ... ``frost6.jpg`` of hendrycks/robustness,
``ImageNet-C/create_c`` (Apache-2.0), which the distribution imagecorruptions also carries. Every file is checked by
its sha256, so that other pixels cannot pass for the published corruption.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import math
import os
from pathlib import Path

import cv2
import numpy as np

from symphony_vlm.corruptions.operators import UInt8Image
from symphony_vlm.errors import InputError

__all__ = ["FROST_DIR_VARIABLE", "covering_texture", "find_frost_textures"]

FROST_DIR_VARIABLE = "SYMPHONY_VLM_FROST_DIR"

# File name and first 16 hexadecimal digits of its sha256.
_FILES = (
    ("frost1.png", "ff9f907860bd7a83"),
    ("frost2.png", "fe211a89b336999c"),
    ("frost3.png", "2d0d50b4a9bb213f"),
    ("frost4.jpg", "3f8b91ca1a9fa716"),
    ("frost5.jpg", "5fc6a19df4a429ba"),
    ("frost6.jpg", "1f92b2f484087480"),
)
_REMEDY = (
    "Put frost1.png, frost2.png, frost3.png, frost4.jpg, frost5.jpg and frost6.jpg of github.com/hendrycks/robustness "
    f"(ImageNet-C/create_c) into one folder and set {FROST_DIR_VARIABLE} to it, or install the distribution "
    "'imagecorruptions' (its files are read, it is never imported), or use 'frost_procedural', which needs no files "
    "and is not reported as frost"
)
_MARGIN = 1.1


def find_frost_textures(folder: str | Path | None = None) -> tuple[Path, ...]:
    """Locate the six textures and check them.

    Looks in ``folder`` if given, else in the folder that the environment variable ``SYMPHONY_VLM_FROST_DIR`` names,
    else among the files of an installed imagecorruptions distribution. A folder that is named is the only one tried.

    Returns:
        Six paths, in the order of the published list.

    Raises:
        InputError: A texture is absent or is not the published file.
    """
    named = folder if folder is not None else os.environ.get(FROST_DIR_VARIABLE) or None
    if named is not None:
        paths = tuple(Path(named) / name for name, _ in _FILES)
        where = f"frost textures in '{named}'"
    else:
        paths = _installed_textures()
        where = "frost textures"
    for path, (name, digest) in zip(paths, _FILES, strict=True):
        if not path.is_file():
            raise InputError(f"{name} is missing", where=where, remedy=_REMEDY)
        found = hashlib.sha256(path.read_bytes()).hexdigest()[: len(digest)]
        if found != digest:
            raise InputError(
                f"{name} is not the published texture: its sha256 begins with {found}, expected {digest}",
                where=where,
                remedy=_REMEDY,
            )
    return paths


def _installed_textures() -> tuple[Path, ...]:
    try:
        files = importlib.metadata.files("imagecorruptions") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    by_name = {file.name: Path(str(file.locate())) for file in files}
    missing = [name for name, _ in _FILES if name not in by_name]
    if missing:
        raise InputError(
            f"{FROST_DIR_VARIABLE} is not set and no installed distribution has the frost textures", remedy=_REMEDY
        )
    return tuple(by_name[name] for name, _ in _FILES)


def covering_texture(index: int, height: int, width: int) -> UInt8Image:
    """One texture, enlarged (bicubic) so that a ``height`` x ``width`` window fits with a tenth to spare.

    Args:
        index: Position in the published list, 0 to 5.
        height: Rows of the image to cover.
        width: Columns of the image to cover.

    Returns:
        ``[H', W', 3]`` uint8, RGB, read-only, larger than the window in both directions.

    Raises:
        InputError: See `find_frost_textures`.
    """
    source = os.environ.get(FROST_DIR_VARIABLE)
    texture = _decoded_textures(source)[index]
    needed = max(1.0, height / texture.shape[0], width / texture.shape[1])
    # Most images fit into a texture as it is; only that one size is kept, since the others grow with the image.
    return _texture_with_margin(source, index) if needed == 1.0 else _enlarged(texture, needed * _MARGIN)


@functools.lru_cache(maxsize=2)
def _decoded_textures(_source: str | None) -> tuple[UInt8Image, ...]:
    """All textures as RGB; the argument only tells the cache when the environment names another folder."""
    return tuple(_decode(path) for path in find_frost_textures())


@functools.lru_cache(maxsize=len(_FILES))
def _texture_with_margin(source: str | None, index: int) -> UInt8Image:
    return _enlarged(_decoded_textures(source)[index], _MARGIN)


def _decode(path: Path) -> UInt8Image:
    # IMREAD_COLOR drops an alpha channel without compositing, as the references do.
    pixels = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    assert pixels is not None, path  # the checksum matched
    return np.ascontiguousarray(pixels[..., ::-1], dtype=np.uint8)


def _enlarged(texture: UInt8Image, factor: float) -> UInt8Image:
    height, width = texture.shape[:2]
    size = (math.ceil(width * factor), math.ceil(height * factor))
    # OpenCV's own arithmetic is in whole numbers, the same on every processor; Intel's library inside it is not.
    # The switch is the calling thread's alone.
    intel = cv2.ipp.useIPP()
    cv2.ipp.setUseIPP(False)
    try:
        enlarged = np.asarray(cv2.resize(texture, size, interpolation=cv2.INTER_CUBIC), np.uint8)
    finally:
        cv2.ipp.setUseIPP(intel)
    enlarged.setflags(write=False)
    return enlarged
