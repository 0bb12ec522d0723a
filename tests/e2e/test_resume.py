"""Whatever ends a run, it goes on to the same bytes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time

import pytest

STAGES = ("teach", "distill", "finetune", "fixres")


def seconds(reference, stage: str) -> float:
    """How long the stage took in the run that nothing interrupted."""
    state = json.loads((reference.directory / stage / "latest" / "state.json").read_text())
    return state["state"]["facts"]["seconds"]


def test_kill_at_three_random_points_of_the_run_costs_nothing_but_time(ssld, reference):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the kills: {seed}")  # noqa: T201  # shown by pytest where the test fails
    draws = random.Random(seed)
    run = ssld.folder / "runs" / "tiny"
    command = ("run", "tiny.yaml", "--trust-teacher")
    for stage in sorted(draws.sample(STAGES, 3), key=STAGES.index):
        process = ssld.start(*command)
        command = ("resume",)
        ssld.until_in(stage, run, process)
        time.sleep(draws.random() * seconds(reference, stage))
        ssld.stop(process)
        process.wait()
        assert process.returncode in (-signal.SIGKILL, 0)
        if process.returncode == 0:
            break  # the machine was faster than at the reference, so the last kill came too late
    ssld("resume")
    assert ssld.weights(run) == reference.weights


@pytest.mark.parametrize(
    ("number", "code", "stage"),
    [
        pytest.param(signal.SIGTERM, 143, "distill"),
        (signal.SIGINT, 130, "fixres"),
    ],
)
def test_a_signal_saves_the_state_and_the_printed_command_goes_on(ssld, finished, reference, number, code, stage):
    process = ssld.start("resume", "--stage", stage)
    ssld.until_in(stage, finished, process)
    ssld.stop(process, number)
    stopped = ssld.wait(process, code)
    assert f"Error: {stage}: stopped by {number.name} after step " in stopped.err
    states = {row["stage"].split()[1]: row["state"] for row in rows(ssld("status").out)}
    assert states[stage] == "stopped"
    assert states["teach"] == "finished"
    done = ssld.wait(ssld.start(program=("sh", "-c", stopped.continuation)))
    assert "going on after step" in done.err
    assert ssld.weights(finished) == reference.weights


def rows(table: str) -> list[dict[str, str]]:
    """The first three words of every row: number and name of the stage, and its state."""
    return [
        {"stage": line[: line.index("  ")], "state": line.split("  ", 1)[1].split()[0]}
        for line in table.splitlines()[1:]
    ]


def test_a_stage_by_number_starts_again_with_all_that_follows(ssld, finished, reference):
    before = {name: facts for name, facts in ssld.snapshot(finished).items() if name.startswith(("teach/", "distill/"))}
    done = ssld("resume", "--stage", "2")
    aside = f"are set aside in {finished.relative_to(ssld.folder)}/attempt.1"
    assert re.search(rf"starting again from stage 2 finetune: 2 results, \d+:\d\d of work, {aside}", done.err)
    after = ssld.snapshot(finished)
    assert {name: after[name] for name in before} == before
    assert ssld.weights(finished) == reference.weights
    old = ssld.weights(finished / "attempt.1")
    assert old == {name: reference.weights[name] for name in ("finetune", "fixres")}


def test_a_stage_that_is_not_there_names_those_that_are(ssld, finished):
    before = ssld.snapshot(finished)
    refused = ssld("resume", "--stage", "9", code=2)
    for words in ("got '9'", "0 teach", "1 distill", "2 finetune", "3 fixres"):
        assert words in refused.err
    assert ssld.snapshot(finished) == before


@pytest.mark.parametrize("words", [("resume",), ("status",), ("resume", "--out", "elsewhere")])
def test_without_a_run_there_is_nothing_to_go_on_with(ssld, words):
    refused = ssld(*words, code=2)
    assert "expected a run" in refused.err
    assert "got none; start one with ssld run RECIPE" in refused.err
    assert not (ssld.folder / "runs").exists()
    assert not (ssld.folder / "elsewhere").exists()


@pytest.mark.parametrize("newest", ["early", "late"])
def test_resume_takes_the_run_that_was_worked_on_last(ssld, finished, newest):
    for name in ("early", "late"):
        copy = shutil.copytree(finished, finished.with_name(name), symlinks=True)
        for file in copy.iterdir():
            os.utime(file, (time.time(), time.time() + (60 if name == newest else 0)))
    assert f"runs/{newest} is finished already" in ssld("resume").err


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_leads_to_the_same_weights(ssld, finished, reference):
    file = finished / "fixres" / "latest" / "student.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    done = ssld("resume")
    assert "passed over the checkpoint of step 6" in done.err
    assert "student.safetensors is damaged" in done.err
    assert ssld.weights(finished) == reference.weights
