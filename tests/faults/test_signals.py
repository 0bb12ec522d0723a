"""Signals and short means: the state is saved within a step, whole shards of labels stay, and the run goes on."""

from __future__ import annotations

import json
import random
import re
import signal
import statistics
from typing import Any

import pytest

STAGES = ("teach", "distill", "finetune", "fixres")
STEPS = {"teach": 9, "distill": 12, "finetune": 9, "fixres": 9}
ENDS = {signal.SIGTERM: 143, signal.SIGINT: 130}


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


def campaign(tries: Any, unbroken: Any, count: int) -> None:
    """Stop so many attempts, by both signals in turn, at any time from the first trial of everything on."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the signals: {seed}")  # noqa: T201  # shown where a test fails
    draws, trace = random.Random(seed), unbroken.attempt.trace
    begin = {phase: time for time, phase in reversed(trace)}
    begin["the end"] = unbroken.attempt.seconds
    taken: list[float] = []
    while len(taken) < count:
        first, last = sorted(draws.choices(range(len(STAGES)), k=2))
        broken = tries(STAGES[first], STAGES[last])
        number = (signal.SIGTERM, signal.SIGINT)[len(taken) % 2]
        whole = begin["teach"] - begin["preflight"] + begin[[*STAGES, "the end"][last + 1]] - begin[STAGES[first]]
        moment = {"phase": "preflight", "nth": 1, "after": draws.uniform(0, whole)}
        attempt = broken.attempt([{"number": number, **moment}])
        if broken.reached()[broken.until] == STEPS[broken.until]:
            # it came after the last step, and all is done
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


# Two signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("second", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_second_signal_in_a_save_ends_it_at_once(tries, second, code):
    broken = tries("distill", "distill")
    signals = [
        {"number": signal.SIGINT, "phase": "distill", "nth": 4, "after": 0},
        {"number": second, "phase": "saving", "nth": 1, "after": 0.02},
    ]
    attempt = broken.attempt(signals, change="write_slowly")
    assert attempt.code == code
    assert list(broken.run.glob("distill/.tmp-*")), "the save was cut off"
    if second == signal.SIGINT:
        assert said(attempt) == "interrupted; nothing that was committed is lost"
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
