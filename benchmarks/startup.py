"""How long a user waits: for the help, and from the command to the first step of training.

    python benchmarks/startup.py

Medians of five, of the embedded ladder. The first step is seen from its checkpoint, which a recipe may ask for, so the
time holds that too. A run before those that count fills the cache of compiled kernels. Asked for: less than 0.3 s and
6 s.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

TURNS = 5
SSLD = [sys.executable, "-m", "ssld"]


def seconds_of_help() -> float:
    """Until `ssld --help` has ended."""
    began = time.perf_counter()
    subprocess.run([*SSLD, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


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


@click.command()
def main() -> None:
    """Print both."""
    for what, seconds in (("help", seconds_of_help), ("first step", seconds_to_first_step)):
        seconds()
        click.echo(f"{what}: {statistics.median(seconds() for _ in range(TURNS)):.2f} s")


if __name__ == "__main__":
    main()
