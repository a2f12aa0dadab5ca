"""Names of the engines that share a stage out over processes; what each does is in ``training/engine.py``."""

from __future__ import annotations

from symphony_vlm.text import nearest

__all__ = ["ENGINES", "check_engine_name"]

ENGINES = ("auto", "ddp", "fsdp2", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def check_engine_name(name: str) -> str:
    """The name itself, if it is an engine's or that of a DeepSpeed file.

    Raises:
        ValueError: it is neither.
    """
    if name not in ENGINES and not name.endswith(".json"):
        raise ValueError(
            f"'engine': {name!r} is none of {', '.join(ENGINES)}, and no DeepSpeed file (.json){nearest(name, ENGINES)}"
        )
    return name
