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
from safetensors.numpy import load_file

from ssld import engine, recipe, threads
from ssld.crew import Crew
from ssld.environment import RANKS
from ssld.errors import ChangedError, CheckpointError, DataError, Interrupted, RankError, SsldError
from ssld.graph import make_plan
from ssld.preview import probe
from ssld.rundir import Options, RunDirectory
from ssld.train.ranks import WORD, shared_memory

# A student that misbehaves in the second step of rank 1, in the way that the recipe names; one with two norms, which
# has the run stopped in its third step where there is a file `stop`; a teacher; and a stage kind that does not use the
# loop, of which rank 0 waits for rank 1 to end the same stage where the recipe says so.
PLUGINS = """\
import os, signal, sys, time
from pathlib import Path
from typing import Literal
import numpy as np
import paddle
from paddle import nn
from ssld.contracts import Outcome, StageKind, State, TeacherSpec
from ssld.errors import DataError, Interrupted
from ssld.settings import Plugin, TrainingSettings

def noise():
    print("a word of a plug-in")
    sys.stdout.flush()
    os.write(1, b"and one past Python\\n")
    os.system("echo and one of a child")

def fail():
    raise DataError("expected quiet, got noise")

def stumble():
    raise ValueError("a defect of a plug-in")

def want():
    np.ones(2**50, np.float32)

ACTS = {
    "want": want,
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

class Normed(nn.Layer):
    head, features = "fc", "flatten"

    def __init__(self, num_classes: int):
        super().__init__()
        self.steps, self.first, self.conv, self.last = 0, nn.BatchNorm2D(3), nn.Conv2D(3, 4, 3), nn.BatchNorm2D(4)
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(4, num_classes)

    def forward(self, x):
        self.steps += self.training
        if self.steps == 3 and "follower" not in sys.argv[0] and os.path.exists("stop"):
            os.remove("stop")
            os.kill(os.getpid(), signal.SIGTERM)
        return self.fc(self.flatten(self.pool(self.last(self.conv(self.first(x))))))

class Bright:
    spec = TeacherSpec(8, "bright", mean=None, std=None)

    def predict(self, images):
        return (images.reshape(len(images), 4, 48).mean(axis=2) / 32).astype(np.float32)

class Lone(TrainingSettings):
    kind: Literal["lone"]
    student: Plugin
    waits: bool = False

def walk(task):
    for step in range(task.settings.total_steps(len(task.data))):
        if task.stop():
            raise Interrupted("stopped", 143)
        time.sleep(0.02)
    Path(f"{task.name}.{task.ranks.number}").touch()
    while task.settings.waits and not Path(f"{task.name}.1").exists():
        time.sleep(0.02)
    facts = {"seconds": 0.1, "metrics": {}, "best": {"step": 0, "top1": -1.0}, "kept": []}
    return Outcome(State(step + 1, {"number": np.array([task.ranks.number])}, {}, facts), {"top1": 0.5, "top5": 1.0})

lone = StageKind(Lone, walk)
"""
ENTRY_POINTS = """\
[ssld.students]
acting = acting:Acting
normed = acting:Normed
[ssld.teachers]
bright = acting:Bright
[ssld.stages]
lone = acting:lone
"""
SHAPES = "builtin:shapes?size=16&classes=4&"
RECIPE = {
    "name": "shared",
    "images": {"resolution": 16, "eval": ["CropImage", "NormalizeImage"]},
    "data": {"labeled": f"{SHAPES}count=24&seed=1", "validation": f"{SHAPES}count=8&seed=2"},
    "stages": {"teach": {"kind": "pretrain", "network": "acting", "data": "labeled", "epochs": 1, "batch_size": 8}},
}
ONLINE = {
    "kind": "distill",
    "teacher": {"plugin": "bright"},
    "student": "normed",
    "data": "labeled",
    "epochs": 2,
    "batch_size": 9,
    "labels": "online",
}


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the plug-ins, for this process and for those that it starts; runs are in the test's folder."""
    folder = tmp_path / "site"
    about = folder / "acting-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / "acting.py").write_text(PLUGINS)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acting\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))
    monkeypatch.delenv(RANKS, raising=False)
    monkeypatch.delitem(sys.modules, "acting", raising=False)
    monkeypatch.chdir(tmp_path)


def write(act: str) -> str:
    return write_stages(teach={**RECIPE["stages"]["teach"], "network": {"name": "acting", "act": act}})


def write_stages(**stages: dict[str, Any]) -> str:
    Path("shared.yaml").write_text(json.dumps({**RECIPE, "stages": stages}))
    return "shared.yaml"


def run(act: str, out: str = "run") -> str:
    """sha256 of the weights that two ranks have trained."""
    engine.run(write(act), out, nproc=2)
    return sha256(out, "teach")


def student(out: str, stage: str) -> Path:
    return Path(out, stage, "latest", "student.safetensors")


def sha256(out: str, stage: str) -> str:
    return hashlib.sha256(student(out, stage).read_bytes()).hexdigest()


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
        (
            "want",
            RankError,
            r"^rank 1: expected memory for what .* none \(Unable to allocate 4\.00 PiB .*; lower batch_size",
        ),
        ("stumble", RankError, r"^expected rank 1 \(pid \d+\) to go on, it ended with exit code 1; what was saved"),
        ("leave", RankError, r"^expected rank 1 \(pid \d+\) to go on, it ended with exit code 5; what was saved"),
        ("die", RankError, r"^expected rank 1 \(pid \d+\) to go on, it ended with signal 9; what was saved"),
        ("draw", RankError, r"^expected the same first weights on all 2 ranks.* draw them by paddle alone"),
    ],
)
def test_what_ends_it_in_a_step_is_told_by_rank_0(act, kind, message):
    with pytest.raises(SsldError) as raised:
        run(act)
    assert type(raised.value) is kind
    assert re.search(message, str(raised.value))
    assert not [words for _, words in alive() if "ssld.follower" in words and str(Path.cwd()) in words]


def test_what_is_printed_before_it_listens_is_noted(tmp_path):
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys\nif 'ssld.follower' in sys.orig_argv: print('welcome to this site')\n"
    )
    run("nothing")
    assert "welcome to this site (rank 1)\n" in Path("run", "train.log").read_text()


def test_what_lies_in_the_current_directory_is_not_imported():
    Path("rich.py").write_text("raise ImportError('no library')\n")
    run("nothing")


def test_it_is_no_rank_of_another_launcher(monkeypatch):
    plain = run("nothing", "plain")
    for name, value in {"TRAINERS_NUM": "4", "TRAINER_ID": "3", "CURRENT_ENDPOINT": "127.0.0.1:9"}.items():
        monkeypatch.setenv(f"PADDLE_{name}", value)
    assert run("nothing", "launched") == plain


tracks = pytest.mark.filterwarnings("ignore:When training, we now always track")


@tracks
def test_an_online_teacher_is_asked_by_all_ranks_and_a_stopped_run_goes_on_to_the_same_bits():
    file = write_stages(distill=ONLINE)
    engine.run(file, "whole", nproc=2, trust_teacher=True)
    Path("stop").touch()
    with pytest.raises(Interrupted, match=r"^distill: stopped by SIGTERM after step 3 of \d"):
        engine.run(file, "broken", nproc=2, trust_teacher=True)
    engine.resume("broken")
    assert sha256("broken", "distill") == sha256("whole", "distill")


@tracks
def test_of_two_norms_fixres_adapts_the_last_on_all_ranks_and_the_first_keeps_its_bits():
    engine.run(
        write_stages(
            teach={**RECIPE["stages"]["teach"], "network": "normed"},
            fixres={
                "kind": "fixres",
                "from": "teach",
                "data": "labeled",
                "epochs": 1,
                "batch_size": 9,
                "adapt_bn": True,
            },
        ),
        "run",
        nproc=2,
    )
    before, after = (load_file(student("run", stage)) for stage in ("teach", "fixres"))
    changed = {name for name, array in before.items() if array.tobytes() != after[name].tobytes()}
    assert changed == {"last._mean", "last._variance", "fc.weight", "fc.bias"}


LONE = {"kind": "lone", "student": "acting", "data": "labeled", "epochs": 1, "batch_size": 8}


def test_of_a_kind_that_does_not_use_the_loop_the_outcome_of_rank_0_counts():
    engine.run(write_stages(one={**LONE, "waits": True}, two={**LONE, "epochs": 2, "waits": True}), "run", nproc=2)
    for stage in ("one", "two"):
        assert load_file(student("run", stage))["number"].tolist() == [0]


def test_to_try_a_kind_that_never_asks_whether_to_stop_on_other_ranks_ends_in_time(monkeypatch):
    """Such a rank walks on; what is known of one rank is told."""
    monkeypatch.setattr(probe, "PARTING", 0.5)
    monkeypatch.setattr(probe, "LONGEST", 0.5)
    monkeypatch.setattr(threads, "cores", lambda: 2)
    # the time in which a network answers is of no interest
    monkeypatch.setattr(probe.Probe, "_evaluation", lambda *_: (1000.0, 0.0))
    lone = {**LONE, "batch_size": 16}
    began = time.monotonic()
    costs = probe.measure(write_stages(one=lone, two={**lone, "epochs": 2}))
    assert time.monotonic() - began < 30
    assert [cost.speeds.ranks for cost in costs] == [1, 1]
    assert all(cost.speeds.step > 0 for cost in costs)
    assert not [words for _, words in alive() if "ssld.follower" in words and "/ssld-" in words]


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
def fingerprint() -> str:
    """What rank 0 has found in the recorded recipe, and so is to be found by the others."""
    return make_plan(recipe.read_recipe(write("nothing"))).node("teach").fingerprint


@pytest.fixture
def follower(recorded, fingerprint) -> Any:
    """One whose rank 0 is this test, which has let it begin a stage, where it waits for the others."""
    own, other = socket.socketpair()
    with own, shared_memory() as memory:
        given = (other.fileno(), memory.fileno())
        words = [sys.executable, "-P", "-m", "ssld.follower", str(recorded), "1", "2", *map(str, given)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with other:
            process = subprocess.Popen(words, text=True, pass_fds=given, **pipes)
        process.stdin.write(json.dumps({"train": "teach", "fingerprint": fingerprint, "step": 0}) + "\n")
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


def test_a_signal_to_all_is_left_to_rank_0(recorded, fingerprint):
    """Before it has loaded anything, and in a stage."""
    with Crew(recorded, 2, lambda text: None) as crew:
        [follower], [connection] = crew.followers, crew.sockets
        interrupt(follower.process)
        crew.tell(train="teach", fingerprint=fingerprint, step=0)
        assert len(connection.recv(WORD, socket.MSG_WAITALL)) == WORD
        interrupt(follower.process)
        with pytest.raises(subprocess.TimeoutExpired):
            follower.process.wait(0.5)


def interrupt(process: subprocess.Popen) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)


LEAD = """
import sys, time
from pathlib import Path
from ssld.crew import Crew

with Crew(Path(sys.argv[1]), 3, lambda text: None) as crew:
    crew.tell(train="teach", fingerprint=sys.argv[2], step=0)
    for connection in crew.sockets:
        connection.recv(1)
    print(*[follower.process.pid for follower in crew.followers], flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("end", [subprocess.Popen.kill, subprocess.Popen.terminate])
def test_it_does_not_outlive_rank_0(recorded, fingerprint, end: Callable[[subprocess.Popen], None]):
    """Two of them, which have begun a stage and wait for rank 0 there."""
    words = [sys.executable, "-c", LEAD, str(recorded), fingerprint]
    leader = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
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


def lead(directory: Path, fingerprint: str, step: int = 0) -> None:
    """Let another rank train, and meet it."""
    with Crew(directory, 2, lambda text: None) as crew:
        crew.tell(train="teach", fingerprint=fingerprint, step=step)
        crew.ranks.meeting.agree()


def test_what_keeps_it_from_beginning_is_told_by_rank_0(recorded, fingerprint):
    (recorded / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"^rank 1: .*run\.json: expected the options of the run"):
        lead(recorded, fingerprint)


@pytest.mark.parametrize(("other", "step"), [(True, 0), (False, 3)])
def test_one_that_finds_something_else_than_rank_0_does_not_train_it(recorded, fingerprint, other, step):
    """The data may have changed since rank 0 has read them, or a checkpoint."""
    with pytest.raises(ChangedError, match=rf"^rank 1: teach: expected what rank 0 has found, step {step}, got none"):
        lead(recorded, "0" * 64 if other else fingerprint, step)
