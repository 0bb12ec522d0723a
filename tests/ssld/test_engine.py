"""The walk over a plan, with stages that train nothing: what runs, what is skipped, and how a stopped run goes on."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import paddle
import pytest
import safetensors.numpy

from ssld import engine, plugins
from ssld.contracts import Outcome, State, TeacherSpec
from ssld.data.sources import open_source
from ssld.errors import ChangedError, CheckpointError, Interrupted, PluginError, RecipeError, TeacherError

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

    def __init__(self, classes):
        self.spec = TeacherSpec(16, "constant", classes=classes, mean=None, std=None)

    def predict(self, images):
        return np.zeros((len(images), 4), np.float32)


class Peeking(Constant):
    """A teacher that is always right, since it saw the validation set before."""

    def __init__(self, classes, validation):
        super().__init__(classes)
        self.labels = {sum_of(validation.read(i)): validation.labels[i] for i in range(len(validation))}

    def predict(self, images):
        return np.eye(4, dtype=np.float32)[[self.labels[sum_of(image)] for image in images]]


def sum_of(image):
    return int((image.astype(np.int64) * np.arange(image.size).reshape(image.shape)).sum())


class Stages:
    """Fakes of all kinds: they note their tasks, and return weights that hold the stage's seed."""

    def __init__(self):
        self.tasks = []
        self.before = {}

    @property
    def ran(self):
        return [task.name for task in self.tasks]

    def work(self, task):
        self.tasks.append(task)
        self.before.get(task.name, lambda task: None)(task)
        steps = task.settings.total_steps(len(task.data))
        return Outcome(state(task, steps, metrics={"top1": 0.5, "top5": 1.0}), {"top1": 0.5, "top5": 1.0})


def state(task, step, **facts):
    weights = {"seed": np.array([task.seed]), "step": np.array([step])}
    complete = {"seconds": 60.0, "metrics": {}, "best": {"step": 0, "top1": -1.0}, "kept": [], **facts}
    return State(step, weights, {"velocity": np.array([step + 0.5])}, complete)


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Kinds that train nothing, and a stage teacher that is right; runs are in the current directory."""
    made = Stages()
    known_kind, known_load = plugins.stage_kind, plugins.load
    monkeypatch.setattr(plugins, "stage_kind", lambda name: dataclasses.replace(known_kind(name), run=made.work))
    validation = open_source(RECIPE["data"]["validation"], labeled=True)
    made.teacher = lambda classes: Peeking(classes, validation)

    def load(kind, name):
        if (kind, name) == ("teachers", "stage"):
            return lambda stage, classes: made.teacher(classes)
        return known_load(kind, name)

    monkeypatch.setattr(plugins, "load", load)
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
    assert [task.teacher is not None for task in stages.tasks] == [False, True, True, False]
    assert [task.test is not None for task in stages.tasks] == [False, False, False, True]
    assert [len(task.data) for task in stages.tasks] == [40, 60, 40, 40]
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
    assert {len(task.data) for task in stages.tasks} == {12}


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
    assert sorted(path.name for path in Path("runs/ladder/attempt.1").iterdir()) == ["finetune", "fixres"]
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
    with pytest.raises(ChangedError, match=r"--limit: 12 → None"):
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
    assert "the teacher teach of distill: expected better than chance, 0.250, got top-1 0.250" in text
    assert "--trust-teacher" in text
    assert stages.ran == ["teach"]
    assert caught.value.__notes__ == ["continue: ssld resume --out runs/ladder"]


def test_a_teacher_is_what_offers_a_spec_and_predict(stages):
    stages.teacher = lambda classes: object()
    with pytest.raises(
        PluginError, match=r"teacher 'stage' of ssld .*: expected an object with spec and predict, got ob"
    ):
        run()


def test_a_trusted_teacher_may_be_as_bad_as_chance_also_when_resumed(stages):
    stages.teacher = Constant
    stages.before["finetune"] = stop_at(1)
    with pytest.raises(Interrupted):
        run(trust_teacher=True)
    assert kinds(engine.resume()) == ["done"] * 4


def test_how_good_a_teacher_is_is_said_and_recorded(stages):
    run()
    first, second = events("teacher")
    assert [event["who"] for event in (first, second)] == [
        "the teacher teach of distill",
        "the teacher teach of finetune",
    ]
    assert (first["top1"], first["chance"]) == (1.0, 0.25)
    assert 0.8 < first["low"] < 1.0
    assert "the teacher teach of distill: top-1 1.000 (0.8" in log()
    assert "on 24 validation images, chance 0.250" in log()


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_shown_to_the_stage_and_the_handlers_come_back(stages, number):
    seen = []

    def before(task):
        seen.append(task.stop())
        os.kill(os.getpid(), number)
        seen.append(task.stop())

    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    stages.before["distill"] = before
    run()
    assert seen == [None, number]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_the_handlers_come_back_after_an_error(stages):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    stages.before["teach"] = stop_at(1)
    with pytest.raises(Interrupted):
        run()
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
