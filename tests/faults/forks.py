"""Runs `ssld` many times at the price of one import.

For every line of JSON on standard input it forks a child, which runs the command in a folder, sends it signals at the
moments that are asked for, and answers with a line: what ended it, and all that it was at, by time. A fork of one
thread is safe; there is no more than one here, which is checked each time.

{"words": ["resume"], "folder": "…", "change": "keep_all",
 "signals": [{"number": 9, "phase": "saving", "nth": 2, "after": 0.01}]}

phase, nth: where the child is at it for the nth time since its start, or since the signal before; at once when left
out. after: seconds from there. to: words of the command line of a process that the child has started; itself when left
out. change: one of CHANGES, made in the child.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

import ssld.crew
import ssld.engine
import ssld.preflight
import ssld.score
import ssld.train.frozen
from ssld import cli, files, inputs, plugins, rundir, soft
from ssld.data import rendering
from ssld.labels import store
from ssld.train import compiling, evaluation, loop, networks

STAGES = ("teach", "distill", "finetune", "fixres")
PHASES = ("start", "preflight", "between", "labelling", *STAGES, "evaluating", "saving", "keeping")
"""Where a child can be; "start" and "between" are all that has no other name."""
EVENTS = ("step", "answering", "decoding", "raised")
"""What is told besides: a step or a frozen network's answer begins, a process is sent images, a phase has raised."""
NAMES = (*PHASES, *EVENTS)
LOOKS = 200
"""So many seconds without a word from a child mean that it hangs; those in which all stand still do not count."""


# In the child ---------------------------------------------------------------------------------------------------------


class Teller:
    """Tells the parent what the child is at, by one byte for each change."""

    def __init__(self, pipe: int) -> None:
        self.pipe, self.stack = pipe, ["start"]

    def say(self, name: str) -> None:
        os.write(self.pipe, bytes([NAMES.index(name)]))

    def announce(self, where: Any, name: str, event: str) -> None:
        """Let the method there tell that it begins, from whatever thread."""
        inner = getattr(where, name)

        def told(*arguments: Any) -> Any:
            self.say(event)
            return inner(*arguments)

        setattr(where, name, told)

    @contextmanager
    def at(self, phase: str) -> Iterator[None]:
        self.stack.append(phase)
        self.say(phase)
        try:
            yield
        except BaseException:
            self.say("raised")
            raise
        finally:
            self.stack.pop()
            if phase in STAGES:
                self.stack = ["between"]
            self.say(self.stack[-1])

    def wrap(self, where: Any, name: str, phase: Callable[..., str]) -> None:
        """Let the function there tell when it begins and ends."""
        inner = getattr(where, name)

        def told(*arguments: Any, **options: Any) -> Any:
            with self.at(phase(*arguments)):
                return inner(*arguments, **options)

        setattr(where, name, told)


def instrument(teller: Teller) -> None:
    teller.wrap(loop, "fit", lambda task, *_: task.name)
    teller.wrap(ssld.preflight, "preflight", lambda *_: "preflight")
    teller.wrap(soft, "label", lambda *_: "labelling")
    teller.wrap(store.Store, "commit", lambda *_: "keeping")
    teller.wrap(rundir.RunDirectory, "save", lambda *_: "saving")
    teller.wrap(evaluation.Evaluator, "__call__", lambda *_: "evaluating")
    teller.announce(loop.Descent, "__call__", "step")
    teller.announce(ssld.train.frozen.Frozen, "__call__", "answering")
    teller.announce(rendering._Process, "render", "decoding")


def forget_statistics() -> None:
    """A resume that leaves the statistics of batch norms as they are in a new network."""
    load = networks.load

    def forgetful(network: Any, weights: Any, what: str) -> None:
        fresh = {"_mean": np.zeros_like, "_variance": np.ones_like}
        kinds = {name: fresh.get(name.rpartition(".")[2]) for name in weights} if "checkpoint" in what else {}
        load(network, {name: (kinds.get(name) or (lambda x: x))(value) for name, value in weights.items()}, what)

    networks.load = forgetful


def forget_velocity() -> None:
    """A resume that begins with a new optimizer."""
    loop.Momentum.restore = lambda self, state: None


def skip_a_step() -> None:
    """A resume that goes on one step too late."""
    known = inputs.state_of

    def late(found: Any) -> Any:
        state = known(found)
        return type(state)(state.step + 1, state.weights, state.optimizer, state.facts)

    inputs.state_of = late


def leave_litter() -> None:
    """A start that clears nothing up."""
    rundir.RunDirectory.clear = lambda self: None


def keep_all() -> None:
    """A run that removes no checkpoint."""
    rundir.checkpoint.retain = lambda root, keep: None


def render_in_processes() -> None:
    """No defect: processes that decode come up at once, not only in a run that is worth it."""
    rendering.FIRST = 0.0


def write_slowly() -> None:
    """No defect: a disk that takes its time."""
    write = files.disk.write

    def slow(path: Path, data: bytes) -> None:
        write(path, data)
        time.sleep(0.2)

    files.disk.write = slow  # type: ignore[method-assign]


def answer_slowly() -> None:
    """No defect: frozen networks that take their time, and are asked about an image at a time by evaluations."""
    evaluation.BATCH = 1
    answer = ssld.train.frozen.Frozen.__call__

    def slow(self: Any, images: np.ndarray) -> np.ndarray:
        logits = answer(self, images)
        time.sleep(0.1)
        return logits

    ssld.train.frozen.Frozen.__call__ = slow  # type: ignore[method-assign]


def short_memory() -> None:
    """No defect: a system that has no memory for what the third step wants."""
    descend, steps = loop.Descent.__call__, iter(range(10**6))

    def short(self: Any, target: Any, rate: float) -> Any:
        if next(steps) == 2:
            have = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (have + 2**27, have + 2**27))
            np.ones(2**28, np.float32)
        return descend(self, target, rate)

    loop.Descent.__call__ = short


CHANGES = {
    made.__name__: made
    for made in (
        forget_statistics,
        forget_velocity,
        skip_a_step,
        leave_litter,
        keep_all,
        render_in_processes,
        write_slowly,
        answer_slowly,
        short_memory,
    )
}


def child(request: dict[str, Any], folder: str, pipe: int) -> int:
    """Run the command as it is run by a shell, but for the import."""
    os.setsid()
    os.chdir(folder)
    log = os.open("attempt.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # as they are where nobody has set them, such as paddle at its import
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # a kill loses nothing that the system has; what a power cut loses is another campaign
    files.disk.fsync = lambda path: None  # type: ignore[method-assign]
    os.environ.update(request.get("environment", {}))
    instrument(Teller(pipe))
    if request.get("change"):
        CHANGES[request["change"]]()
    try:
        cli.main(request["words"], prog_name="ssld")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# In the parent --------------------------------------------------------------------------------------------------------


def attempt(request: dict[str, Any], folder: str) -> dict[str, Any]:
    """Fork a child, send it its signals, and wait for it."""
    assert len(os.listdir("/proc/self/task")) == 1, "a fork of several threads may hang"
    ours, theirs = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        code = 1
        try:
            code = child(request, folder, theirs)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    os.close(theirs)
    trace = watch(pid, ours, list(request.get("signals", ())), began)
    _, status = os.waitpid(pid, 0)
    os.close(ours)
    return {
        "pid": pid,
        "code": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - began,
        "trace": trace,
        "left": left(pid),
        "said": Path(folder, "attempt.log").read_text(errors="replace"),
    }


def watch(pid: int, pipe: int, signals: list[dict[str, Any]], began: float) -> list[tuple[float, str]]:
    """What the child was at, by seconds since its start, until it has ended; the signals that were sent are in it."""
    trace, counts = [(0.0, "start")], dict.fromkeys(NAMES, 0)
    due, now, looks = None, "start", 0
    while True:
        if due is None and signals and reached(signals[0], counts, now):
            due = time.monotonic() + signals[0]["after"]
        wait = 1.0 if due is None else max(0.0, due - time.monotonic())
        if not select.select([pipe], [], [], min(1.0, wait))[0]:
            looks += 1
            if looks > LOOKS:
                signals, due = [{"number": signal.SIGKILL}, *signals], 0.0
                trace.append((time.monotonic() - began, "hang"))
            if due is not None and time.monotonic() >= due:
                sent = signals.pop(0)
                for target in named(pid, sent["to"]) if "to" in sent else [pid]:
                    with suppress(ProcessLookupError):
                        os.kill(target, sent["number"])
                trace.append((time.monotonic() - began, f"signal {sent['number']}"))
                due, counts = None, dict.fromkeys(NAMES, 0)
            continue
        told = os.read(pipe, 1)
        if not told:
            return trace
        now, looks = NAMES[told[0]], 0
        counts[now] += 1
        trace.append((time.monotonic() - began, now))


def reached(wanted: dict[str, Any], counts: dict[str, int], now: str) -> bool:
    """Whether the child is where the time of the signal counts from."""
    return "phase" not in wanted or (counts[wanted["phase"]] >= wanted["nth"] and now == wanted["phase"])


def named(session: int, words: str) -> list[int]:
    """The processes of a session whose command line has these words."""
    return [int(pid) for pid in members(session) if words.encode() in Path("/proc", pid, "cmdline").read_bytes()]


def left(session: int) -> list[str]:
    """Processes of the child's session that live on for seconds, in which one can still come up, and shared memory."""
    end = time.monotonic() + 20
    while (alive := members(session)) and time.monotonic() < end:
        time.sleep(0.01)
    return alive + [name for name in os.listdir("/dev/shm") if f"_{session}_" in name]


def members(session: int) -> list[str]:
    """Processes of a session, other than those that only wait for somebody to ask how they ended."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                state, _, _, of = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[:4]
                if int(of) == session and state != "Z":
                    found.append(entry)
    return found


def main() -> None:
    plugins.find = functools.cache(plugins.find)
    for kind in ("pretrain", "distill", "finetune", "fixres"):
        plugins.stage_kind(kind)
    plugins.load("teachers", "stage")
    compiling.prepare(networks.build("Tiny", {}, 4), lambda text: None)
    for line in sys.stdin:
        request = json.loads(line)
        sys.stdout.write(json.dumps(attempt(request, request["folder"])) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
