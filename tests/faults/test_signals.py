"""Signals and short means: the state is saved within a step or a batch, whole shards stay, and the run goes on."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STAGES = ("teach", "distill", "finetune", "fixres")
STEPS = {"teach": 9, "distill": 12, "finetune": 9, "fixres": 9}
ENDS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


def said(attempt: Any) -> str:
    """The one message of a command."""
    (line,) = re.findall(r"^Error: (.*)$", attempt.said, re.MULTILINE)
    return line


def expect_saved(broken: Any, unbroken: Any, attempt: Any, name: str) -> None:
    """The message is right about where the run stands, and it stopped at the first occasion."""
    message = said(attempt)
    (place,) = attempt.sent
    since = [event for _, event in attempt.trace[place + 1 :]]
    # of the step that was begun, and of one that could begin before the signal was seen
    assert since.count("step") <= 1, (message, since)
    assert since.count("saving") <= 2, (message, since)
    if stopped := re.fullmatch(rf"(\w+): stopped by {name} after step (\d+) of (\d+); the state is saved", message):
        stage, step, total = stopped[1], int(stopped[2]), int(stopped[3])
        assert (broken.reached()[stage], total) == (step, STEPS[stage])
    elif finished := re.fullmatch(rf"stopped by {name} after (\w+), which is finished", message):
        assert broken.reached()[finished[1]] == STEPS[finished[1]]
    elif re.fullmatch(r"labelling: stopped after \d+ of \d+ views; whole shards are kept", message):
        expect_whole_shards(broken, unbroken)
    else:
        assert message == f"stopped by {name} before anything was spent"
    assert "continue: ssld resume --out runs/tiny" in attempt.said


def expect_whole_shards(broken: Any, unbroken: Any) -> None:
    """The labels that are there are those of the unbroken run, and none was left half written."""
    files = [path for path in broken.run.rglob("labels.store/*/*") if path.name != "labels.json"]
    for path in files:
        assert path.read_bytes() == (unbroken.run / path.relative_to(broken.run)).read_bytes()


def is_done(broken: Any, stage: str) -> bool:
    """Whether the stage is finished; after its last step it may still have to be measured."""
    found = broken.newest(stage)
    return found is not None and found.state["finished"]


def campaign(tries: Any, unbroken: Any, count: int) -> None:
    """Stop so many attempts, by each signal in turn, at any time from the first trial of everything on."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the signals: {seed}")  # noqa: T201  # shown where a test fails
    draws, trace = random.Random(seed), unbroken.attempt.trace
    begin = {phase: time for time, phase in reversed(trace)}
    begin["the end"] = unbroken.attempt.seconds
    taken: list[float] = []
    while len(taken) < count:
        first, last = sorted(draws.choices(range(len(STAGES)), k=2))
        broken = tries(STAGES[first], STAGES[last])
        number = list(ENDS)[len(taken) % len(ENDS)]
        whole = begin["teach"] - begin["preflight"] + begin[[*STAGES, "the end"][last + 1]] - begin[STAGES[first]]
        moment = {"phase": "preflight", "nth": 1, "after": draws.uniform(0, whole)}
        attempt = broken.attempt([{"number": number, **moment}])
        if is_done(broken, broken.until):
            # it came after the last evaluation, and all is done
            assert attempt.code in (0, ENDS[number], -number)
            broken.expect_all()
            continue
        assert attempt.code == ENDS[number], (attempt.said, broken.history)
        expect_saved(broken, unbroken, attempt, number.name)
        taken.append(attempt.seconds - attempt.trace[attempt.sent[0]][0])
        broken.finish()
    times = unbroken.attempt.times()
    longest = max(times["distill"]) + max(times["saving"]) + max(times["evaluating"]) + max(times["preflight"])
    assert statistics.median(taken) < 3 * longest, (taken, longest)
    print(f"{count} signals, seconds to the end: median {statistics.median(taken):.3f}, most {max(taken):.3f}")  # noqa: T201


def test_ten_signals_save_the_state_within_a_step(tries, unbroken):
    campaign(tries, unbroken, 10)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_signals_save_the_state_within_a_step(tries, unbroken):
    campaign(tries, unbroken, 100)


# In a long evaluation, and a long test set ----------------------------------------------------------------------------


def measured(run: Path, event: str = "evaluation") -> list[dict[str, Any]]:
    """What a run has measured, in order, without the time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{**line, "time": 0} for line in lines if line["event"] == event]


def expect_at_most_one_batch(attempt: Any) -> None:
    """Of the images that were left when the signal came."""
    (place,) = attempt.sent
    assert [event for _, event in attempt.trace[place:]].count("answering") <= 1


@pytest.mark.parametrize(("nth", "step", "number"), [(1, 6, signal.SIGTERM), (2, 9, signal.SIGHUP)])
def test_a_signal_ends_an_evaluation_after_a_batch_and_it_is_done_later(tries, unbroken, nth, step, number):
    """In the middle of the stage, and at its end; what is measured, chosen and kept is as if nothing had come."""
    broken = tries("fixres")
    known = len(measured(broken.run))
    # the validation set has 12 images
    moment = {"phase": "answering", "nth": 12 * (nth - 1) + 3, "after": 0.01}
    attempt = broken.attempt([{"number": number, **moment}], change="answer_slowly")
    assert attempt.code == ENDS[number], attempt.said
    assert said(attempt) == f"fixres: stopped by {number.name} after step {step} of 9; the state is saved"
    expect_at_most_one_batch(attempt)
    assert broken.reached()["fixres"] == step
    assert len(measured(broken.run)) == known + nth - 1
    broken.finish()
    assert measured(broken.run)[known:] == [row for row in measured(unbroken.run) if row["stage"] == "fixres"]


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_signal_ends_the_scoring_of_the_test_set_after_a_batch_and_it_is_scored_later(tries, unbroken, number):
    broken = tries()
    shutil.copytree(unbroken.run, broken.run, symlinks=True)
    words = ("-o", "data.test=builtin:shapes?count=12&size=12&classes=4&seed=4")
    moment = {"phase": "answering", "nth": 3, "after": 0.01}
    attempt = broken.attempt([{"number": number, **moment}], *words, change="answer_slowly")
    assert attempt.code == ENDS[number], attempt.said
    assert said(attempt) == f"stopped by {number.name} before the test set was measured"
    assert "continue: ssld resume --out runs/tiny" in attempt.said
    expect_at_most_one_batch(attempt)
    assert not (broken.run / "test.json").exists()
    again = broken.attempt([], *words)
    assert again.code == 0, again.said
    assert [event for _, event in again.trace].count("step") == 0
    [row] = measured(broken.run, "test")
    assert json.loads((broken.run / "test.json").read_text())["metrics"] == {
        name: row[name] for name in ("top1", "top5")
    }


# From the beginning ---------------------------------------------------------------------------------------------------

SENDER = """\
import os, signal, sys

class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["WHERE"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(os.environ["NUMBER"]))

if "WHERE" in os.environ:
    sys.meta_path.insert(0, Sender())
"""


@pytest.fixture
def command(tmp_path: Path, tiny: Any) -> Callable[..., subprocess.Popen[str]]:
    """command(*words, **environment): start the installed command where the tiny recipe lies."""
    site = tiny.write(tmp_path)
    (site / "sitecustomize.py").write_text(SENDER)
    paths = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))

    def start(*words: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [Path(sys.executable).with_name("ssld"), *words],
            cwd=tmp_path,
            env={
                **os.environ,
                "HOME": str(tmp_path),
                "XDG_CACHE_HOME": str(tmp_path),
                "PYTHONPATH": paths,
                **environment,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )

    return start


def expect_one_line(shown: str, *, goes_on: bool) -> str:
    """The message, beside which there is nothing but how to go on, and no trace of whatever was interrupted."""
    assert "Traceback" not in shown
    assert "FatalError" not in shown
    [message] = re.findall(r"^Error: (.*)$", shown, re.MULTILINE)
    assert ("\ncontinue: ssld resume --out runs/tiny\n" in shown) == goes_on, shown
    return message


@pytest.mark.parametrize(
    ("number", "where"),
    [
        # paddle has taken it there
        (signal.SIGTERM, "paddle.nn"),
        (signal.SIGINT, "paddle.base"),
        pytest.param(signal.SIGHUP, "paddle", marks=pytest.mark.soak),
    ],
)
def test_a_signal_while_paddle_loads_ends_the_run_with_one_line(command, number, where):
    with command("run", "tiny.yaml", WHERE=where, NUMBER=str(int(number))) as process:
        _, shown = process.communicate(timeout=250)
    assert process.returncode == ENDS[number], shown
    assert expect_one_line(shown, goes_on=True) == f"stopped by {number.name} before anything was spent"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_the_engine_loads_ends_the_command_with_one_line(command, number):
    """What takes half a second before anything is read, and cannot be imported by half either."""
    with command("run", "tiny.yaml", WHERE="numpy.random", NUMBER=str(int(number))) as process:
        _, shown = process.communicate(timeout=250)
    assert process.returncode == ENDS[number], shown
    expect_one_line(shown, goes_on=False)


def stop_after(command: Any, seconds: float, number: int) -> tuple[int, str]:
    # long enough to be at work at any of the moments
    with command("run", "tiny.yaml", "-o", "stages.teach.epochs=3000") as process:
        time.sleep(seconds)
        process.send_signal(number)
        _, shown = process.communicate(timeout=250)
    return process.returncode, shown


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", ENDS)
def test_a_signal_at_any_moment_from_the_start_ends_the_run_with_one_line(command, tmp_path, number):
    """Twenty moments from 0.1 to 2 s after the start, and some later; the earliest are Python's own, before ours."""
    for seconds in [0.1 * tenth for tenth in range(1, 21)] + [2.5, 3, 4]:
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        code, shown = stop_after(command, seconds, number)
        recorded = (tmp_path / "runs" / "tiny" / "recipe.yaml").exists()
        if not recorded and code in (-number, 1) and "in invoke" not in shown:
            continue
        assert code == ENDS[number], (seconds, shown)
        expect_one_line(shown, goes_on=recorded)


# Two signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("second", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_second_signal_in_a_save_ends_it_at_once(tries, second, code):
    broken = tries("distill", "distill")
    signals = [
        {"number": signal.SIGINT, "phase": "distill", "nth": 4, "after": 0},
        {"number": second, "phase": "saving", "nth": 1, "after": 0.25},
    ]
    attempt = broken.attempt(signals, change="write_slowly")
    assert attempt.code == code
    assert list(broken.run.glob("distill/.tmp-*")), "the save was cut off"
    if second == signal.SIGINT:
        assert said(attempt) == "interrupted; nothing that was saved is lost"
    broken.finish()


def test_a_signal_while_labels_are_made_keeps_whole_shards(tries, unbroken):
    broken = tries("distill", "distill")
    moment = {"phase": "keeping", "nth": 2, "after": 0.01}
    attempt = broken.attempt([{"number": signal.SIGTERM, **moment}], change="write_slowly")
    assert attempt.code == 143
    assert re.fullmatch(r"labelling: stopped after \d+ of 9\d views; whole shards are kept", said(attempt))
    expect_whole_shards(broken, unbroken)
    # that of the validation set, and the first of the pool
    assert len(list(broken.run.glob("labels.store/*/*.safetensors"))) == 2
    broken.finish()


# Processes that stand still, or are gone ------------------------------------------------------------------------------


def test_a_suspended_run_has_not_stalled(tries):
    broken = tries("distill", "distill")
    pause = [
        {"number": signal.SIGSTOP, "phase": "distill", "nth": 4, "after": 0},
        {"number": signal.SIGCONT, "after": 4},
    ]
    attempt = broken.attempt(pause, "--stall-timeout", "1", change="render_in_processes")
    assert attempt.code == 0, attempt.said
    assert attempt.seconds > 4
    broken.expect_all()


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (
            signal.SIGKILL,
            71,
            r"expected the process that decodes \(pid \d+\) to go on, it ended with signal 9 at one of ",
        ),
        (signal.SIGSTOP, 69, r"expected the images from .* on to be decoded within 2 s, got nothing"),
    ],
)
def test_a_process_that_decodes_and_does_not_answer_ends_the_run(forks, tries, number, code, message):
    broken = tries("distill")
    lost = {"number": number, "phase": "decoding", "nth": 5, "after": 0, "to": "ssld.data.rendering"}
    # more than the time that such a process takes to come up
    words = ("-o", "stages.teach.epochs=3000", "-o", "stages.teach.save_steps=50", "--rerun", "--stall-timeout", "2")
    attempt = forks("run", "tiny.yaml", *words, signals=[lost], change="render_in_processes")
    assert attempt.code == code, attempt.said
    assert re.match(message, said(attempt))
    assert not attempt.left
    assert attempt.seconds - attempt.trace[attempt.sent[0]][0] < 2 + 30
    assert "continue: ssld resume --out runs/tiny" in attempt.said
    assert broken.newest("teach")


# Other means than before ----------------------------------------------------------------------------------------------


def test_another_number_of_threads_is_a_warning(tries):
    broken = tries("finetune", "finetune")
    broken.attempt([{"number": signal.SIGKILL, "phase": "finetune", "nth": 4, "after": 0}])
    attempt = broken.attempt([], environment={"MKL_NUM_THREADS": "2"})
    assert attempt.code == 0
    warning = 'the same weights as in an unbroken run are not promised, since MKL_NUM_THREADS: "1" → "2"'
    assert f"warning: {warning}" in attempt.said
    state = json.loads((broken.run / "finetune" / "latest" / "state.json").read_text())
    assert state["state"]["finished"]


def test_memory_that_is_short_is_said_and_costs_no_checkpoint(tries):
    broken = tries("finetune", "finetune")
    attempt = broken.attempt([], change="short_memory")
    assert attempt.code == 70, attempt.said
    assert said(attempt).startswith(
        "expected memory for what the recipe asks for, got none (Unable to allocate 1.00 GiB "
    )
    assert "continue: ssld resume --out runs/tiny" in attempt.said
    assert broken.reached()["finetune"] == 2
    broken.finish()
