"""The walk over a plan, with stages that train nothing: what runs, what is skipped, and how a stopped run goes on."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import paddle
import pytest
import safetensors.numpy
from PIL import Image

from ssld import checkpoint, datasets, engine, files, plugins, preflight, rundir, score
from ssld.contracts import Outcome, State, TeacherSpec
from ssld.data.loader import Replay
from ssld.data.samples import Samples
from ssld.data.sources import open_source
from ssld.errors import (
    ChangedError,
    CheckpointError,
    DataError,
    Interrupted,
    OutputError,
    PluginError,
    RecipeError,
    StorageError,
    TeacherError,
)

STUDENT = "MobileNetV3_small_x0_35"
SHAPES = "builtin:shapes?size=16&classes=4&"
LADDER = ["teach", "distill", "finetune", "fixres"]
RECIPE = {
    "name": "ladder",
    "images": {"resolution": 16},
    "data": {
        "unlabeled": f"{SHAPES}count=60",
        "labeled": f"{SHAPES}count=40&seed=1",
        "validation": f"{SHAPES}count=24&seed=2",
        "test": f"{SHAPES}count=8&seed=3",
    },
    "stages": {
        "teach": {"kind": "pretrain", "network": STUDENT, "data": "labeled", "epochs": 2},
        "distill": {
            "kind": "distill",
            "teacher": {"stage": "teach"},
            "student": STUDENT,
            "data": "unlabeled",
            "epochs": 2,
        },
        "finetune": {
            "kind": "finetune",
            "from": "distill",
            "teacher": {"stage": "teach"},
            "data": "labeled",
            "epochs": 2,
        },
        "fixres": {"kind": "fixres", "from": "finetune", "data": "labeled", "epochs": 2},
    },
}


class Constant:
    """A teacher that says the same of every image: as good as chance."""

    fingerprint = "constant"

    def __init__(self, classes):
        self.spec = TeacherSpec(16, self.fingerprint, classes=classes, mean=None, std=None)

    def predict(self, images):
        return np.zeros((len(images), 4), np.float32)


class Peeking(Constant):
    """A teacher that is always right, since it saw the validation set before; of other images it says circle."""

    fingerprint = "peeking"

    def __init__(self, classes, validation):
        super().__init__(classes)
        self.labels = {sum_of(validation.read(i)): validation.labels[i] for i in range(len(validation))}

    def predict(self, images):
        return np.eye(4, dtype=np.float32)[[self.labels.get(sum_of(image), 0) for image in images]]


def sum_of(image):
    return int((image.astype(np.int64) * np.arange(image.size).reshape(image.shape)).sum())


class Stages:
    """Fakes of all kinds: they note their tasks, and return weights that hold the stage's seed."""

    def __init__(self):
        self.tasks = []
        self.before = {}
        self.scored = []

    @property
    def ran(self):
        return [task.name for task in self.tasks]

    def work(self, task):
        self.tasks.append(task)
        self.before.get(task.name, lambda task: None)(task)
        steps = task.settings.total_steps(len(task.data))
        return Outcome(state(task, steps, metrics={"top1": 0.5, "top5": 1.0}), {"top1": 0.5, "top5": 1.0})

    def score(self, found, samples, device, go_on):
        """In place of an evaluation: each is told from those before it by its result."""
        self.scored.append((found.state["stage"], samples.identity, device))
        return {"top1": len(self.scored) / 100, "top5": 1.0}


def state(task, step, **facts):
    weights = {"seed": np.array([task.seed]), "step": np.array([step])}
    complete = {"seconds": 60.0, "metrics": {}, "best": {"step": 0, "top1": -1.0}, "kept": [], **facts}
    return State(step, weights, {"velocity": np.array([step + 0.5])}, complete)


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Kinds that train nothing, evaluations of the test set that read nothing, and teachers that are right.

    Runs are in the current directory. The teacher `acme` comes from a distribution of that name.
    """
    made = Stages()
    known_kind, known_load = plugins.stage_kind, plugins.load
    monkeypatch.setattr(plugins, "stage_kind", lambda name: dataclasses.replace(known_kind(name), run=made.work))
    validation = open_source(RECIPE["data"]["validation"], labeled=True)
    made.teacher = lambda classes: Peeking(classes, validation)

    def load(kind, name):
        if (kind, name) == ("teachers", "stage"):
            return lambda stage, classes: made.teacher(classes)
        if (kind, name) == ("teachers", "acme"):
            return lambda classes: made.teacher(classes)
        return known_load(kind, name)

    known_origin = plugins.origin
    monkeypatch.setattr(plugins, "origin", lambda *who: "acme 1" if who[1] == "acme" else known_origin(*who))
    monkeypatch.setattr(plugins, "load", load)
    monkeypatch.setattr(score, "score_checkpoint", made.score)
    monkeypatch.chdir(tmp_path)
    return made


def write(changes=(), file="ladder.yaml"):
    values = copy.deepcopy(RECIPE)
    for path, value in dict(changes).items():
        *above, key = path.split(".")
        inner = values
        for step in above:
            inner = inner[step]
        inner[key] = value
    Path(file).write_text(json.dumps(values))
    return file


def run(changes=(), **options):
    # the evaluation pipeline shows the images as they are
    plain = {"images.eval": ["CropImage", "NormalizeImage"]}
    return engine.run(write({**plain, **dict(changes)}), **options)


def log(out="runs/ladder"):
    return Path(out, "train.log").read_text()


def events(name, out="runs/ladder"):
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def kinds(overview):
    return [status.kind for _, status in overview.stages]


def stop_at(step):
    """A stage that saves at this step and ends as a signal ends it."""

    def before(task):
        if task.resume is None:
            task.save(state(task, step))
            raise Interrupted(f"{task.name} stopped", 143)

    return before


# What runs ------------------------------------------------------------------------------------------------------------


def test_the_whole_ladder_runs_once(stages):
    first = run()
    assert stages.ran == LADDER
    assert kinds(first) == ["done"] * 4
    assert first.fresh
    assert first.directory == Path("runs/ladder")
    again = run()
    assert stages.ran == LADDER
    assert kinds(again) == ["done"] * 4
    assert not again.fresh
    assert [event["stage"] for event in events("finished")] == LADDER


def test_each_task_holds_its_own_inputs(stages):
    run()
    teach, distill, finetune, fixres = stages.tasks
    assert len({task.seed for task in stages.tasks}) == 4
    assert teach.initial is None
    assert distill.initial is None
    assert finetune.initial["seed"] == [distill.seed]
    assert fixres.initial["seed"] == [finetune.seed]
    assert [task.soft is not None for task in stages.tasks] == [False, True, True, False]
    assert [task.reference is not None for task in stages.tasks] == [False, True, True, False]
    test = open_source(RECIPE["data"]["test"], labeled=True).identity
    held = [value for task in stages.tasks for value in vars(task).values() if isinstance(value, Samples)]
    held += [task.reference.samples for task in stages.tasks if task.reference]
    assert len(held) == 10
    assert test not in {samples.identity for samples in held}
    pool = len(distill.data)
    assert pool == 60 - len(distill.reference.samples)
    assert [len(task.data) for task in stages.tasks] == [40, pool, 40, 40]
    assert [task.data.labels is None for task in stages.tasks] == [False, True, False, False]
    assert [task.damage_budget for task in stages.tasks] == [0, 1, 0, 0]
    assert [task.model.pipeline.resolution for task in stages.tasks] == [16, 16, 16, 24]
    assert [task.train.resolution for task in stages.tasks] == [16, 16, 16, 24]
    assert {task.model.classes for task in stages.tasks} == {("circle", "square", "triangle", "cross")}
    assert {task.resume for task in stages.tasks} == {None}


def test_a_seed_is_the_recipes_and_the_stages(stages):
    run()
    run({"seed": 1}, out="other")
    seeds = [task.seed for task in stages.tasks]
    assert len(set(seeds)) == 8


def test_a_run_goes_on_after_it_was_moved(stages):
    run()
    shutil.move("runs/ladder", "elsewhere")
    assert kinds(engine.status("elsewhere")) == ["done"] * 4
    assert not engine.resume("elsewhere").fresh
    assert stages.ran == LADDER


@pytest.mark.parametrize("last", ["distill", 1, "1"])
def test_a_run_may_end_early_and_goes_on_later(stages, last):
    assert kinds(run(until=last)) == ["done", "done", "new", "new"]
    assert (stages.ran, stages.scored) == (LADDER[:2], [])
    assert not run(until=last).fresh
    assert kinds(run()) == ["done"] * 4
    assert (stages.ran, len(stages.scored)) == (LADDER, 1)


def test_a_run_ends_after_a_stage_that_there_is(stages):
    with pytest.raises(RecipeError, match=r"got 'tune'; its stages are 0 teach, 1 distill, 2 finetune, 3 fixres"):
        run(until="tune")
    assert stages.tasks == []


def test_planning_writes_nothing(stages):
    write()
    planned = engine.plan("ladder.yaml")
    assert kinds(planned) == ["new"] * 4
    assert not planned.directory.exists()
    assert stages.tasks == []


# Going on -------------------------------------------------------------------------------------------------------------


def test_a_stopped_stage_goes_on_from_what_it_saved(stages):
    stages.before["distill"] = stop_at(1)
    with pytest.raises(Interrupted) as caught:
        run()
    assert caught.value.exit_code == 143
    assert caught.value.__notes__ == ["continue: ssld resume --out runs/ladder"]
    assert kinds(engine.status()) == ["done", "resume", "new", "new"]
    assert kinds(engine.resume()) == ["done"] * 4
    assert stages.ran == ["teach", "distill", *LADDER[1:]]
    resumed = stages.tasks[2].resume
    assert resumed.step == 1
    assert resumed.weights["step"] == [1]
    assert resumed.optimizer["velocity"] == [1.5]
    assert resumed.facts["seconds"] == 60.0
    assert "going on after step 1" in log()
    assert stages.tasks[3].resume is None


def test_the_command_that_continues_can_be_pasted(stages):
    stages.before["teach"] = stop_at(1)
    with pytest.raises(Interrupted) as caught:
        run(out="my runs/it's")
    assert caught.value.__notes__ == ["continue: ssld resume --out 'my runs/it'\"'\"'s'"]


def test_another_environment_is_a_warning(stages, monkeypatch):
    stages.before["teach"] = stop_at(1)
    with pytest.raises(Interrupted):
        run()
    monkeypatch.setenv("OMP_NUM_THREADS", "73")
    engine.resume()
    assert "warning: the same weights as in an unbroken run are not promised, since OMP_NUM_THREADS: " in log()


@pytest.mark.parametrize("stage", ["2", 2, "finetune"])
def test_resume_from_a_stage_does_it_and_what_follows_again(stages, stage):
    run()
    engine.resume(stage=stage)
    assert stages.ran == [*LADDER, "finetune", "fixres"]
    assert "starting again from stage 2 finetune: 2 results, 2:00 of work, are set aside in" in log()
    assert Path("runs/ladder/attempt.1/finetune/latest").resolve().is_dir()
    assert {task.resume for task in stages.tasks} == {None}


def test_resume_from_a_stage_ends_those_before_it_first_and_says_so(stages):
    """No stage is skipped, and what is done stays."""
    stages.before["distill"] = stop_at(1)
    with pytest.raises(Interrupted):
        run()
    before = len(log().splitlines())
    assert kinds(engine.resume(stage="fixres")) == ["done"] * 4
    assert stages.ran == ["teach", "distill", *LADDER[1:]]
    assert stages.tasks[2].resume.step == 1
    said = [line for line in log().splitlines()[before:] if " (2 of 4 stages), " in line]
    assert [line.partition(" [1 distill] ")[2].rpartition(", ")[2] for line in said] == ["going on after step 1"]


def test_resume_from_an_unknown_stage_changes_nothing(stages):
    run()
    with pytest.raises(RecipeError, match=r"got 'tune'; its stages are 0 teach, 1 distill, 2 finetune, 3 fixres"):
        engine.resume(stage="tune")
    assert kinds(engine.status()) == ["done"] * 4


def test_the_run_that_was_worked_on_last_is_resumed(stages):
    run({"name": "one"})
    run({"name": "two"})
    for index, name in enumerate(("two", "one")):
        for path in Path("runs", name).iterdir():
            os.utime(path, (1000 + index, 1000 + index), follow_symlinks=False)
    assert engine.resume().directory == Path("runs/one")


def test_there_must_be_something_to_resume(stages, tmp_path):
    with pytest.raises(RecipeError, match=r"runs: expected a run, got none; start one with ssld run RECIPE"):
        engine.resume()
    with pytest.raises(RecipeError, match=r"expected a run directory, got none"):
        engine.status(tmp_path)


def test_options_hold_for_a_resumed_run(stages):
    stages.before["distill"] = stop_at(1)
    with pytest.raises(Interrupted):
        run(limit=12)
    engine.resume()
    assert all(11 <= len(task.data) <= 12 for task in stages.tasks)


# Changes --------------------------------------------------------------------------------------------------------------


def test_a_changed_recipe_is_refused_with_both_ways_on(stages):
    run()
    with pytest.raises(ChangedError) as caught:
        run({"stages.finetune.epochs": 3})
    text = str(caught.value)
    assert "stages.finetune.epochs: 2 → 3" in text
    assert "seed" not in text
    assert "ssld run with --rerun does finetune, fixres again" in text
    assert "with another --out" in text
    assert not hasattr(caught.value, "__notes__")  # resume would go on with the old recipe
    assert kinds(engine.status()) == ["done"] * 4
    assert stages.ran == LADDER


def test_rerun_does_only_what_is_affected_again(stages):
    run()
    overview = run({"stages.finetune.epochs": 3}, rerun=True)
    assert stages.ran == [*LADDER, "finetune", "fixres"]
    assert kinds(overview) == ["done"] * 4
    assert sorted(path.name for path in Path("runs/ladder/attempt.1").iterdir()) == ["finetune", "fixres", "test.json"]
    assert "stages.finetune.epochs: 2 → 3: 2 results, " in log()
    run(rerun=True)
    assert Path("runs/ladder/attempt.2/finetune").is_dir()


def test_a_stopped_stage_does_not_go_on_with_another_recipe(stages):
    stages.before["distill"] = stop_at(1)
    with pytest.raises(Interrupted):
        run()
    with pytest.raises(ChangedError, match=r"stages\.distill\.epochs: 2 → 5"):
        run({"stages.distill.epochs": 5})
    stages.before.clear()
    run({"stages.distill.epochs": 5}, rerun=True)
    assert stages.tasks[-3].resume is None


def test_another_limit_is_a_change(stages):
    run(limit=12)
    with pytest.raises(ChangedError, match=r"--limit: 12 → not given"):
        run()


def test_what_changes_no_weight_is_no_change(stages):
    run()
    assert not run({"stages.teach.keep_last": 5, "stages.distill.save_steps": 9}).fresh
    assert stages.ran == LADDER


def test_a_refused_resume_sets_nothing_aside(stages):
    run()
    recorded = Path("runs/ladder/recipe.yaml")
    assert "epochs: 2" in recorded.read_text()
    recorded.write_text(recorded.read_text().replace("epochs: 2", "epochs: 3"))
    with pytest.raises(ChangedError):
        engine.resume(stage="fixres")
    assert not Path("runs/ladder/attempt.1").exists()


@pytest.fixture
def pool():
    """A folder of six images, without labels."""
    Path("pool").mkdir()
    for i in range(6):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(f"pool/{i}.png")
    return {"data.unlabeled": "pool"}


def test_what_changed_in_the_recipe_and_behind_it_is_said(stages, pool):
    run(pool)
    Image.new("RGB", (16, 16)).save("pool/6.png")
    with pytest.raises(ChangedError) as caught:
        run({**pool, "stages.fixres.epochs": 3}, limit=50)
    lines = [line.split(": ")[0].strip() for line in str(caught.value).splitlines()[1:-1]]
    assert {"stages.fixres.epochs", "--limit", "distill"} <= set(lines)
    assert "distill: data.unlabeled: " in str(caught.value)
    assert "seed" not in str(caught.value)


def test_images_that_changed_under_the_same_recipe_are_named(stages, pool):
    run(pool)
    Path("pool/0.png").unlink()
    with pytest.raises(ChangedError) as caught:
        engine.resume()
    *lines, ways = str(caught.value).splitlines()[1:]
    assert [line.split(": ")[:2] for line in lines] == [["  distill", "data.unlabeled"]]
    assert "--rerun does distill, finetune, fixres again" in ways


def test_the_new_recipe_is_recorded_before_results_move(stages, monkeypatch):
    """A process that is killed between the two must not go on with the old recipe."""
    run()
    recorded = []

    def move(source, target):
        recorded.append("epochs: 3" in Path("runs/ladder/recipe.yaml").read_text())
        if len(recorded) == 3:  # test.json and fixres have moved
            raise StorageError("no space left")
        files.move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "move", move)
        with pytest.raises(StorageError):
            run({"stages.distill.epochs": 3}, rerun=True)
    assert recorded == [True] * 3
    assert stages.ran == LADDER
    assert kinds(engine.status()) == ["done", "changed", "changed", "new"]
    assert kinds(run({"stages.distill.epochs": 3}, rerun=True)) == ["done"] * 4
    assert stages.ran == [*LADDER, *LADDER[1:]]


def test_what_a_killed_rerun_left_is_refused_with_its_reason(stages, monkeypatch):
    run()

    def fail(*_):
        raise StorageError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "move", fail)
        with pytest.raises(StorageError):
            run({"stages.distill.epochs": 3}, rerun=True)
    with pytest.raises(ChangedError, match=r"epochs: 2 → 3"):
        engine.resume()


# Damage and kills -----------------------------------------------------------------------------------------------------


def damage(stage):
    for file in Path("runs/ladder", stage).glob("step-*/student.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])


def test_a_stage_whose_checkpoints_are_all_damaged_starts_again_when_it_is_asked_to(stages):
    run()
    damage("finetune")
    with pytest.raises(CheckpointError, match="all damaged"):
        engine.resume()
    assert stages.ran == LADDER
    assert kinds(engine.resume(stage="finetune")) == ["done"] * 4
    assert stages.ran == [*LADDER, "finetune", "fixres"]
    assert "all damaged" in log()
    assert "the stage starts again" in log()
    assert Path("runs/ladder/attempt.1/finetune").is_dir()


def test_damage_in_an_earlier_stage_stops_a_later_one_from_starting_again(stages):
    run()
    damage("distill")
    with pytest.raises(CheckpointError, match="all damaged"):
        engine.resume(stage="finetune")
    assert stages.ran == LADDER
    assert not Path("runs/ladder/attempt.1").exists()


def test_links_that_a_kill_left_behind_are_mended_at_the_next_start(stages):
    run()
    links = {link: os.readlink(link) for link in Path("runs/ladder").glob("*/latest")}
    assert len(links) == 4
    for link in links:
        link.unlink()
        link.symlink_to("step-00000000")
    engine.resume()
    assert {link: os.readlink(link) for link in links} == links


def test_a_directory_that_is_no_run_is_left_alone(stages):
    Path("photos").mkdir()
    Path("photos/cat.jpg").write_bytes(b"cat")
    before = Path("photos").stat().st_mtime_ns
    with pytest.raises(OutputError, match=r"photos: expected a run or an empty directory, got one that holds cat\.jpg"):
        run(out="photos")
    assert [path.name for path in Path("photos").iterdir()] == ["cat.jpg"]
    assert Path("photos").stat().st_mtime_ns == before


# The test set ---------------------------------------------------------------------------------------------------------

OTHER_TEST = {"data.test": f"{SHAPES}count=8&seed=4"}


def identity(changes=()):
    return open_source(dict(changes).get("data.test", RECIPE["data"]["test"]), labeled=True).identity


def test_the_last_stage_is_measured_on_the_test_set_once(stages):
    first = run()
    assert stages.scored == [("fixres", identity(), "cpu")]
    assert first.test == {"top1": 0.01, "top5": 1.0}
    for again in (run(), engine.resume(), engine.status(), engine.plan("ladder.yaml")):
        assert (again.test, again.fresh) == (first.test, False)
    assert len(stages.scored) == 1


def test_another_test_set_is_measured_and_nothing_else_is_done(stages):
    run()
    other = run(OTHER_TEST)
    assert stages.ran == LADDER
    assert stages.scored[1:] == [("fixres", identity(OTHER_TEST), "cpu")]
    assert (other.fresh, other.test) == (True, {"top1": 0.02, "top5": 1.0})
    assert engine.status().test == other.test  # the recorded recipe names the new set


def test_a_test_set_that_comes_later_is_measured_alone(stages):
    without = {"data.test": None}
    first = run(without)
    assert (stages.scored, first.test) == ([], None)
    assert not Path("runs/ladder/test.json").exists()
    assert run().test == {"top1": 0.01, "top5": 1.0}
    assert stages.ran == LADDER
    assert run(without).test is None


def test_another_last_stage_is_measured_again(stages):
    run()
    overview = run({"stages.fixres.epochs": 3}, rerun=True)
    assert len(stages.scored) == 2
    assert overview.test == {"top1": 0.02, "top5": 1.0}


def test_weights_that_were_made_again_are_measured_again(stages):
    """Another machine, or another teacher under the same name, gives other weights under the same fingerprint."""
    run()
    assert engine.resume(stage="fixres").test == {"top1": 0.02, "top5": 1.0}


def test_a_run_that_stops_early_does_not_touch_the_test_set(stages):
    stages.before["finetune"] = stop_at(1)
    with pytest.raises(Interrupted):
        run()
    assert stages.scored == []
    assert engine.status().test is None


# Before anything is spent ---------------------------------------------------------------------------------------------


def test_a_network_that_cannot_be_built_stops_the_run_before_the_first_stage(stages):
    with pytest.raises(RecipeError, match=r"num_layers: unknown option"):
        run({"stages.distill.student": {"name": STUDENT, "num_layers": 3}})
    assert stages.tasks == []


def test_a_teacher_that_cannot_be_loaded_stops_the_run_before_the_first_stage(stages):
    safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, "teacher.safetensors")
    with pytest.raises(
        CheckpointError, match=r"teacher\.safetensors for the teacher MobileNetV3_small_x0_35: expected"
    ):
        run({"stages.finetune.teacher": {"network": STUDENT, "weights": "teacher.safetensors"}})
    assert stages.tasks == []


def test_a_start_that_fails_leaves_no_run_to_resume(stages):
    with pytest.raises(RecipeError, match="num_layers: unknown option"):
        run({"stages.distill.student": {"name": STUDENT, "num_layers": 3}})
    with pytest.raises(RecipeError, match="expected a run"):
        engine.resume()
    assert "Error: ladder.yaml:" in log()
    assert "stages.distill.student: student" in log()
    assert run().fresh


def test_a_gpu_that_is_not_there_stops_the_run(stages, monkeypatch):
    monkeypatch.setattr(paddle.device, "is_compiled_with_cuda", lambda: False)
    with pytest.raises(RecipeError, match="--device gpu: expected a paddle built with CUDA"):
        run(device="gpu")
    assert stages.tasks == []


def test_a_teacher_no_better_than_chance_stops_the_run(stages):
    stages.teacher = Constant
    with pytest.raises(TeacherError) as caught:
        run()
    text = str(caught.value)
    assert "the teacher stage teach: expected better than chance, got top-1 0.250" in text
    assert "chance 0.250; check its weights" in text
    assert "--trust-teacher" in text
    assert stages.ran == ["teach"]
    assert not hasattr(caught.value, "__notes__")  # resume alone would come to the same end
    assert kinds(run(trust_teacher=True)) == ["done"] * 4
    assert stages.ran == LADDER


def test_a_smoke_run_goes_on_with_a_teacher_at_chance(stages):
    stages.teacher = Constant
    assert kinds(run(limit=12)) == ["done"] * 4
    assert "top-1 0.250" in log()


class Another(Constant):
    fingerprint = "another"


def test_a_stopped_stage_goes_on_with_its_own_teacher_only(stages):
    """The weights of a plug-in are known once it is loaded; the plan does not see them."""
    stages.teacher = Constant
    stages.before["distill"] = stop_at(1)
    with pytest.raises(Interrupted):
        run({"stages.distill.teacher": {"plugin": "acme"}}, trust_teacher=True)
    stages.teacher = Another
    message = (
        r"distill: expected the teacher with which the stage began, fingerprint (\w{16})…, got (\w{16})…; .*--stage"
    )
    with pytest.raises(ChangedError, match=message) as caught:
        engine.resume()
    began, got = re.search(message, str(caught.value)).groups()
    assert stages.ran == ["teach", "distill"]
    assert kinds(engine.status())[1] == "resume"
    stages.before.clear()
    assert kinds(engine.resume(stage="distill")) == ["done"] * 4
    kept = checkpoint.latest(Path("runs/ladder/distill"), pytest.fail)
    assert kept.state["teacher"].startswith(got)
    assert began != got


def test_a_teacher_is_what_offers_a_spec_and_predict(stages):
    stages.teacher = lambda classes: object()
    with pytest.raises(
        PluginError, match=r"teacher 'stage' of ssld .*: expected an object with spec and predict, got ob"
    ):
        run()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            ("square", "circle", "triangle", "cross"),
            r"teach: expected the 4 classes of the data, got 4; .* label 0: expected 'circle', got 'square'",
        ),
        (("circle", "square", "triangle"), "got 3; .* expected 'cross', got no more classes"),
        (("circle", "square", "triangle", "cross", "ring"), "expected the 4 classes of the data, got 5"),
    ],
)
def test_a_teacher_of_other_classes_is_refused_before_it_is_asked(stages, classes, message):
    class Other(Constant):
        def __init__(self, _):
            super().__init__(classes)

        def predict(self, images):
            pytest.fail("a teacher of other classes was asked")

    stages.teacher = Other
    with pytest.raises(DataError, match=message):
        run()
    assert stages.ran == ["teach"]


def test_right_answers_belong_to_their_images_in_every_batch(stages):
    """Of 70 images, the last batch is short."""
    many = f"{SHAPES}count=70&seed=2"
    samples = open_source(many, labeled=True)
    stages.teacher = lambda classes: Peeking(classes, samples)
    run({"data.validation": many})
    (event,) = events("teacher")
    assert (event["accuracy"], event["images"]) == (1.0, 70)


def test_of_many_validation_images_some_are_asked(stages, monkeypatch):
    monkeypatch.setattr(datasets, "COMPARED", 12)
    run()
    (event,) = events("teacher")
    assert (event["accuracy"], event["images"]) == (1.0, 12)


def test_a_trusted_teacher_may_be_as_bad_as_chance_also_when_resumed(stages):
    stages.teacher = Constant
    stages.before["finetune"] = stop_at(1)
    with pytest.raises(Interrupted):
        run(trust_teacher=True)
    assert kinds(engine.resume()) == ["done"] * 4


def test_how_good_a_teacher_is_is_said_and_recorded(stages):
    run()
    (event,) = events("teacher")  # distill and finetune share it
    assert event["who"] == "the teacher stage teach"
    assert (event["accuracy"], event["chance"], event["images"]) == (1.0, 0.25, 24)
    assert 0.8 < event["low"] < 1.0
    assert "the teacher stage teach: top-1 1.000 (0.8" in log()
    assert "on 24 validation images, chance 0.250" in log()


# Soft labels ----------------------------------------------------------------------------------------------------------

STORED = {"stages.distill.labels": {"views": 2, "top_k": 3}, "stages.distill.teacher": {"plugin": "acme"}}


@pytest.fixture
def asked(stages):
    """How many images the teacher was asked about, one number for each time."""
    validation = open_source(RECIPE["data"]["validation"], labeled=True)
    numbers = []

    class Counting(Peeking):
        def predict(self, images):
            numbers.append(len(images))
            return super().predict(images)

    stages.teacher = lambda classes: Counting(classes, validation)
    return numbers


def label_files(root="runs/ladder/labels.store"):
    return {path: path.read_bytes() for path in Path(root).rglob("*.safetensors")}


def test_a_teacher_whose_labels_are_kept_sees_every_view_once(stages, asked):
    """The pool in two views, by its teacher; the 24 validation images and what is held out, also by finetune's own.

    None of them again for another student or seed.
    """
    run(STORED)
    pool, seen = len(stages.tasks[1].data), sum(asked)
    assert stages.tasks[1].soft.replay == Replay(seed=0, views=2)
    assert seen == 2 * pool + 2 * (24 + 60 - pool)
    run({**STORED, "seed": 5, "stages.distill.epochs": 9}, rerun=True)
    assert stages.ran == [*LADDER, *LADDER]
    assert sum(asked) == seen


def test_results_that_are_set_aside_leave_the_labels_where_they_are(stages, asked):
    run(STORED)
    before = label_files()
    engine.resume(stage="distill")
    assert before
    assert label_files() == before
    moved = {path.name for path in Path("runs/ladder/attempt.1").iterdir()}
    assert moved == {"distill", "finetune", "fixres", "test.json"}


def test_labels_that_are_made_first_are_those_of_a_run(stages, asked):
    """In two parts, of which the second finds the one shard taken."""
    changes = {"images.eval": ["CropImage", "NormalizeImage"], **STORED}
    (first,) = engine.label(write(changes), part=(1, 2))
    (second,) = engine.label("ladder.yaml", part=(2, 2))
    assert [(done.stage, done.written, done.missing) for done in (first, second)] == [
        ("distill", 1, 0),
        ("distill", 0, 0),
    ]
    assert stages.tasks == []
    before, seen = label_files(), sum(asked)
    run(STORED)
    assert before.items() <= label_files().items()
    assert sum(asked) == seen + 24 + 60 - len(stages.tasks[1].data)  # by finetune's own teacher, which keeps no labels


def test_labels_are_made_for_stages_that_keep_them_and_know_their_teacher(stages):
    with pytest.raises(
        RecipeError, match=r"expected a stage that keeps soft labels, got none; write labels: \{views: 8"
    ):
        engine.label(write())
    with pytest.raises(RecipeError, match=r"expected a stage that keeps soft labels, got finetune"):
        engine.label(write(STORED), stage="finetune")
    untaught = {"stages.distill.labels": {"views": 2}}
    with pytest.raises(RecipeError, match=r"expected the stage teach to be finished, got: not run yet; run it first"):
        engine.label(write(untaught))
    assert label_files() == {}


@pytest.mark.parametrize("changed", [False, True])
def test_label_files_that_changed_under_a_stopped_stage_are_a_warning(stages, changed):
    """They were removed, and the teacher of that fingerprint now says something else, as on another machine."""
    stages.teacher = Constant
    stages.before["distill"] = stop_at(1)
    with pytest.raises(Interrupted):
        run(STORED, trust_teacher=True)
    if changed:
        shutil.rmtree("runs/ladder/labels.store")
        validation = open_source(RECIPE["data"]["validation"], labeled=True)
        stages.teacher = lambda classes: type("Drifted", (Peeking,), {"fingerprint": "constant"})(classes, validation)
    assert kinds(engine.resume()) == ["done"] * 4
    warning = "warning: the same weights as in an unbroken run are not promised, since the label files have changed"
    assert (warning in log()) == changed


def test_the_forecast_is_of_stages_that_are_still_to_run(stages, asked):
    (forecast,) = engine.plan(write(STORED)).labels["distill"]
    assert (forecast.shards, forecast.missing, forecast.views) == (1, 1, 2)
    run(STORED)
    assert engine.status().labels == {}
    assert sum(asked) > 0


# Signals --------------------------------------------------------------------------------------------------------------


CODES = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
HANDLED = [number for number, _ in CODES]


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_is_shown_to_the_stage_and_the_run_stops_after_it(stages, number, code):
    seen = []

    def before(task):
        seen.append(task.stop())
        os.kill(os.getpid(), number)
        seen.append(task.stop())

    handlers = [signal.getsignal(each) for each in HANDLED]
    stages.before["distill"] = before
    with pytest.raises(Interrupted, match=f"stopped by {number.name} after distill, which is finished") as caught:
        run()
    assert caught.value.exit_code == code
    assert caught.value.__notes__ == ["continue: ssld resume --out runs/ladder"]
    assert seen == [None, number]
    assert [signal.getsignal(each) for each in HANDLED] == handlers
    assert kinds(engine.status()) == ["done", "done", "new", "new"]
    assert kinds(engine.resume()) == ["done"] * 4
    assert stages.ran == LADDER


def test_a_signal_in_the_last_stage_leaves_the_test_set_for_later(stages):
    stages.before["fixres"] = lambda task: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted):
        run()
    assert stages.scored == []
    assert engine.resume().test == {"top1": 0.01, "top5": 1.0}
    assert stages.ran == LADDER


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_while_the_test_set_is_measured_leaves_it_for_later(stages, monkeypatch, number, code):
    def stopped(found, samples, device, go_on):
        os.kill(os.getpid(), number)
        go_on()
        pytest.fail("it went on")

    with monkeypatch.context() as patch:
        patch.setattr(score, "score_checkpoint", stopped)
        with pytest.raises(Interrupted, match=f"stopped by {number.name} before the test set was measured") as caught:
            run()
    assert caught.value.exit_code == code
    assert caught.value.__notes__ == ["continue: ssld resume --out runs/ladder"]
    assert engine.status().test is None
    assert engine.resume().test == {"top1": 0.01, "top5": 1.0}
    assert stages.ran == LADDER


@pytest.mark.parametrize(("number", "code"), CODES)
@pytest.mark.parametrize("begun", [False, True])
def test_a_signal_while_it_is_planned_ends_it_with_its_code(stages, monkeypatch, number, code, begun):
    """There is something to go on with where an earlier run has begun; labelling begins anew where it was."""
    if begun:
        run(until="teach")

    def interrupted(*_, **__):
        os.kill(os.getpid(), number)
        pytest.fail("it went on")

    handlers = [signal.getsignal(each) for each in HANDLED]
    monkeypatch.setattr(engine, "make_plan", interrupted)
    ways = {run: begun, **({engine.resume: True} if begun else {}), lambda: engine.label(write(STORED)): True}
    for way, goes_on in ways.items():
        with pytest.raises(Interrupted, match=f"^stopped by {number.name}; nothing that was saved") as caught:
            way()
        assert caught.value.exit_code == code
        assert bool(getattr(caught.value, "__notes__", ())) == goes_on
        assert [signal.getsignal(each) for each in HANDLED] == handlers


def test_a_signal_before_the_first_stage_spends_nothing(stages, monkeypatch):
    monkeypatch.setattr(preflight, "preflight", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="before anything was spent"):
        run()
    assert stages.tasks == []


def test_the_handlers_come_back_after_an_error(stages):
    handlers = [signal.getsignal(each) for each in HANDLED]
    stages.before["teach"] = stop_at(1)
    with pytest.raises(Interrupted):
        run()
    assert [signal.getsignal(each) for each in HANDLED] == handlers
