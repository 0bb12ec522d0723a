"""How many ranks a run has: recorded, kept, changed, and refused before anything is spent."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from ssld import checkpoint, crew, engine, plugins, threads
from ssld.contracts import Outcome, State, Task
from ssld.environment import RANKS
from ssld.errors import CheckpointError, Interrupted, RankError, RecipeError

SHAPES = "builtin:shapes?size=16&classes=4&"
STAGE = {"kind": "pretrain", "network": "MobileNetV3_small_x0_35", "data": "labeled", "epochs": 2, "batch_size": 8}
RECIPE = {
    "name": "shared",
    "images": {"resolution": 16},
    "data": {"labeled": f"{SHAPES}count=40&seed=1", "validation": f"{SHAPES}count=24&seed=2"},
    "stages": {"teach": STAGE, "again": {**STAGE, "from": "teach"}},
}
RUN = Path("runs/shared")


class Crew(crew.Crew):
    """The others are not started; who would have been is noted."""

    gathered: list[int]

    def __enter__(self) -> Crew:
        self.gathered.append(self.count)
        return self


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The number of ranks of each run that came so far; stages train nothing, and the first one is stopped once."""
    stops = ["teach"]

    def work(task: Task) -> Outcome:
        facts = {"seconds": 1.0, "metrics": {}, "best": {"step": 0, "top1": -1.0}, "kept": []}
        if stops == [task.name]:
            stops.clear()
            task.save(State(1, {"w": np.zeros(1)}, {}, facts))
            raise Interrupted(f"{task.name} stopped", 143)
        steps = task.settings.total_steps(len(task.data))
        return Outcome(State(steps, {"w": np.zeros(1)}, {}, facts), {"top1": 0.5, "top5": 1.0})

    known = plugins.stage_kind
    monkeypatch.setattr(plugins, "stage_kind", lambda name: dataclasses.replace(known(name), run=work))
    monkeypatch.setattr(crew, "Crew", Crew)
    monkeypatch.setattr(Crew, "gathered", [], raising=False)
    monkeypatch.delenv(RANKS, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("shared.yaml").write_text(json.dumps(RECIPE))
    return Crew.gathered


def run(**options: object) -> None:
    engine.run("shared.yaml", **options)


def stop_in_the_first_stage(**options: object) -> None:
    with pytest.raises(Interrupted):
        run(**options)


def recorded() -> int:
    return json.loads((RUN / "run.json").read_text())["nproc"]


def log() -> str:
    return (RUN / "train.log").read_text()


def test_a_run_has_one_rank_at_first(gathered):
    stop_in_the_first_stage()
    assert (gathered, recorded()) == ([1], 1)


@pytest.mark.parametrize("go_on", [engine.resume, run])
def test_the_number_is_kept(gathered, go_on):
    stop_in_the_first_stage(nproc=2)
    assert recorded() == 2
    go_on()
    assert (gathered, recorded()) == ([2, 2], 2)
    assert "not promised" not in log()
    ranks = [found.state["environment"]["ranks"] for stage in ("teach", "again") if (found := latest(stage))]
    assert ranks == ["2", "2"]


def latest(stage: str) -> checkpoint.Checkpoint | None:
    return checkpoint.latest(RUN / stage, lambda _: None)


@pytest.mark.parametrize("go_on", [engine.resume, run])
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 3)])
def test_another_number_is_taken_and_said_where_a_stage_goes_on(gathered, go_on, first, then):
    stop_in_the_first_stage(nproc=first)
    go_on(nproc=then)
    assert (gathered, recorded()) == ([first, then], then)
    warnings = [line for line in log().splitlines() if "warning: the same weights" in line]
    assert len(warnings) == 1, "the second stage begins with the new number"
    assert f'ranks: "{first}" → "{then}"' in warnings[0]


def test_the_log_says_how_many_ranks_there_are(gathered):
    stop_in_the_first_stage(nproc=3)
    (line,) = (line for line in log().splitlines() if " environment: " in line)
    assert json.loads(line.partition(" environment: ")[2])["ranks"] == "3"


@pytest.mark.parametrize("before", [None, "8"])
def test_a_process_knows_of_its_ranks_for_as_long_as_they_are(gathered, monkeypatch, before):
    """Before anything is asked for its share of the cores; whether the run is stopped, or ends."""
    if before:
        monkeypatch.setenv(RANKS, before)
    monkeypatch.setattr(threads, "cores", lambda: 12)
    shares = []
    monkeypatch.setattr("ssld.preflight.preflight", lambda *_: shares.append(threads.share()))
    stop_in_the_first_stage(nproc=3)
    assert os.environ.get(RANKS) == before
    run()
    assert os.environ.get(RANKS) == before
    assert shares == [4, 4]


def test_what_another_launcher_says_of_ranks_counts_for_nothing(gathered, monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    monkeypatch.setattr(threads, "cores", lambda: 12)
    stop_in_the_first_stage()
    assert (gathered, recorded(), threads.share()) == ([1], 1, 12)
    assert latest("teach").state["environment"]["ranks"] == "1"


@pytest.mark.parametrize("count", [0, -1])
@pytest.mark.parametrize("go_on", [engine.resume, run])
def test_fewer_ranks_than_one_are_refused(gathered, go_on, count):
    stop_in_the_first_stage()
    with pytest.raises(RecipeError, match=rf"nproc: expected a number of processes, 1 or more, got {count}$"):
        go_on(nproc=count)
    assert (gathered, recorded()) == ([1], 1)


def test_a_gpu_is_not_shared(gathered):
    with pytest.raises(RecipeError, match=r"--nproc 2: expected --device cpu, got gpu; leave one of the two out"):
        run(nproc=2, device="gpu")
    assert not gathered
    with pytest.raises(RecipeError, match="expected a run directory, got none"):
        engine.resume(RUN)


def test_batches_that_do_not_feed_all_are_refused_before_anything_is_spent(gathered):
    with pytest.raises(RecipeError) as refused:
        run(nproc=5)
    for words in ("--nproc 5", "at least 2 images", "batch_size of 8 in teach", "lower --nproc, or raise batch_size"):
        assert words in str(refused.value)
    assert not gathered
    with pytest.raises(RecipeError, match="expected a run directory, got none"):
        engine.resume(RUN)
    run_to_the_end(nproc=4)
    assert gathered[-1] == 4


def run_to_the_end(**options: object) -> None:
    stop_in_the_first_stage(**options)
    run()


def test_a_refused_number_leaves_the_run_as_it_was(gathered):
    stop_in_the_first_stage(nproc=2)
    before = {name: (RUN / name).read_bytes() for name in ("run.json", "recipe.yaml")}
    with pytest.raises(RecipeError, match="--nproc 5"):
        engine.resume(RUN, nproc=5)
    assert {name: (RUN / name).read_bytes() for name in before} == before
    engine.resume(RUN)
    assert gathered == [2, 2]


def test_what_is_done_already_needs_no_feeding(gathered):
    """Too many ranks for the batches of a stage that does not run again are none."""
    changed = {**RECIPE, "stages": {**RECIPE["stages"], "again": {**RECIPE["stages"]["again"], "batch_size": 20}}}
    Path("shared.yaml").write_text(json.dumps(changed))
    stop_in_the_first_stage()
    run(until="teach")
    run(nproc=8)
    assert gathered == [1, 1, 8]


def test_what_is_not_to_be_done_yet_needs_no_feeding(gathered):
    small = {**RECIPE["stages"]["again"], "batch_size": 3}
    Path("shared.yaml").write_text(json.dumps({**RECIPE, "stages": {**RECIPE["stages"], "again": small}}))
    stop_in_the_first_stage(nproc=2, until="teach")
    run(until="teach")
    assert latest("teach").state["finished"]
    with pytest.raises(RecipeError, match=r"--nproc 2: .* batch_size of 3 in again"):
        run()
    run(nproc=1)
    assert gathered == [2, 2, 1]


def test_a_run_whose_options_are_damaged_has_the_defaults_only_when_told(gathered):
    """Another number of ranks gives other bits."""
    stop_in_the_first_stage(nproc=2)
    (RUN / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json: expected the options of the run, .* write {} into it"):
        run()
    (RUN / "run.json").write_text("{}")
    run()
    assert gathered[-1] == 1


def test_a_rank_that_is_gone_leaves_the_command_that_goes_on(gathered, monkeypatch):
    def gone(task: Task) -> Outcome:
        raise RankError("expected 2 ranks, one is gone")

    monkeypatch.setattr(
        plugins, "stage_kind", lambda name, known=plugins.stage_kind: dataclasses.replace(known(name), run=gone)
    )
    with pytest.raises(RankError) as raised:
        run(nproc=2)
    assert raised.value.__notes__ == ["continue: ssld resume --out runs/shared"]
