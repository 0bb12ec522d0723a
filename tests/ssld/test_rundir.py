"""A run directory: what is recorded, where each stage stands, which checkpoints stay."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ssld import checkpoint, files
from ssld.contracts import Model, State
from ssld.data.transforms import Pipeline
from ssld.errors import CheckpointError, DataError, OutputError, RecipeError, StorageError, UnreadableError
from ssld.graph import make_plan
from ssld.recipe import dump, read_recipe
from ssld.rundir import Options, RunDirectory, result_of, state_of
from ssld.settings import Stored

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

TASK = SimpleNamespace(model=MODEL, soft=None)
METRICS = {"top1": 0.5}


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
def fresh(tmp_path):
    """A run that has not begun."""
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def run(fresh):
    """A run that has begun."""
    fresh.begin(RECIPE, Options())
    return fresh


@pytest.fixture
def status(run, node):
    """The status of the node now; what is reported fails the test."""
    return lambda wanted=node: run.status(wanted, pytest.fail)


def steps(run, node):
    return sorted(int(path.name[5:]) for path in run.stage(node).glob("step-*"))


def test_a_run_records_its_recipe_and_options(fresh, tmp_path, node):
    assert not fresh.exists()
    written = read_recipe(tmp_path / "recipe.yaml")
    options = Options(device="gpu", limit=12, trust_teacher=True)
    fresh.path.mkdir()
    fresh.begin(dump(written), options)
    assert fresh.exists()
    assert fresh.recorded() == (written, options)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (None, "no such file"),
        ("{", "Expecting"),
        ("[1]", "mapping"),
        ('{"device": "cpu", "speed": 9}', "speed"),
        ("null", "mapping"),
        ('{"device": 1}', "device: expected text, got 1"),
        ('{"limit": "x"}', "limit: expected a number of images, 1 or more, got 'x'"),
        ('{"limit": 0}', "limit: expected a number of images, 1 or more, got 0"),
        ('{"nproc": "2"}', "nproc: expected a number of processes, 1 or more, got '2'"),
        ('{"nproc": true}', "nproc: expected a number of processes, 1 or more, got True"),
        ('{"trust_teacher": "no"}', "trust_teacher: expected true or false, got 'no'"),
        ('{"stall_timeout": "x"}', "stall_timeout: expected seconds, 0 or more, got 'x'"),
        ('{"stall_timeout": -1}', "stall_timeout: expected seconds, 0 or more, got -1"),
        ('{"stall_timeout": NaN}', "stall_timeout: expected seconds, 0 or more, got nan"),
        ('{"stall_timeout": Infinity}', "stall_timeout: expected seconds, 0 or more, got inf"),
    ],
)
def test_options_that_are_none_are_named_with_a_remedy_that_works(run, content, got):
    (run.path / "run.json").unlink()
    if content is not None:
        (run.path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"run\.json: expected the options of the run, got: .*{got}.*{{}}"):
        run.recorded()
    (run.path / "run.json").write_text("{}")
    assert run.options() == run.recorded()[1] == Options()


def test_an_error_about_data_elsewhere_says_where_the_run_was_started(run, tmp_path, monkeypatch):
    def notes(error):
        with pytest.raises(type(error)) as caught, run.from_its_place():
            raise error
        return getattr(caught.value, "__notes__", [])

    began = Path.cwd()
    assert notes(DataError("data/pool: expected a folder, got nothing")) == []
    monkeypatch.chdir(tmp_path)
    assert notes(RecipeError("x")) == []
    assert notes(DataError("x")) == [
        f"the run was started in {began}, from where the paths of its recipe count; go there"
    ]
    (run.path / "run.json").write_text("{}")
    assert notes(DataError("x")) == []
    (run.path / "run.json").write_text("{")
    assert notes(DataError("x")) == []


def test_a_stage_is_new_then_stopped_then_finished(run, node, status):
    assert (status().kind, status().checkpoint, status().seconds, status().metrics) == ("new", None, 0.0, {})
    run.save(node, TASK, state(2))
    stopped = status()
    assert (stopped.kind, stopped.why) == ("resume", f"stopped after step 2 of {node.steps}")
    run.save(node, TASK, state(4), METRICS)
    assert (status().kind, status().metrics, status().seconds) == ("done", {"top1": 0.5}, 1.5)


def test_what_taught_a_checkpoint_is_kept_with_it(run, node, status):
    taught = SimpleNamespace(model=MODEL, soft=SimpleNamespace(fingerprint="teachers", files="label files"))
    for task, kept in ((taught, ("teachers", "label files")), (TASK, (None, ""))):
        run.save(node, task, state(2))
        found = status().checkpoint.state
        assert (found["teacher"], found["labels"]) == kept


@pytest.mark.parametrize("store", [None, "elsewhere", "~/labels"])
def test_labels_are_kept_in_the_run_or_where_the_recipe_says(run, node, tmp_path, monkeypatch, store):
    monkeypatch.setenv("HOME", str(tmp_path))
    stored = Stored(views=2, store=store)
    taught = dataclasses.replace(node, settings=SimpleNamespace(stored=stored))
    expected = {None: run.path / "labels.store", "elsewhere": Path("elsewhere"), "~/labels": tmp_path / "labels"}
    assert run.labels(taught) == expected[store]
    assert run.labels(node) == run.path / "labels.store"


def test_what_differs_is_said(run, node, status):
    run.save(node, TASK, state(4), METRICS)
    basis = {**node.basis, "seed": 7, "settings": {**node.basis["settings"], "epochs": 11}}
    found = status(dataclasses.replace(node, basis=basis, fingerprint="another"))
    assert found.kind == "changed"
    assert found.why == "seed: 0 → 7; settings.epochs: 9 → 11"
    assert found.checkpoint is not None


def test_state_and_model_come_back_as_they_were(run, node, status):
    saved = state(3, 0.25, best={"step": 3, "top1": 0.75}, kept=[3])
    run.save(node, TASK, saved)
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
        run.save(node, TASK, state(step, best=best, kept=kept))
    assert steps(run, node) == [2, 3, 6, 7]
    assert (run.stage(node) / "latest").resolve().name == "step-00000007"
    assert (run.stage(node) / "best").resolve().name == "step-00000002"


def damage(run, node, step):
    file = run.stage(node) / f"step-{step:08d}" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def test_a_damaged_checkpoint_is_reported_and_passed_over(run, node):
    for step in (1, 2):
        run.save(node, TASK, state(step))
    damage(run, node, 2)
    reports = []
    found = run.status(node, reports.append)
    assert (found.kind, found.checkpoint.step) == ("resume", 1)
    assert len(reports) == 1
    assert "step 2" in reports[0]


@pytest.mark.parametrize("key", ["fingerprint", "basis", "finished", "metrics", "facts", "model"])
def test_a_state_that_no_stage_has_written_is_refused(run, node, key):
    run.save(node, TASK, state(1))
    whole = checkpoint.latest(run.stage(node), pytest.fail).state
    checkpoint.save(run.stage(node), 2, {}, {name: value for name, value in whole.items() if name != key})
    with pytest.raises(CheckpointError, match=f"step-00000002: expected the state of a stage with its {key}, got None"):
        run.status(node, pytest.fail)


READS = {"a file": "read_bytes", "a directory": "iterdir"}


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("way", READS)
def test_what_cannot_be_read_now_is_neither_passed_over_nor_removed(run, node, monkeypatch, code, way):
    """Each reading of a start fails in turn; the next start finds what was there."""
    for step in (1, 2, 3):
        run.save(node, TASK, state(step))
    before, whole, count = steps(run, node), getattr(Path, READS[way]), 0

    def looked_at(failing):
        seen = 0

        def read(path):
            nonlocal seen
            seen += 1
            if seen == failing:
                raise OSError(code, os.strerror(code), str(path))
            return whole(path)

        with monkeypatch.context() as patch:
            patch.setattr(Path, READS[way], read)
            found = run.status(node, pytest.fail)
            run.tidy(node, found.checkpoint.step, found.checkpoint.state["facts"])
        return seen

    for count in range(1, looked_at(None) + 1):
        with pytest.raises((UnreadableError, StorageError, OutputError), match=os.strerror(code)):
            looked_at(count)
        assert steps(run, node) == before
    assert count
    assert run.status(node, pytest.fail).checkpoint.step == 3


def test_what_was_just_saved_stays_when_a_later_one_is_damaged(run, node):
    """A run that goes on before a damaged checkpoint saves steps that are below it."""
    one = dataclasses.replace(node, settings=node.settings.model_copy(update={"keep_last": 1}))
    run.save(one, TASK, state(5))
    damage(run, one, 5)
    run.save(one, TASK, state(4))
    assert run.status(one, lambda report: None).checkpoint.step == 4


def test_results_are_set_aside_under_a_new_number(run, node):
    assert run.set_aside([node])[1] == 0
    assert {path.name for path in run.path.iterdir()} == {"recipe.yaml", "run.json"}
    for attempt in (1, 2):
        run.save(node, TASK, state(attempt), METRICS)
        target, count = run.set_aside([node])
        assert (target.name.endswith(str(attempt)), count) == (True, 1)
        assert not run.stage(node).exists()
        moved = RunDirectory(target).status(node, pytest.fail)
        assert (moved.kind, moved.checkpoint.step) == ("done", attempt)


# Whose directory ------------------------------------------------------------------------------------------------------


def listing(root):
    """Every entry below, with all that a change would show in."""
    found = {}
    for path in [root, *sorted(root.rglob("*"))]:
        stat = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[path] = (stat.st_ino, stat.st_mtime_ns, stat.st_mode, content)
    return found


@pytest.mark.parametrize(
    "stranger",
    [
        "photos/cat.jpg",
        "train.py",
        "step-00000001/state.json",
        "recipe.yaml.bak",
    ],
)
def test_a_directory_that_is_no_run_is_refused_and_not_touched(fresh, stranger):
    """Names with which ssld's own begin or could be mistaken are a stranger's as well."""
    for name in (stranger, ".tmp-mine", "train.log"):
        file = fresh.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    before = listing(fresh.path)
    with pytest.raises(OutputError, match=rf"run: expected a run or an empty directory, got .*{stranger[:4]}"):
        fresh.claim()
    assert listing(fresh.path) == before


def test_few_of_many_strangers_are_named(fresh):
    for name in "abcd":
        (fresh.path / name).mkdir(parents=True)
    with pytest.raises(OutputError, match=r"that holds a, b, c, …; choose another --out"):
        fresh.claim()


def test_a_new_or_empty_directory_is_taken(fresh):
    fresh.claim()
    assert list(fresh.path.iterdir()) == []
    fresh.claim()
    assert list(fresh.path.iterdir()) == []


def test_what_a_start_that_was_killed_left_is_taken(fresh):
    """Up to the recipe, which is written last."""
    fresh.claim()
    fresh.begin(RECIPE, Options())
    (fresh.path / "recipe.yaml").rename(fresh.path / ".tmp-recipe.yaml-0123abcd")
    for name in ("run.lock", "train.log", "metrics.jsonl"):
        (fresh.path / name).touch()
    (fresh.path / "labels.store" / "0123456789abcdef").mkdir(parents=True)
    assert not fresh.exists()
    fresh.claim()
    fresh.clear()
    kept = {"run.json", "run.lock", "train.log", "metrics.jsonl", "labels.store"}
    assert {path.name for path in fresh.path.iterdir()} == kept
    assert (fresh.path / "labels.store" / "0123456789abcdef").is_dir()


def test_a_run_is_taken_whatever_lies_in_it(fresh):
    fresh.claim()
    fresh.begin(RECIPE, Options())
    (fresh.path / "notes.txt").write_text("mine")
    fresh.claim()
    fresh.clear()
    assert (fresh.path / "notes.txt").read_text() == "mine"


# A process that is killed ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a process in the middle: nobody catches it."""


def entries(root):
    return {path.name: os.readlink(path) if path.is_symlink() else None for path in root.iterdir()}


@pytest.mark.parametrize("last", ["point", "retain"])
def test_links_and_retention_are_mended_after_a_kill(run, node, tmp_path, monkeypatch, last):
    """The same entries as after a process that nobody killed; last: the first of the two that was not done."""
    whole = RunDirectory(tmp_path / "whole")
    whole.begin(RECIPE, Options())
    saves = [state(step, best={"step": min(step, 4), "top1": 0.5}) for step in range(1, 5)]
    for each in saves:
        whole.save(node, TASK, each)
    for each in saves[:-1]:
        run.save(node, TASK, each)

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, last, kill)
        with pytest.raises(Killed):
            run.save(node, TASK, saves[-1])
    assert entries(run.stage(node)) != entries(whole.stage(node))
    found = run.status(node, pytest.fail).checkpoint
    run.tidy(node, found.step, found.state["facts"])
    assert entries(run.stage(node)) == entries(whole.stage(node))
    assert entries(run.stage(node))["latest"] == entries(run.stage(node))["best"] == "step-00000004"


def test_the_last_result_is_set_aside_first(run, node, monkeypatch):
    """So that whenever it is killed, all that a result was made from is still there."""
    nodes = [dataclasses.replace(node, name=name) for name in ("teach", "distill", "finetune")]
    for each in nodes:
        run.save(each, TASK, state(1), METRICS)
    moved = []

    def move(source, target):
        if len(moved) == 2:
            raise Killed
        moved.append(source.name)
        files.move(source, target)

    monkeypatch.setattr("ssld.rundir.move", move)
    with pytest.raises(Killed):
        run.set_aside(nodes)
    assert moved == ["finetune", "distill"]
    assert [run.status(each, pytest.fail).kind for each in nodes] == ["done", "new", "new"]
    for each in nodes[1:]:
        assert RunDirectory(run.path / "attempt.1").status(each, pytest.fail).kind == "done"


# The test set ---------------------------------------------------------------------------------------------------------


def test_a_measurement_belongs_to_its_stage_and_its_set(run, node):
    run.claim()
    assert run.tested(node, "set") is None
    run.keep_tested(node, "set", {"top1": 0.5, "top5": 1.0})
    assert run.tested(node, "set") == {"top1": 0.5, "top5": 1.0}
    assert run.tested(node, "another set") is None
    assert run.tested(dataclasses.replace(node, fingerprint="another"), "set") is None
    run.keep_tested(node, "another set", {"top1": 0.25})
    assert run.tested(node, "set") is None


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"stage": 1, "test": "set", "metrics": null}', "\xff"])
def test_a_measurement_that_cannot_be_read_is_none(run, node, content):
    run.keep_tested(node, "set", {"top1": 0.5})
    (run.path / "test.json").write_text(content, "latin-1")
    assert run.tested(node, "set") is None
    run.keep_tested(node, "set", {"top1": 0.5})
    assert run.tested(node, "set") == {"top1": 0.5}


# A run that is gone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [shutil.rmtree, lambda path: path.rename(path.with_name("elsewhere"))])
def test_nothing_is_saved_where_the_run_is_gone(run, node, gone):
    run.save(node, TASK, state(1))
    gone(run.path)
    with pytest.raises(StorageError, match=r"cannot write step 2 of teach: .*run, got none: .* ssld resume --out DIR"):
        run.save(node, TASK, state(2))
    assert not run.path.exists()


def test_what_a_start_wrote_is_taken_back(run):
    run.forget()
    assert not run.exists()
    run.forget()
    assert list(run.path.iterdir()) == []
