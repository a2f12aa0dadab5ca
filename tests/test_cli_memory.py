"""Freed memory stays in the process, seen by the page faults of the next tensor."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys, torch
from symphony_vlm.cli.memory import keep_freed_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: some systems give large pages unasked
if sys.argv[1] == "keep":
    keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    torch.ones(2**24)
before = faults()
for _ in range(8):
    torch.ones(2**24)  # 64 MiB
print(faults() - before)
"""


def page_faults(*arguments: str, **environment: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        check=True,
        # Large pages would hide what is counted here.
        env={**os.environ, "OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "0", **environment},
    )
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_used_again() -> None:
    pages = 8 * 2**26 // os.sysconf("SC_PAGE_SIZE")
    assert page_faults("as it is") > pages // 2, "the system takes memory back by itself: nothing to be kept"
    assert page_faults("keep") < pages // 20
    # Whoever has settings of their own keeps them.
    assert page_faults("keep", MALLOC_TRIM_THRESHOLD_="131072") > pages // 2
