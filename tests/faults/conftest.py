"""Attempts at the tiny run, forked by a process that has paddle already, and one run that nothing interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssld import checkpoint

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny.py"))))
STEPS = {"teach": 9, "distill": 12, "finetune": 9, "fixres": 9}
"""Epochs * images / batch size, rounded up; the pool has 48 images less one that is held out."""
RUN = ("run", "tiny.yaml", "--trust-teacher")
EVENTS = ("signal", "step", "answering", "decoding", "raised")
"""In a trace, what is no phase."""
TEMPORARY = re.compile(r"\.(tmp|del|new)-")


@dataclass(frozen=True)
class Attempt:
    """One command: its exit code, or less the signal that ended it; what it was at, by seconds; what it printed.

    left: processes of its session that lived on, and its shared memory.
    """

    pid: int
    code: int
    seconds: float
    trace: list[tuple[float, str]]
    left: list[str]
    said: str

    @property
    def sent(self) -> list[int]:
        """Places in the trace at which signals were sent."""
        return [place for place, (_, event) in enumerate(self.trace) if event.startswith("signal")]

    def at(self, place: int) -> str:
        """What it was at when that came, with the stage."""
        events = [event for _, event in self.trace[:place] if not event.startswith(EVENTS)]
        stages = [event for event in events if event in STEPS]
        inner = events[-1] if events[-1] in ("saving", "evaluating") else ""
        return f"{inner} {stages[-1]}".strip() if inner and stages else events[-1]

    def times(self) -> dict[str, list[float]]:
        """How long each phase lasted, each time."""
        found: dict[str, list[float]] = {}
        phases = [entry for entry in self.trace if not entry[1].startswith(EVENTS)]
        for (time, phase), (end, _) in pairwise(phases):
            found.setdefault(phase, []).append(end - time)
        return found


@dataclass(frozen=True)
class Forks:
    """Forks attempts: see forks.py. folder: where they run, one after the other."""

    process: subprocess.Popen[str]
    folder: Path

    def __call__(self, *words: str, folder: Path | None = None, **request: Any) -> Attempt:
        assert self.process.stdin is not None, "made with a pipe"
        assert self.process.stdout is not None, "made with a pipe"
        asked = {"words": words, "folder": str(folder or self.folder), **request}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        attempt = Attempt(**json.loads(self.process.stdout.readline()))
        assert "Traceback" not in attempt.said, attempt.said
        assert "hang" not in [event for _, event in attempt.trace], (attempt.trace, attempt.said)
        return attempt


@dataclass(frozen=True)
class Unbroken:
    """A run that nothing interrupted, what its directory holds, and how it went."""

    run: Path
    contents: dict[str, str]
    attempt: Attempt


@dataclass
class Tries:
    """Attempts at one run directory, one after the other, which is held against the unbroken one at the end."""

    forks: Forks
    unbroken: Unbroken
    history: list[str] = field(default_factory=list)
    until: str = "fixres"
    """The last stage that is tried."""

    @property
    def run(self) -> Path:
        return self.forks.folder / "runs" / "tiny"

    def begin(self, stage: str = "teach") -> None:
        """A run that has done everything before the stage."""
        shutil.rmtree(self.run, ignore_errors=True)
        if stage == "teach":
            return
        shutil.copytree(self.unbroken.run, self.run, symlinks=True)
        for later in list(STEPS)[list(STEPS).index(stage) :]:
            shutil.rmtree(self.run / later)
        if stage == "distill":
            shutil.rmtree(self.run / "labels.store")

    def attempt(self, signals: list[dict[str, Any]], *words: str, **request: Any) -> Attempt:
        """One more; nothing that it saved may be lost, and no process of it may live on."""
        before = self.reached()
        attempt = self.forks(*RUN, "--until", self.until, *words, signals=signals, **request)
        self.history.append(f"{signals} -> {attempt.code} at {[attempt.at(place) for place in attempt.sent]}")
        assert not attempt.left, (attempt.left, self.history)
        self.expect_what_was_saved(before, attempt)
        return attempt

    def expect_what_was_saved(self, before: dict[str, int], attempt: Attempt) -> None:
        """Every save that had come back is there, and at most one more that had not, and little else."""
        known, taken, stage, saving, broken = dict(before), dict(before), "", False, False
        for _, event in attempt.trace:
            stage = event if event in STEPS else stage
            if event == "step":
                taken[stage] += 1
            if saving and not event.startswith(EVENTS):
                known[stage] = known[stage] if broken else taken[stage]
                saving = broken
            saving, broken = saving or event == "saving", broken or (saving and event == "raised")
        reached = self.reached()
        for name, step in known.items():
            most = taken[name] if saving and name == stage else step
            assert step <= reached[name] <= most, (name, step, most, reached, self.history)
            there = checkpoint.steps(self.run / name)
            allowed = self.allowed(name)
            assert len(there) <= len(allowed) + 1, (name, there, self.history)

    def reached(self) -> dict[str, int]:
        """The step from which each stage would go on; a damaged checkpoint fails."""
        return {name: found.step if (found := self.newest(name)) else 0 for name in STEPS}

    def newest(self, stage: str) -> checkpoint.Checkpoint | None:
        return checkpoint.latest(self.run / stage, lambda text: pytest.fail(f"{text}\n{self.history}"))

    def allowed(self, stage: str) -> list[int]:
        """The checkpoints that a finished stage keeps, here as many as a stopped one may."""
        return checkpoint.steps(self.unbroken.run / stage)

    def finish(self, **request: Any) -> Attempt:
        """The last attempt, and whether all is as if nothing had happened."""
        attempt = self.attempt([], **request)
        assert attempt.code == 0, (attempt.said, self.history)
        self.expect_all()
        return attempt

    def expect_all(self) -> None:
        """All is as in the unbroken run, up to the last stage that is tried."""
        wrong = self.differences()
        assert not wrong, (wrong, self.history)

    def differences(self) -> list[str]:
        """What is not as in the unbroken run. Labels that were being written when a kill came stay for an hour."""
        got = contents(self.run)
        aside = [name for name in got if name.startswith("labels.store/") and TEMPORARY.search(name)]
        got = {name: value for name, value in got.items() if name not in aside}
        later = tuple(f"{stage}/" for stage in list(STEPS)[list(STEPS).index(self.until) + 1 :])
        later += ("labels.store/",) if self.until == "teach" else ()
        wanted = {name: value for name, value in self.unbroken.contents.items() if not f"{name}/".startswith(later)}
        wrong = [name for name in sorted(wanted.keys() | got.keys()) if wanted.get(name) != got.get(name)]
        return wrong + (aside if len(aside) > len(self.history) else [])


def contents(run: Path) -> dict[str, str]:
    """What every file and link of a run holds, less times, logs, patience, and who worked there last."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_symlink():
            found[name] = f"to {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "folder"
        elif path.name == "run.json":
            options = json.loads(path.read_text())
            options.pop("stall_timeout")
            found[name] = json.dumps(options)
        elif path.name == "state.json":
            state = json.loads(path.read_text())
            state["state"]["facts"].pop("seconds")
            found[name] = json.dumps(state)
        elif path.name not in ("run.lock", "train.log", "metrics.jsonl", "manifest.json"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """What tiny.py has."""
    return TINY


@pytest.fixture(scope="session")
def contents_of() -> Callable[[Path], dict[str, str]]:
    """contents_of(run): what every file of it holds."""
    return contents


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    folder = tmp_path_factory.mktemp("forks")
    site = TINY.write(folder)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    paths = filter(None, [os.environ.get("PYTHONPATH")])
    home = {
        "HOME": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join((str(site), *paths)),
    }
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forks.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads, **home},
    ) as process:
        yield Forks(process, folder)
        assert process.stdin is not None, "made with a pipe"
        process.stdin.close()


@pytest.fixture(scope="session")
def unbroken(forks: Forks) -> Unbroken:
    attempt = forks(*RUN)
    assert attempt.code == 0, attempt.said
    run = forks.folder / "unbroken"
    shutil.move(forks.folder / "runs" / "tiny", run)
    return Unbroken(run, contents(run), attempt)


@pytest.fixture
def tries(forks: Forks, unbroken: Unbroken) -> Callable[..., Tries]:
    """tries(stage, until): a run that has done everything before the stage, to be tried and finished."""

    def make(stage: str = "teach", until: str = "fixres") -> Tries:
        made = Tries(forks, unbroken, until=until)
        made.begin(stage)
        return made

    return make
