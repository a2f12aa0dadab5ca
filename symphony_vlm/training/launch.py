"""Whether the processes that a launcher has started really found each other.

A process that was started beside others and does not know of them would work alone, as would each of the others:
several runs in one folder, and a success at the end.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from accelerate import PartialState

from symphony_vlm.errors import InputError

__all__ = ["check_count", "check_launch", "join_processes"]

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and the deepspeed launcher tell every process."""
OTHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "SLURM_NTASKS": "Slurm",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
}
"""Launchers that start processes in other ways, by the variable with their number."""
REMEDY = "Start it with torchrun --nproc-per-node N -m train.instruct ... (train/launch has scripts)"


def check_launch(environment: Mapping[str, str] = os.environ, *, remedy: str = REMEDY) -> None:
    """Before processes join: whether the variables that they need for it are complete.

    Args:
        environment: what the launcher has set.
        remedy: how such processes are started.

    Raises:
        InputError: some are set and some are missing. Joining would fail, or wait for ever.
    """
    if _number(environment, "WORLD_SIZE") <= 1 and "LOCAL_RANK" not in environment:
        return
    missing = [name for name in TORCHRUN if name not in environment]
    if missing:
        there = ", ".join(f"{name}={environment[name]}" for name in TORCHRUN if name in environment)
        raise InputError(
            f"a launcher has set {there}, but not {', '.join(missing)}",
            where="launch",
            remedy=f"{remedy}, or unset these variables to work in one process.",
        )


def join_processes(*, cpu: bool, local_rank: int | None = None) -> PartialState:
    """Joins the processes of a launch.

    Args:
        cpu: whether they train on CPUs.
        local_rank: what the deepspeed launcher gave on the command line, if it did.

    Raises:
        InputError: a launcher has started several processes, but they are not one run.
    """
    if local_rank is not None and str(local_rank) != os.environ.get("LOCAL_RANK"):
        raise InputError(
            f"--local_rank={local_rank} was given, but the variable LOCAL_RANK is "
            f"{os.environ.get('LOCAL_RANK', 'not set')}",
            where="launch",
            remedy=f"{REMEDY}.",
        )
    check_launch()
    state = PartialState(cpu=cpu)
    check_count(state.num_processes)
    return state


def check_count(found: int, environment: Mapping[str, str] = os.environ, *, remedy: str = REMEDY) -> None:
    """After processes have joined: whether they are as many as the launcher has started.

    Args:
        found: how many this process sees.
        environment: what the launcher has set.
        remedy: how such processes are started.

    Raises:
        InputError: they are not.
    """
    expected, source = _expected_processes(environment)
    if expected != found:
        raise InputError(
            f"{source} is {expected}, but this process sees {found}: started {expected} times, each would work alone, "
            "all of them into the same folder",
            where="launch",
            remedy=f"{remedy}; under Slurm, srun starts one torchrun per node. For one process alone, unset {source}.",
        )


def _expected_processes(environment: Mapping[str, str]) -> tuple[int, str]:
    if "WORLD_SIZE" in environment:
        return _number(environment, "WORLD_SIZE"), "WORLD_SIZE"
    for name in OTHERS:
        if name in environment:
            return _number(environment, name), name
    return 1, ""


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment.get(name, "1"))
    except ValueError as error:
        raise InputError(f"{environment[name]!r} is no number of processes", where=name) from error
