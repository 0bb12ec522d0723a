"""That blocks which come and go in every step come from the process's own memory."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, sys
import numpy as np
from ssld import memory

if sys.argv[1] == "kept":
    memory.keep()

def step():
    # eight blocks of 16 MiB, as the gradients of a network; 4096 pages each
    blocks = [np.full(4 << 20, number, np.float32) for number in range(8)]
    return sum(float(block[-1]) for block in blocks)

assert step() == step() == 28
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def faults(how: str) -> int:
    found = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_a_step_takes_no_new_pages() -> None:
    kept = faults("kept")
    assert kept < 100
    # a huge page is one fault for 512 pages
    if not HUGE.exists() or "[always]" not in HUGE.read_text():
        assert faults("as it is") > 3 * kept + 30
