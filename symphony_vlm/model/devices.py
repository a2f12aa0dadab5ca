"""Where a model runs and in which precision, as people name them."""

from __future__ import annotations

import torch

from symphony_vlm.errors import InputError

__all__ = ["DTYPES", "check_dtype", "choose_device"]

DTYPES = ("auto", "float32", "bfloat16", "float16")


def choose_device(name: str | None) -> torch.device:
    """The device of that name; without one a CUDA device where there is one, else the CPU.

    Apple's ``mps`` is never chosen unasked: not every operation of the routers has been tried there.

    Raises:
        InputError: no such device, or this machine has none of its kind.
    """
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        remedy = "Give cpu, cuda, cuda:1 or mps."
        raise InputError(f"{name!r} is not the name of a device", where="device", remedy=remedy) from error
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, True):
        raise InputError(
            f"{name!r} is asked for, and PyTorch finds no {device.type.upper()} device here",
            where="device",
            remedy="Leave the option out, or give cpu.",
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"there is no {name!r} among {torch.cuda.device_count()} CUDA devices", where="device")
    return device


def check_dtype(name: str) -> None:
    """Raises an `InputError` if a model cannot be opened in a precision of that name."""
    if name not in DTYPES:
        raise InputError(f"{name!r} is not one of {', '.join(DTYPES)}", where="dtype")
