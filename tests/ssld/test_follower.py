"""A rank that follows, as a process: what it does, what it says when it fails, and that it never outlives rank 0."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssld import engine, recipe
from ssld.crew import Crew
from ssld.environment import RANKS
from ssld.errors import CheckpointError, DataError, RankError, SsldError
from ssld.rundir import Options, RunDirectory
from ssld.train.ranks import WORD, shared_memory

# A student that misbehaves in the second step of rank 1, in the way that the recipe names.
NETWORK = """\
import os, signal, sys
import numpy as np
import paddle
from paddle import nn
from ssld.errors import DataError

def noise():
    print("a word of a plug-in")
    sys.stdout.flush()
    os.write(1, b"and one past Python\\n")
    os.system("echo and one of a child")

def fail():
    raise DataError("expected quiet, got noise")

def stumble():
    raise ValueError("a defect of a plug-in")

ACTS = {
    "noise": noise,
    "fail": fail,
    "stumble": stumble,
    "leave": lambda: os._exit(5),
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
}

class Acting(nn.Layer):
    head, features = "fc", "flatten"

    def __init__(self, num_classes: int, act: str = "nothing"):
        super().__init__()
        self.act, self.steps = act, 0
        self.flatten, self.fc = nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes)
        if act == "draw":
            drawn = np.random.default_rng(os.getpid()).normal(size=self.fc.weight.shape)
            self.fc.weight.set_value(drawn.astype("float32"))

    def forward(self, x):
        if self.training and "follower" in sys.argv[0]:
            self.steps += 1
            if self.steps == 2 and self.act in ACTS:
                ACTS[self.act]()
        return self.fc(self.flatten(x))
"""
SHAPES = "builtin:shapes?size=16&classes=4&"
RECIPE = {
    "name": "shared",
    "images": {"resolution": 16, "eval": ["CropImage", "NormalizeImage"]},
    "data": {"labeled": f"{SHAPES}count=24&seed=1", "validation": f"{SHAPES}count=8&seed=2"},
    "stages": {"teach": {"kind": "pretrain", "network": "acting", "data": "labeled", "epochs": 1, "batch_size": 8}},
}


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the student, for this process and for those that it starts; runs are in the test's folder."""
    folder = tmp_path / "site"
    about = folder / "acting-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / "acting.py").write_text(NETWORK)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acting\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[ssld.students]\nacting = acting:Acting\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))
    monkeypatch.delenv(RANKS, raising=False)
    monkeypatch.delitem(sys.modules, "acting", raising=False)
    monkeypatch.chdir(tmp_path)


def write(act: str) -> str:
    stage = {**RECIPE["stages"]["teach"], "network": {"name": "acting", "act": act}}
    Path("shared.yaml").write_text(json.dumps({**RECIPE, "stages": {"teach": stage}}))
    return "shared.yaml"


def run(act: str, out: str = "run") -> str:
    """sha256 of the weights that two ranks have trained."""
    engine.run(write(act), out, nproc=2)
    return hashlib.sha256(Path(out, "teach", "latest", "student.safetensors").read_bytes()).hexdigest()


def test_what_a_plug_in_prints_disturbs_nobody_and_a_process_may_lead_two_runs(capfd):
    assert run("noise", "first") == run("nothing", "second")
    shown = capfd.readouterr()
    for words in ("a word of a plug-in", "and one past Python", "and one of a child"):
        assert words in shown.err
        assert words not in shown.out
    assert RANKS not in os.environ


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        ("fail", DataError, r"^rank 1: expected quiet, got noise$"),
        ("stumble", RankError, r"^expected rank 1 \(pid \d+\) to go on, it ended with exit code 1; what was saved"),
        ("leave", RankError, r"^expected rank 1 \(pid \d+\) to go on, it ended with exit code 5; what was saved"),
        ("die", RankError, r"^expected rank 1 \(pid \d+\) to go on, it ended with signal 9; what was saved"),
        pytest.param(
            "draw",
            RankError,
            r"^expected the same first weights on all 2 ranks.* draw them by paddle alone",
            marks=pytest.mark.xfail(strict=True, reason="rank 1 is blamed, which says no more than that it has ended"),
        ),
    ],
)
def test_what_ends_it_in_a_step_is_told_by_rank_0(act, kind, message):
    with pytest.raises(SsldError) as raised:
        run(act)
    assert type(raised.value) is kind
    assert re.search(message, str(raised.value))
    assert not [words for _, words in alive() if "ssld.follower" in words and str(Path.cwd()) in words]


def alive() -> list[tuple[int, str]]:
    """Process id and command line of all that live; one that has ended and is not waited for does not."""
    listing = subprocess.run(["ps", "-A", "-o", "pid=,stat=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 2) for line in listing.stdout.splitlines()]
    return [(int(row[0]), row[-1]) for row in rows if row[1][0] != "Z"]


def gone(pids: list[int], seconds: float = 10) -> bool:
    """Whether none of them lives after these seconds at most."""
    end = time.monotonic() + seconds
    while (there := {pid for pid, _ in alive()} & set(pids)) and time.monotonic() < end:
        time.sleep(0.1)
    return not there


@pytest.fixture
def recorded() -> Path:
    """A run that has begun."""
    directory = Path("run").absolute()
    directory.mkdir()
    RunDirectory(directory).begin(recipe.dump(recipe.read_recipe(write("nothing"))), Options(nproc=2))
    return directory


@pytest.fixture
def follower(recorded) -> Any:
    """One whose rank 0 is this test, which has let it begin a stage, where it waits for the others."""
    own, other = socket.socketpair()
    with own, shared_memory() as memory:
        given = (other.fileno(), memory.fileno())
        words = [sys.executable, "-m", "ssld.follower", str(recorded), "1", "2", *map(str, given)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with other:
            process = subprocess.Popen(words, text=True, pass_fds=given, **pipes)
        process.stdin.write('{"train": "teach"}\n')
        process.stdin.flush()
        # its word in the first meeting of the stage, which is not answered
        assert len(own.recv(WORD, socket.MSG_WAITALL)) == WORD
        yield process
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_it_ends_when_the_line_does_in_a_step_too(follower):
    follower.stdin.close()
    assert follower.wait(10) == 0


def test_a_signal_to_all_is_left_to_rank_0(follower):
    for number in (signal.SIGINT, signal.SIGTERM):
        follower.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        follower.wait(1)


LEAD = """
import sys, time
from pathlib import Path
from ssld.crew import Crew

with Crew(Path(sys.argv[1]), 3, lambda text: None) as crew:
    crew.train("teach")
    for line in crew.lines:
        line.recv(1)
    print(*[member.process.pid for member in crew.members], flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("end", [subprocess.Popen.kill, subprocess.Popen.terminate])
def test_it_does_not_outlive_rank_0(recorded, end: Callable[[subprocess.Popen], None]):
    """Two of them, which have begun a stage and wait for rank 0 there."""
    leader = subprocess.Popen([sys.executable, "-c", LEAD, str(recorded)], stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(word) for word in leader.stdout.readline().split()]
        assert len(pids) == 2
        assert not gone(pids, 0)
        end(leader)
        leader.wait(10)
        assert gone(pids)
    finally:
        leader.kill()
        leader.communicate()


def lead(directory: Path) -> None:
    with Crew(directory, 2, lambda text: None) as crew:
        crew.train("teach")
        crew.ranks.meeting.agree()


def test_what_keeps_it_from_beginning_is_told_by_rank_0(recorded):
    (recorded / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"^rank 1: .*run\.json: expected the options of the run"):
        lead(recorded)
