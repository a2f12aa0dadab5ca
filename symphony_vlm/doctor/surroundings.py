"""What is around the libraries: Python, this package's own files, the cache, disks, memory, programs."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from symphony_vlm.doctor.finding import Check, Outcome

__all__ = ["surrounding_checks"]

MIN_FREE_BYTES = 10 * 2**30
"""A small language model with its checkpoints; below, saving soon fails."""
MIN_SHARED_BYTES = 2**30
"""Worker processes hand batches over in shared memory; containers often have 64 MB of it."""
MIN_OPEN_FILES = 1024


def surrounding_checks() -> list[Check]:
    """Checks of everything but libraries and devices."""
    group = "Surroundings"
    return [
        Check(name="Python", group="Package", run=python, required=True),
        Check(name="recipes", group="Package", run=recipes, required=True),
        Check(name="corruptions", group="Package", run=corruptions, required=True),
        Check(name="frost textures", group="Package", run=frost_textures),
        Check(name="processor and memory", group=group, run=processor_and_memory),
        Check(name="working folder", group=group, run=partial(folder, "."), required=True),
        Check(name="temporary folder", group=group, run=temporary_folder, required=True),
        Check(name="hub cache", group=group, run=hub_cache),
        Check(name="shared memory", group=group, run=shared_memory),
        Check(name="open files", group=group, run=open_files),
        Check(name="browser", group=group, run=browser),
    ]


def python() -> Outcome:
    """The interpreter's version and place."""
    version = ".".join(map(str, sys.version_info[:3]))
    kind = "virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        return Outcome(
            status="warning",
            detail=f"{version}; the tests run on 3.10, 3.11 and 3.12",
            remedy="Use one of these if something fails.",
        )
    return Outcome(status="ok", detail=f"{version}, {kind} at {sys.prefix}")


def recipes() -> Outcome:
    """Every packaged recipe can be read."""
    from symphony_vlm.config.loading import list_recipes, load_recipe

    names = list_recipes()
    for name in names:
        load_recipe(name)
    if not names:
        raise RuntimeError("no recipe came with the package")
    return Outcome(status="ok", detail=f"{len(names)} recipes")


def corruptions() -> Outcome:
    """Random draws and one corruption's pixels are those that this package was published with."""
    from symphony_vlm.corruptions.pixel_manifest import committed_manifest, pixel_differences, pixel_manifest

    found, wanted = pixel_manifest(["gaussian_noise"]), committed_manifest()
    if found["canary"] != wanted["canary"] or pixel_differences(found, wanted):
        return Outcome(
            status="warning",
            detail="with these versions of numpy and Pillow corrupted pictures differ from the published ones",
            remedy="Compare no scores with those of another machine; or install with -c constraints.txt.",
        )
    return Outcome(status="ok", detail="gaussian_noise gives the published pixels")


def frost_textures() -> Outcome:
    """The pictures that the corruption frost needs and this package may not bring along."""
    from symphony_vlm.corruptions.frost_textures import find_frost_textures
    from symphony_vlm.errors import InputError

    try:
        paths = find_frost_textures()
    except InputError as error:
        return Outcome(status="absent", detail=f"for the corruption frost: {error.problem}", remedy=error.remedy or "")
    return Outcome(status="ok", detail=str(paths[0].parent))


def processor_and_memory() -> Outcome:
    """Cores and memory that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    detail = f"{cores} cores"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        detail += f", {_size(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))} of memory"
    threads = os.environ.get("OMP_NUM_THREADS")
    return Outcome(status="ok", detail=f"{detail}, OMP_NUM_THREADS={threads or 'not set'}")


def folder(path: str) -> Outcome:
    """Whether files can be made in a folder, and how much room there is."""
    place = Path(path).resolve()
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".symphony_vlm."):
            free = shutil.disk_usage(place).free
    except OSError as error:
        return Outcome(
            status="broken",
            detail=f"{place} cannot be written to ({error.strerror})",
            remedy="Go to a folder of your own; --output names another.",
        )
    if free < MIN_FREE_BYTES:
        return Outcome(
            status="warning",
            detail=f"{place}, {_size(free)} free",
            remedy="A checkpoint takes about 16 bytes a trained parameter; `symphony-vlm config params NAME` counts.",
        )
    return Outcome(status="ok", detail=f"{place}, {_size(free)} free")


def temporary_folder() -> Outcome:
    """The same for what lives for a moment."""
    found = folder(tempfile.gettempdir())
    remedy = "Set TMPDIR to a folder that can be written to." if found.status == "broken" else ""
    # Little is put there: being short of room is no reason to warn.
    return Outcome(status="broken" if remedy else "ok", detail=found.detail, remedy=remedy)


def hub_cache() -> Outcome:
    """Where models named by a hub id are kept, and whether the network may be asked for more."""
    from huggingface_hub import constants

    offline = "offline: only what is there is used" if constants.HF_HUB_OFFLINE else "HF_HUB_OFFLINE is not set"
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(parent for parent in (cache, *cache.parents) if parent.exists())
    found = folder(str(existing))
    if found.status == "broken":
        return Outcome(status="warning", detail=found.detail, remedy="Set HF_HOME to a folder that can be written to.")
    return Outcome(status="ok", detail=f"{cache}, {found.detail.rpartition(', ')[2]}; {offline}")


def shared_memory(place: Path = Path("/dev/shm")) -> Outcome:
    """Room for batches on their way from worker processes, and what of the memory nobody has given back."""
    if not place.is_dir():
        return Outcome(status="ok", detail="not a folder on this system")
    total = shutil.disk_usage(place).total
    # DeepSpeed's collectives on a CPU never remove theirs, 66 MiB a process.
    left = [path.stat().st_size for path in place.glob("deepspeed_allreduce_buffer_*")]
    if sum(left) >= MIN_SHARED_BYTES:
        return Outcome(
            status="warning",
            detail=f"{_size(total)}, of which {len(left)} buffers of DeepSpeed hold {_size(sum(left))} of memory",
            remedy=f"If no run uses DeepSpeed now: rm {place}/deepspeed_allreduce_buffer_*",
        )
    if total < MIN_SHARED_BYTES:
        return Outcome(
            status="warning",
            detail=f"{_size(total)}; a worker process that runs out of it dies with a bus error",
            remedy="Start the container with --shm-size=8g, or set the stages' dataloader_workers to 0.",
        )
    return Outcome(status="ok", detail=_size(total))


def open_files() -> Outcome:
    """How many files a process may have open: shards, workers and sockets add up."""
    try:
        import resource
    except ImportError:  # not on Windows
        return Outcome(status="ok", detail="no limit on this system")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < MIN_OPEN_FILES:
        return Outcome(status="warning", detail=f"at most {soft}", remedy="ulimit -n 4096")
    return Outcome(status="ok", detail="unlimited" if soft < 0 else f"at most {soft}")


def browser() -> Outcome:
    """The browser that `make test-browser` drives."""
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        return Outcome(status="absent", detail="for make test-browser", remedy="Debian, Ubuntu: apt install chromium")
    return Outcome(status="ok", detail=found)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
