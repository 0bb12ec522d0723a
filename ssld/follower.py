"""A rank that follows rank 0, which starts it: `python -m ssld.follower RUN NUMBER COUNT LINE MEMORY`."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from queue import Queue
from typing import IO, Any

from rich.console import Console

from ssld.contracts import Ranks
from ssld.errors import Interrupted, RankError, SsldError
from ssld.graph import make_plan
from ssld.inputs import Inputs
from ssld.journal import Journal
from ssld.preview.trial import endless, trial
from ssld.rundir import RunDirectory
from ssld.train.networks import use_device
from ssld.train.ranks import Meeting


class Line:
    """What connects this process with rank 0; when rank 0 is gone or wants no more, the process ends, in a step too."""

    def __init__(self) -> None:
        self.wanted: Queue[dict[str, Any]] = Queue()
        # whatever else is printed, by a plug-in say, goes where it does no harm
        self.out: IO[str] = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            self.wanted.put(json.loads(line))
        os._exit(0)

    def say(self, **message: Any) -> None:
        self.out.write(json.dumps(message) + "\n")
        self.out.flush()


class Whisper(Journal):
    """Keeps no log and shows nothing; rank 0 is told what it cannot meet itself."""

    def __init__(self, line: Line) -> None:
        super().__init__(None, Console(file=io.StringIO()))
        self.line = line

    def met(self, text: str) -> None:
        self.line.say(note=text)


def follow(directory: Path, ranks: Ranks, line: Line) -> None:
    """Compute a rank's share of what rank 0 does in the run."""
    run = RunDirectory(directory)
    recipe, options = run.recorded()
    plan, journal = make_plan(recipe, limit=options.limit), Whisper(line)
    use_device(options.device)
    # paddle takes SIGTERM for itself when it is imported; a signal to the whole group is rank 0's to act upon
    for number_of_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number_of_signal, signal.SIG_IGN)
    inputs = Inputs.of(run, plan, options, journal, lambda: None, ranks)
    while True:
        wanted = line.wanted.get()
        if "label" in wanted:
            inputs.soft.label(plan.node(wanted["label"]), ranks.number + 1, ranks.count)
            line.say(labelled=True)
        elif "attempt" in wanted:
            node = plan.node(wanted["attempt"])
            with suppress(Interrupted):
                node.kind.run(endless(trial(plan, node, options.device, journal, ranks), wanted["batch"]))
        else:
            node = plan.node(wanted["train"])
            node.kind.run(inputs.task(node, run.reached(node, journal.note)))


def main() -> int:
    """Ends with the code of the error that it met, which rank 0 was told."""
    number, count, connection, memory = map(int, sys.argv[2:])
    line = Line()
    try:
        meeting = Meeting(number, [socket.socket(fileno=connection)], os.fdopen(memory, "r+b"))
        follow(Path(sys.argv[1]), Ranks(number, count, meeting), line)
    except (Interrupted, RankError) as error:
        # rank 0 knows of the signal, and has missed the other rank as well
        return error.exit_code
    except SsldError as error:
        line.say(error=type(error).__name__, message=str(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
