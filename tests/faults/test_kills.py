"""kill -9 at any moment: nothing that was saved is lost, and the run ends with the bytes of one that nothing broke."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable
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


def test_a_hang_up_is_a_kill(tries):
    broken = tries("finetune")
    assert broken.attempt([{"number": 1, "phase": "finetune", "nth": 4, "after": 0}]).code == -1
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
    assert "distill/step-00000005" in broken_by(tries, "keep_all")


def test_of_the_test_a_save_that_is_lost_is_found(tries, monkeypatch: pytest.MonkeyPatch):
    broken = tries("distill")
    attempt = broken.attempt([{"number": KILL, "phase": "saving", "nth": 4, "after": 0.0}])
    known = broken.reached()
    monkeypatch.setattr(broken, "reached", lambda: {**known, "distill": known["distill"] - 2})
    with pytest.raises(AssertionError):
        broken.expect_what_was_saved({**known, "distill": 0}, attempt)
