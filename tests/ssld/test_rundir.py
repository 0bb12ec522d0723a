"""A run directory: what is recorded, where each stage stands, which checkpoints stay."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from ssld.contracts import Model, State
from ssld.data.transforms import Pipeline
from ssld.errors import CheckpointError
from ssld.graph import make_plan
from ssld.recipe import dump, read_recipe
from ssld.rundir import Options, RunDirectory, environment, result_of, state_of

RECIPE = """\
name: small
data: {labeled: "builtin:shapes?count=24&size=16", validation: "builtin:shapes?count=8&size=16&seed=1"}
stages:
  teach: {kind: pretrain, network: MobileNetV3_small_x0_35, data: labeled, epochs: 9}
"""
MODEL = Model(
    "MobileNetV3_small_x0_35",
    {"dropout": 0.1},
    ("a", "b"),
    Pipeline.read(
        [{"ResizeImage": {"size": 20}}, {"CropImage": {}}, {"NormalizeImage": {"mean": [0.1, 0.2, 0.3]}}], 16
    ),
)


def state(step, value=0.0, **facts):
    weights = {"fc.weight": np.full((2, 3), value, np.float32), "n": np.array([step], np.int64)}
    complete = {"seconds": 1.5, "metrics": {"top1": 0.5}, "best": {"step": 0, "top1": -1.0}, "kept": [], **facts}
    return State(step, weights, {"fc.weight": np.full((2, 3), value / 2, np.float32)}, complete)


@pytest.fixture
def node(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    (made,) = make_plan(read_recipe(file)).nodes
    return made


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def status(run, node):
    """The status of the node now; what is reported fails the test."""
    return lambda wanted=node: run.status(wanted, pytest.fail)


def steps(run, node):
    return sorted(int(path.name[5:]) for path in run.stage(node).glob("step-*"))


def test_a_run_records_its_recipe_and_options(run, tmp_path, node):
    assert not run.exists()
    written = read_recipe(tmp_path / "recipe.yaml")
    options = Options(device="gpu", limit=12, trust_teacher=True)
    run.path.mkdir()
    run.begin(dump(written), options)
    assert run.exists()
    assert run.recorded() == (written, options)


@pytest.mark.parametrize("content", [None, "{", "[1]", '{"device": "cpu", "speed": 9}', "null"])
def test_options_that_cannot_be_read_are_named(run, tmp_path, content):
    run.path.mkdir()
    run.begin(RECIPE, Options())
    (run.path / "run.json").unlink()
    if content is not None:
        (run.path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run\.json: expected the options of the run, got .*ssld run"):
        run.recorded()


def test_a_stage_is_new_then_stopped_then_finished(run, node, status):
    assert (status().kind, status().checkpoint, status().seconds, status().metrics) == ("new", None, 0.0, {})
    run.save(node, MODEL, state(2), finished=False)
    stopped = status()
    assert (stopped.kind, stopped.why) == ("resume", f"stopped after step 2 of {node.steps}")
    assert (stopped.short, stopped.action) == ("stopped", "go on")
    run.save(node, MODEL, state(4), finished=True)
    assert (status().kind, status().metrics, status().seconds) == ("done", {"top1": 0.5}, 1.5)


def test_what_differs_is_said(run, node, status):
    run.save(node, MODEL, state(4), finished=True)
    basis = {**node.basis, "seed": 7, "settings": {**node.basis["settings"], "epochs": 11}}
    found = status(dataclasses.replace(node, basis=basis, fingerprint="another"))
    assert (found.kind, found.action) == ("changed", "run again")
    assert found.why == "seed: 0 → 7; settings.epochs: 9 → 11"
    assert found.checkpoint is not None


def test_state_and_model_come_back_as_they_were(run, node, status):
    saved = state(3, 0.25, best={"step": 3, "top1": 0.75}, kept=[3])
    run.save(node, MODEL, saved, finished=False)
    loaded = state_of(status().checkpoint)
    assert (loaded.step, loaded.facts) == (saved.step, saved.facts)
    for group in ("weights", "optimizer"):
        before, after = getattr(saved, group), getattr(loaded, group)
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    model, weights = result_of(status().checkpoint)
    assert model == MODEL
    assert np.array_equal(weights["fc.weight"], saved.weights["fc.weight"])


def test_the_latest_the_best_and_the_kept_stay(run, node):
    best = {"step": 0, "top1": -1.0}
    kept = []
    for step in range(1, 8):
        best = {"step": 2, "top1": 0.5} if step == 2 else best
        kept = [*kept, step] if step == 3 else kept
        run.save(node, MODEL, state(step, best=best, kept=kept), finished=False)
    assert steps(run, node) == [2, 3, 6, 7]
    assert (run.stage(node) / "latest").resolve().name == "step-00000007"
    assert (run.stage(node) / "best").resolve().name == "step-00000002"


def damage(run, node, step):
    file = run.stage(node) / f"step-{step:08d}" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def test_a_damaged_checkpoint_is_reported_and_passed_over(run, node):
    for step in (1, 2):
        run.save(node, MODEL, state(step), finished=False)
    damage(run, node, 2)
    reports = []
    found = run.status(node, reports.append)
    assert (found.kind, found.checkpoint.step) == ("resume", 1)
    assert len(reports) == 1
    assert "step 2" in reports[0]


def test_what_was_just_saved_stays_when_a_later_one_is_damaged(run, node):
    """A run that goes on before a damaged checkpoint saves steps that are below it."""
    one = dataclasses.replace(node, settings=node.settings.model_copy(update={"keep_last": 1}))
    run.save(one, MODEL, state(5), finished=False)
    damage(run, one, 5)
    run.save(one, MODEL, state(4), finished=False)
    assert run.status(one, lambda report: None).checkpoint.step == 4


def test_results_are_set_aside_under_a_new_number(run, node):
    assert run.set_aside([node])[1] == 0
    assert not run.path.exists()
    for attempt in (1, 2):
        run.save(node, MODEL, state(attempt), finished=True)
        target, count = run.set_aside([node])
        assert (target.name.endswith(str(attempt)), count) == (True, 1)
        assert not run.stage(node).exists()
        moved = RunDirectory(target).status(node, pytest.fail)
        assert (moved.kind, moved.checkpoint.step) == ("done", attempt)


def test_the_environment_is_plain_text_that_json_keeps():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert all(isinstance(value, str) for value in found.values())
    assert {"machine", "cpu", "python", "paddlepaddle", "numpy", "OMP_NUM_THREADS"} <= found.keys()
    assert found == environment()


def test_threads_are_part_of_the_environment(monkeypatch):
    before = environment()
    monkeypatch.setenv("OMP_NUM_THREADS", "73")
    assert {key for key in before if environment()[key] != before[key]} == {"OMP_NUM_THREADS"}
