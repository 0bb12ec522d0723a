"""Images per second of training on two processes that share every batch, against one.

    python benchmarks/ranks.py

A stage as a run trains it, on digits, which cost next to nothing to decode, from the end of the first step on. Each of
two processes reads on the core of its step; one process has the other core for that.
"""

import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from material import planned, quiet, supervised
from measuring import Row, alone, interleaved, peak

from ssld.crew import Crew
from ssld.preview.trial import endless, paced_steps, trial
from ssld.recipe import dump
from ssld.rundir import Options, RunDirectory
from ssld.threads import shared_by
from ssld.train.networks import use_device

CASES = (("MobileNetV3_small_x1_0", 64, 64), ("MobileNetV3_large_x1_0", 224, 16), ("ResNet18_vd", 64, 32))
TINY = (("MobileNetV3_small_x0_35", 32, 8),)
SECONDS = 10.0


def trained(network: str, size: int, batch: int, count: int, seconds: float) -> tuple[float, list[float]]:
    """Images per second on so many ranks, and the peak of the memory of each but this one, in MiB."""
    use_device("cpu")
    with tempfile.TemporaryDirectory() as name, closing(quiet()) as journal:
        plan = planned(supervised(Path(name), network, size, batch, "builtin:digits?part=labeled"))
        run, [node] = RunDirectory(Path(name, "run")), plan.nodes
        run.claim()
        run.begin(dump(plan.recipe), Options(nproc=count))
        with shared_by(count), Crew(run.path, count, journal.note) as crew:
            crew.tell(attempt=node.name, batch=batch)
            task = endless(trial(plan, node, "cpu", journal, crew.ranks), batch)
            speed = paced_steps(node.kind.run, task, seconds)
            crew.expect("attempted")
            return speed, [peak(follower.process.pid) for follower in crew.followers]


def rows(quick: bool) -> Iterator[Row]:
    for network, size, batch in TINY if quick else CASES:

        def speed(count: int, case: tuple[str, int, int] = (network, size, batch)) -> float:
            return trained(*case, count, 0.0 if quick else SECONDS)[0]

        turns = interleaved({"one": lambda: speed(1), "two": lambda: speed(2)}, quick)
        how = f"batch {batch}; one process {turns.median('one'):.0f} img/s"
        name = f"two processes: {network}, {size} px"
        yield Row(name, turns.median("two"), "img/s", turns.ratio("two", "one"), "one", "", how)


if __name__ == "__main__":
    alone(rows)
