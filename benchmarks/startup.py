"""How long a user waits: for the help, and from the command to the first step of training.

    python benchmarks/startup.py

Of the embedded ladder. The first step is seen from its checkpoint, which a recipe may ask for, so the time holds that
too. A run before the first that counts fills the cache of compiled kernels.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from measuring import Row, alone, interleaved, timed

SSLD = [sys.executable, "-m", "ssld"]


def seconds_of_help() -> float:
    """Until `ssld --help` has ended."""
    return timed(lambda: subprocess.run([*SSLD, "--help"], check=True, stdout=subprocess.DEVNULL))


def seconds_to_first_step() -> float:
    """From `ssld run` to the checkpoint of its first step."""
    with tempfile.TemporaryDirectory() as name:
        run = ["run", "mobilenetv3_ssld", "--out", name, "-o", "stages.teach.save_steps=1"]
        began = time.perf_counter()
        process = subprocess.Popen([*SSLD, *run], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not Path(name, "teach", "step-00000001").exists():
                if process.poll() is not None:
                    raise SystemExit(f"expected a step, ssld run ended with exit code {process.returncode}")
                time.sleep(0.005)
            return time.perf_counter() - began
        finally:
            process.kill()
            process.wait()


def rows(quick: bool) -> Iterator[Row]:
    measures = {"help": seconds_of_help, "first step": seconds_to_first_step}
    if not quick:
        interleaved(measures, quick=True)
    turns = interleaved(measures, quick)
    yield Row("start: ssld --help", turns.median("help"), "s", asked="< 0.3 s")
    yield Row("start: ssld run to the first step", turns.median("first step"), "s", asked="< 6 s")


if __name__ == "__main__":
    alone(rows)
