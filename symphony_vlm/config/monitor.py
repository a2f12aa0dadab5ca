"""What a run says about itself while it trains, and when it warns or stops (``docs/monitoring.md``)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from symphony_vlm.config.schema import Schema

__all__ = ["MonitorConfig"]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class MonitorConfig(Schema):
    """Reports, and the thresholds of warnings."""

    report_to: Annotated[list[Literal["tensorboard", "wandb"]], BeforeValidator(_as_list)] = Field(
        default=["tensorboard"]
    )
    """Where figures go besides ``log.jsonl``. ``wandb`` needs the extra ``symphony-vlm[wandb]``."""
    router_panel: bool = True
    """Whether the terminal shows load, entropy and graph of the sparse layers below the progress bar."""
    stop_after_nan: int = Field(default=3, ge=1)
    """After how many optimizer steps in a row with a loss or gradient norm that is not finite the run stops. The
    weights are not changed by such a step."""
    collapse_share: float = Field(default=0.9, gt=0, le=1)
    """Share of a layer's tokens that choose one and the same expert, above which its router counts as collapsed. Where
    an even load is above 0.8 already (K of E experts), the middle between that and 1 takes its place."""
    collapse_steps: int = Field(default=50, ge=1)
    """Optimizer steps in a row after which a collapsed router is warned about, counted at log steps."""
    dead_steps: int = Field(default=200, ge=1)
    """The same for an expert that no token chooses."""
    repeat_steps: int = Field(default=1000, ge=1)
    """After how many steps a warning is given again if its cause is still there."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Arithmetic peak of one device in TFLOP/s, for the model FLOPs utilisation; default: what is known of the GPU."""
