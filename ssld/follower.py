"""A rank that follows rank 0, which starts it: `python -m ssld.follower RUN NUMBER COUNT SOCKET MEMORY`."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from queue import Queue
from typing import IO, Any

from rich.console import Console

from ssld.contracts import Ranks
from ssld.crew import GOING_ON
from ssld.ending import leave, wanted_memory
from ssld.errors import ChangedError, Interrupted, RankError, SsldError
from ssld.graph import make_plan
from ssld.inputs import Inputs
from ssld.journal import Journal
from ssld.preview.trial import endless, trial
from ssld.rundir import RunDirectory
from ssld.train.networks import use_device
from ssld.train.ranks import Meeting
from ssld.watch import watch


class Boss:
    """Rank 0, seen from here; when it is gone or wants no more, the process ends, in the middle of a step too."""

    def __init__(self) -> None:
        self.wanted: Queue[dict[str, Any]] = Queue()
        # whatever else is printed, by a plug-in say, goes where it does no harm
        self.out: IO[str] = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.told = 0.0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            self.wanted.put(json.loads(line))
        os._exit(0)

    def go_on(self) -> None:
        """Tell, once a second at most, that this rank is not held."""
        if time.monotonic() - self.told > 1:
            self.told = time.monotonic()
            self.tell(word=GOING_ON)

    def tell(self, **message: Any) -> None:
        self.out.write(json.dumps(message) + "\n")
        self.out.flush()

    def tell_of(self, error: SsldError) -> None:
        """Let rank 0 raise it."""
        self.tell(error=type(error).__name__, message=str(error))


class Whisper(Journal):
    """Keeps no log and shows nothing; rank 0 is told what it cannot meet itself."""

    def __init__(self, boss: Boss) -> None:
        super().__init__(None, Console(quiet=True))
        self.boss = boss

    def met(self, text: str) -> None:
        self.boss.tell(note=text)


def follow(directory: Path, ranks: Ranks, boss: Boss) -> None:
    """Compute a rank's share of what rank 0 does in the run."""
    run = RunDirectory(directory)
    recipe, options = run.recorded()
    plan, journal = make_plan(recipe, limit=options.limit), Whisper(boss)
    use_device(options.device)
    inputs = Inputs.of(run, plan, options, journal, boss.go_on, ranks)
    while True:
        wanted = boss.wanted.get()
        if "label" in wanted:
            inputs.soft.label_together(plan.node(wanted["label"]), wanted["shards"], ranks)
            boss.tell(word="labelled")
        elif "attempt" in wanted:
            node = plan.node(wanted["attempt"])
            with suppress(Interrupted):
                node.kind.run(endless(trial(plan, node, options.device, journal, ranks), wanted["batch"]))
            boss.tell(word="attempted")
        else:
            node = plan.node(wanted["train"])
            reached = run.reached(node, journal.note)
            if (node.fingerprint, reached.step if reached else 0) != (wanted["fingerprint"], wanted["step"]):
                raise ChangedError(
                    f"{node.name}: expected what rank 0 has found, step {wanted['step']}, got "
                    f"{f'step {reached.step}' if reached else 'none'}, or other data; do not change them during a run"
                )
            node.kind.run(inputs.task(node, reached))


def main() -> int:
    """Ends with the code of the error that it met, which rank 0 was told."""
    number, count, connection, memory = map(int, sys.argv[2:])
    boss = Boss()
    try:
        meeting = Meeting(number, [socket.socket(fileno=connection)], os.fdopen(memory, "r+b"))
        directory = Path(sys.argv[1])
        patience = RunDirectory(directory).options().stall_timeout
        with watch.on(patience, lambda error: leave(error, lambda: boss.tell_of(error))):
            follow(directory, Ranks(number, count, meeting), boss)
    except (Interrupted, RankError) as error:
        # rank 0 knows of the signal, and meets what all ranks have met
        return error.exit_code
    except SsldError as error:
        boss.tell_of(error)
        return error.exit_code
    except MemoryError as error:
        # a code of its own: who ends with that of RankError is taken to miss another rank
        boss.tell_of(RankError(wanted_memory(error)))
        return SsldError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
