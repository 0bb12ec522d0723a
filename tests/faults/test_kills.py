"""kill -9 at any moment: nothing that was saved is lost, and the run ends with the bytes of one that nothing broke."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

KILL = 9
STARTS = ("teach", "distill", "finetune", "fixres")
STEPS = {"teach": 9, "distill": 12, "finetune": 9, "fixres": 9}
Draw = Callable[[str, str], dict[str, Any]]


def moments(unbroken: Any, draws: random.Random) -> Draw:
    """Draws a moment for a kill in a run of the stages from one to another: any time, or any phase and a time in it."""
    trace, times = unbroken.attempt.trace, unbroken.attempt.times()
    begin = {stage: next(time for time, phase in trace if phase == stage) for stage in STARTS}
    begin["the end"] = unbroken.attempt.seconds
    after = dict(zip(STARTS, (*STARTS[1:], "the end"), strict=True))

    def draw(first: str, last: str) -> dict[str, Any]:
        if draws.random() < 0.5:
            return {"number": KILL, "after": draws.uniform(0, begin["teach"] + begin[after[last]] - begin[first])}
        stages = STARTS[STARTS.index(first) : STARTS.index(last) + 1]
        labels = ("labelling", "keeping") if "distill" in stages else ()
        phase = draws.choice(("start", "preflight", "between", *labels, *stages, "evaluating", "saving", "saving"))
        nth = draws.randint(1, max(1, min(9, len(times[phase]) // 2)))
        return {"number": KILL, "phase": phase, "nth": nth, "after": draws.uniform(0, 1.2 * max(times[phase]))}

    return draw


def campaign(tries: Any, unbroken: Any, kills: int, seed: int) -> Counter[str]:
    """Kill so many attempts, at most three of one run; where each was. Every run is finished and compared."""
    draws, met = random.Random(seed), Counter[str]()
    draw = moments(unbroken, draws)
    while met.total() < kills:
        first, last = sorted(draws.choices(range(len(STARTS)), k=2))
        broken = tries(STARTS[first], STARTS[last])
        for _ in range(3):
            attempt = broken.attempt([draw(STARTS[first], STARTS[last])])
            if attempt.code == 0:
                broken.expect_all()
                break
            assert attempt.code == -KILL, (attempt.said, broken.history)
            met[attempt.at(attempt.sent[0])] += 1
        else:
            broken.finish()
    return met


def chosen_seed() -> int:
    seed = int(os.environ.get("SSLD_SEED") or random.SystemRandom().randrange(2**32))
    print(f"seed of the kills: {seed}; to have them again: SSLD_SEED={seed}")  # noqa: T201  # shown where a test fails
    return seed


def test_sixty_kills_cost_nothing_but_time(tries, unbroken):
    met = campaign(tries, unbroken, 60, chosen_seed())
    assert met.total() >= 60


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
def test_kills_at_every_phase_cost_nothing_but_time(tries, unbroken):
    met = campaign(tries, unbroken, int(os.environ.get("SSLD_KILLS", "500")), chosen_seed())
    print(dict(met))  # noqa: T201  # shown by -rP
    wanted = {"start", "preflight", "between", "labelling", "keeping", *STARTS}
    wanted |= {f"{inner} {stage}" for inner in ("saving", "evaluating") for stage in STARTS}
    assert met.keys() >= wanted, (wanted - met.keys(), met)


# What an unbroken run keeps, which all others are held against --------------------------------------------------------


def test_an_unbroken_run_keeps_what_the_rule_allows(unbroken):
    """The last ones, the best one, and one at the end of every epoch where the recipe says so."""
    last = {"teach": 2, "distill": 2, "finetune": 1, "fixres": 2}
    epochs = {"distill": {6, 12}}
    events = [json.loads(line) for line in (unbroken.run / "metrics.jsonl").read_text().splitlines()]
    for stage, total in STEPS.items():
        seen = [
            (event["top1"], -event["step"])
            for event in events
            if event["event"] == "evaluation" and event["stage"] == stage
        ]
        best = -max(seen)[1]
        kept = {*range(total - last[stage] + 1, total + 1), best, *epochs.get(stage, ())}
        folder = unbroken.run / stage
        assert {path.name for path in folder.glob("step-*")} == {f"step-{step:08d}" for step in kept}
        assert os.readlink(folder / "latest") == f"step-{total:08d}"
        assert os.readlink(folder / "best") == f"step-{best:08d}"
        assert {path.name for path in folder.iterdir()} == {*(f"step-{step:08d}" for step in kept), "latest", "best"}


def test_a_second_unbroken_run_has_the_same_bytes(tries, unbroken):
    tries("teach").finish()
    assert len([name for name in unbroken.contents if name.endswith("student.safetensors")]) >= 8
    assert len([name for name in unbroken.contents if name.startswith("labels.store") and "safetensors" in name]) == 5


# Named moments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "nth"),
    [
        pytest.param("between", 1, id="after the last step, before the stage is saved as finished"),
        pytest.param("saving", 12, id="in the save as finished"),
        pytest.param("between", 2, id="after it"),
    ],
)
def test_a_kill_where_a_stage_hands_over(tries, phase, nth):
    broken = tries("finetune")
    nth = STEPS["finetune"] if phase == "saving" else nth
    attempt = broken.attempt([{"number": KILL, "phase": phase, "nth": nth, "after": 0}])
    assert attempt.code == -KILL
    assert broken.reached()["finetune"] in (8, 9)
    broken.finish()


def test_labels_that_are_there_are_not_made_again(tries):
    broken = tries("distill", "distill")
    # while the second shard of the pool is written; the first labels are those of the validation set
    broken.attempt([{"number": KILL, "phase": "keeping", "nth": 3, "after": 0.01}], change="write_slowly")
    (aside,) = broken.run.glob("labels.store/*/.tmp-*")
    done = {path: path.stat().st_mtime_ns for path in broken.run.glob("labels.store/*/*.safetensors")}
    assert len(done) == 2
    # an hour later what was left is nobody's
    os.utime(aside, (0, 0))
    broken.finish()
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert not aside.exists()


def test_a_terminal_that_is_closed_saves_first(tries):
    broken = tries("finetune")
    assert broken.attempt([{"number": 1, "phase": "finetune", "nth": 4, "after": 0}]).code == 129
    broken.finish()


# Tests of the test ----------------------------------------------------------------------------------------------------


def broken_by(tries: Any, change: str) -> list[str]:
    """What differs after a kill in the middle of distillation and a finish with that defect."""
    broken = tries("distill")
    broken.attempt([{"number": KILL, "phase": "saving", "nth": 4, "after": 0.0}], change=change)
    assert broken.reached()["distill"] in (3, 4)
    attempt = broken.forks("run", "tiny.yaml", "--trust-teacher", change=change)
    assert attempt.code == 0, attempt.said
    return broken.differences()


@pytest.mark.parametrize("change", ["forget_statistics", "forget_velocity", "skip_a_step"])
def test_of_the_test_a_resume_that_forgets_something_is_found(tries, change):
    wrong = broken_by(tries, change)
    assert {f"{stage}/step-{STEPS[stage]:08d}/student.safetensors" for stage in ("distill", "finetune")} <= set(wrong)


def test_of_the_test_litter_is_found(tries):
    broken = tries("distill")
    # a kill in the middle of writing
    broken.attempt([{"number": KILL, "phase": "saving", "nth": 2, "after": 0.03}], change="write_slowly")
    assert list(broken.run.glob("distill/.tmp-*"))
    attempt = broken.forks("run", "tiny.yaml", "--trust-teacher", change="leave_litter")
    assert attempt.code == 0, attempt.said
    assert any("/.tmp-" in name for name in broken.differences())


def test_of_the_test_a_checkpoint_too_many_is_found(tries):
    # where the kill comes late, the look at what was saved finds it before
    with pytest.raises(AssertionError):
        assert "distill/step-00000005" not in broken_by(tries, "keep_all")


def test_of_the_test_a_save_that_is_lost_is_found(tries, monkeypatch: pytest.MonkeyPatch):
    broken = tries("distill")
    attempt = broken.attempt([{"number": KILL, "phase": "saving", "nth": 4, "after": 0.0}])
    known = broken.reached()
    monkeypatch.setattr(broken, "reached", lambda: {**known, "distill": known["distill"] - 2})
    with pytest.raises(AssertionError):
        broken.expect_what_was_saved({**known, "distill": 0}, attempt)


# Two ranks, by the installed command ----------------------------------------------------------------------------------


class Command:
    """`ssld` with two ranks, in a folder with the tiny recipe; every command leads a session of its own."""

    def __init__(self, folder: Path, tiny: Any) -> None:
        self.folder = folder
        paths = filter(None, [str(tiny.write(folder)), os.environ.get("PYTHONPATH")])
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        self.run = folder / "runs" / "tiny"
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        words = (sys.executable, "-P", "-m", "ssld", "run", "tiny.yaml", "--trust-teacher", "--nproc", "2")
        with (self.folder / "said").open("wb") as said:
            process = subprocess.Popen(
                words, cwd=self.folder, env=self.environment, stderr=said, stdout=said, start_new_session=True
            )
        self.started.append(process)
        return process

    def clean_up(self) -> None:
        for process in self.started:
            for pid in self.members(process):
                os.kill(pid, KILL)
            process.wait()

    def members(self, process: subprocess.Popen[bytes], words: str = "") -> list[int]:
        """Who is there of a started command, and has these words in its command line."""
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):
                state, _, _, session = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[:4]
                line = Path("/proc", entry, "cmdline").read_bytes()
                if int(session) == process.pid and state != "Z" and words.encode() in line:
                    found.append(int(entry))
        return found

    def expect_none(self, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + 30
        while (alive := self.members(process)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not alive

    def finish(self) -> str:
        process = self.start()
        assert process.wait() == 0, (self.folder / "said").read_text()
        self.expect_none(process)
        return (self.folder / "said").read_text()


@pytest.fixture(scope="module")
def pair(tiny, contents_of, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run by two ranks holds that nothing interrupted."""
    command = Command(tmp_path_factory.mktemp("pair"), tiny)
    command.finish()
    return contents_of(command.run)


@pytest.fixture
def command(tiny, tmp_path) -> Iterator[Command]:
    made = Command(tmp_path, tiny)
    yield made
    made.clean_up()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_kills_of_one_of_two_ranks_cost_nothing_but_time(command, pair, contents_of):
    draws = random.Random(chosen_seed())
    met: Counter[str] = Counter()
    while met.total() < 20:
        shutil.rmtree(command.run, ignore_errors=True)
        for _ in range(3):
            process = command.start()
            target = draws.choice(("ssld.follower", "tiny.yaml"))
            while process.poll() is None and not command.members(process, "ssld.follower"):
                time.sleep(0.01)
            time.sleep(draws.uniform(0, 4))
            for pid in command.members(process, target):
                os.kill(pid, KILL)
                met[target] += 1
            code = process.wait()
            assert code in ((0, 71) if target == "ssld.follower" else (0, -KILL)), (command.folder / "said").read_text()
            command.expect_none(process)
            if code == 0:
                break
        command.finish()
        got = contents_of(command.run)
        wrong = [name for name in sorted(pair.keys() | got.keys()) if pair.get(name) != got.get(name)]
        assert not [name for name in wrong if not name.startswith("labels.store/") or "/.tmp-" not in name]
    assert len(met) == 2


@pytest.mark.soak
def test_a_rank_that_stands_still_after_the_first_was_killed_holds_nobody_up(command, pair, contents_of):
    process = command.start()
    while not (command.run / "distill" / "step-00000002").is_dir():
        assert process.poll() is None, (command.folder / "said").read_text()
        time.sleep(0.01)
    (orphan,) = command.members(process, "ssld.follower")
    os.kill(orphan, signal.SIGSTOP)
    process.kill()
    process.wait()
    assert command.members(process) == [orphan]
    assert "going on after step" in command.finish()
    assert contents_of(command.run) == pair
    os.kill(orphan, signal.SIGCONT)
    command.expect_none(process)
    assert contents_of(command.run) == pair
