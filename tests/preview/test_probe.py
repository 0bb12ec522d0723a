"""`ssld plan --measure`: what a run will take, reckoned from speeds that are measured in a little of everything."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

import ssld
from ssld import crew, plugins, threads
from ssld.cli import main
from ssld.contracts import TeacherSpec
from ssld.engine import make_plan
from ssld.errors import Interrupted, PluginError, RankError
from ssld.preview import probe, trial
from ssld.preview.costs import Cost, LabelWork, Speeds, TeacherSpeed, advice, table
from ssld.preview.forecast import HEADER_BYTES
from ssld.preview.probe import batch_for, free_bytes, measure, pace
from ssld.preview.trial import Blank, fitting, step_speed
from ssld.recipe import read_recipe
from ssld.settings import Stored
from ssld.stages.pretrain import stage
from ssld.train import loop

STUDENT = "MobileNetV3_small_x0_35"
RECIPE = {
    "name": "tiny",
    "images": {
        "resolution": 16,
        "train": ["RandCropImage", "NormalizeImage"],
        "eval": [{"ResizeImage": {"resize_short": 16}}, "CropImage", "NormalizeImage"],
    },
    "data": {
        "unlabeled": "builtin:shapes?count=96&size=16&classes=4&seed=1",
        "labeled": "builtin:shapes?count=64&size=16&classes=4&seed=2",
        "validation": "builtin:shapes?count=32&size=16&classes=4&seed=3",
    },
    "stages": {
        "teach": {"kind": "pretrain", "network": STUDENT, "data": "labeled", "epochs": 3, "batch_size": 8},
        "distill": {
            "kind": "distill",
            "teacher": {"stage": "teach"},
            "student": STUDENT,
            "data": "unlabeled",
            "epochs": 4,
            "batch_size": 8,
            "labels": {"views": 2, "top_k": 2},
        },
    },
}
SPEEDS = Speeds(
    decode=50.0, step=20.0, batch=8, evaluation=16.0, start=0.5, teachers=(TeacherSpeed(forward=40.0, labelling=25.0),)
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with a recipe of two stages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # more are tried in a test of its own: to start ranks takes seconds
    monkeypatch.setattr(threads, "cores", lambda: 1)
    # JSON is YAML
    Path("tiny.yaml").write_text(json.dumps(RECIPE))
    return tmp_path


def files(place: Path) -> set[Path]:
    return {path for path in place.rglob("*") if "cache" not in path.parts}


def node(*overrides: str):
    return make_plan(read_recipe("tiny.yaml", overrides)).node("distill")


def cost(distill, **fields) -> Cost:
    common = {"steps": distill.steps, "evaluated": 35, "speeds": SPEEDS, "labels": (LabelWork(186, 3000, 35),)}
    return Cost(distill, **{**common, **fields})


# Reckoning -----------------------------------------------------------------------------------------------------------


def test_a_stored_stage_costs_its_labels_and_then_only_the_student(place):
    distill = node()
    found = cost(distill)
    assert found.labelling == pytest.approx((186 + 35) / 25)
    steps = sum(distill.settings.batch_size / 20 for _ in range(distill.steps))
    assert found.training == pytest.approx(steps + 4 * (0.5 + 35 / 16))


def test_an_online_stage_costs_the_teacher_in_every_step(place):
    distill = node("stages.distill.labels=online")
    found = cost(distill, labels=(LabelWork(0, 0, 35),))
    one = 1 / 20 + 1 / 40
    assert found.training == pytest.approx(distill.steps * 8 * one + 4 * (0.5 + 35 / 16))
    assert found.labelling == pytest.approx(35 / 25)


def test_several_teachers_add_up(place):
    teachers = (TeacherSpeed(40.0, 25.0), TeacherSpeed(10.0, 5.0))
    found = cost(
        node("stages.distill.labels=online"),
        speeds=replace(SPEEDS, teachers=teachers),
        labels=(LabelWork(0, 0, 35), LabelWork(0, 0, 20)),
    )
    assert found.asking == pytest.approx(1 / 40 + 1 / 10)
    assert found.labelling == pytest.approx(35 / 25 + 20 / 5)


def test_a_loader_that_is_slower_than_the_student_holds_it_up(place):
    """A short measurement still lives on the batches that were read ahead."""
    slow = cost(node(), speeds=replace(SPEEDS, decode=4.0))
    assert slow.training - 4 * slow.evaluation == pytest.approx(slow.steps * 8 / 4)


def test_the_store_pays_off_where_both_ways_have_cost_the_same(place):
    distill = node()
    after = cost(distill).pays_off
    stored_epoch = distill.samples / 20
    online_epoch = distill.samples / 20 + distill.samples / 40
    assert 186 / 25 + after * stored_epoch == pytest.approx(after * online_epoch)


def test_an_online_stage_is_told_what_each_view_of_a_store_would_take(place):
    online = node("stages.distill.labels=online")
    assert cost(online, labels=(LabelWork(0, 0, 0),)).pays_off == pytest.approx(40 / 25)


def test_labels_that_are_there_pay_off_at_once(place):
    assert cost(node(), labels=(LabelWork(0, 0, 0),)).pays_off == 0


@pytest.mark.parametrize(
    ("epochs", "every", "done"), [(4, 1, 0), (4, 3, 0), (5, 2, 0), (7, 3, 4), (6, 2, 4), (3, 9, 0)]
)
def test_evaluations_are_those_that_the_loop_would_make(place, epochs, every, done):
    distill = node(f"stages.distill.epochs={epochs}", f"stages.distill.eval_interval={every}")
    first = -(-done * distill.samples // 8)
    made = 0
    for step in range(first + 1, distill.steps + 1):
        over, before = step * 8 // distill.samples, (step - 1) * 8 // distill.samples
        made += (over != before and over // every > before // every) or step == distill.steps
    assert cost(distill, steps=distill.steps - first).evaluations == made


def test_the_table_has_a_row_for_each_stage_and_a_total(place):
    measured = cost(node(), store=Path("labels.store"), free=5_000_000_000)
    header, rows = table([measured, cost(node(), speeds=None, labels=())])
    assert {len(row) for row in rows} == {len(header)}
    cells = dict(zip(header, rows[0], strict=True))
    assert cells["student"] == "20 img/s"
    assert (cells["labels"], cells["free disk"]) == ("3 kB", "5 GB at labels.store")
    assert rows[1][1] == "not measured: the time was up"
    assert rows[2][0] == "total"
    assert rows[2][-1].startswith("at least ")


def test_a_smaller_batch_than_the_recipes_is_told(place):
    _, rows = table([cost(node(), speeds=replace(SPEEDS, batch=2))])
    assert rows[0][3] == "20 img/s, batch 2 of 8"


# Measuring -----------------------------------------------------------------------------------------------------------


class Clock:
    """Stands still until somebody works."""

    def __init__(self) -> None:
        self.now = 1000.0

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: made.now)
    return made


def test_pace_is_items_per_second_without_the_first(clock):
    def stream():
        clock.work(7.0)
        for _ in count():
            yield 3
            clock.work(0.25)

    assert pace(stream(), 2.0) == pytest.approx(12)


def test_pace_ends_with_its_stream():
    assert pace(iter([1, 1, 1]), 60.0) > 0


def test_a_batch_fits_three_times_and_is_never_too_large_nor_empty(clock):
    assert [fitting(3.0, one, 64) for one in (0.125, 1e-6, 5.0)] == [8, 64, 1]
    assert batch_for(lambda images: clock.work(0.25 * images), 4.5) == 6


class Work:
    """A stage that takes so many seconds for each image, and asks whether to stop."""

    def __init__(self, clock, seconds, steps=10**9):
        self.clock, self.seconds, self.steps, self.batches = clock, seconds, steps, []

    def __call__(self, task):
        self.batches.append(task.settings.batch_size)
        self.clock.work(5.0)
        for _ in range(self.steps):
            self.clock.work(self.seconds * task.settings.batch_size)
            if task.stop():
                raise Interrupted("stopped", 143)


def test_a_step_is_measured_at_the_batch_size_of_the_recipe(make_task, clock):
    work = Work(clock, 0.01)
    assert step_speed(work, make_task(), 2.0) == (pytest.approx(100), 8)
    assert work.batches == [2, 8]


def test_a_slow_step_is_measured_at_a_smaller_batch(make_task, clock):
    assert step_speed(Work(clock, 0.25), make_task(), 3.0) == (pytest.approx(4), 4)
    assert step_speed(Work(clock, 10.0), make_task(), 3.0) == (pytest.approx(0.1), 2)


def test_a_stage_kind_that_asks_nobody_is_named(make_task, clock):
    with pytest.raises(PluginError, match=r"expected a stage of kind pretrain to ask stop\(\) after every step, got 1"):
        step_speed(Work(clock, 1.0, steps=1), make_task(), 0.1)


def test_neither_evaluation_nor_checkpoint_is_part_of_a_step(make_task, monkeypatch):
    """The real loop on real data, whose epochs end after three steps: neither is called."""

    def forbidden(*_, **__):
        raise AssertionError("evaluated")

    monkeypatch.setattr(loop, "Evaluator", lambda *_: forbidden)
    monkeypatch.setattr(trial, "fitting", lambda seconds, one, most: most)
    saved = []
    task = make_task(settings={"save_interval": 1, "save_steps": 2}, save=saved.append)
    speed, batch = step_speed(stage.run, task, 0.2)
    assert (speed > 0, batch) == (True, 8)
    # each of the two trainings hands over its state when it is stopped, and at no other time
    assert len(saved) == 2


@pytest.mark.parametrize(
    ("stored", "shape"),
    [(None, (3, 5)), (Stored(views=2, top_k=5), (3, 5)), (Stored(views=2, top_k=2), (3, 3))],
    ids=["online", "all classes", "two classes"],
)
def test_blank_labels_have_the_form_of_real_ones(stored, shape):
    soft = Blank(5, stored).of(SimpleNamespace(indices=np.arange(3)))
    assert soft.logits.shape == shape
    assert (soft.ids is None) == (shape[1] == 5)
    assert soft.ids is None or all(len(set(row)) == 2 for row in soft.ids.tolist())


def test_free_bytes_are_those_of_the_nearest_directory_that_is_there(tmp_path):
    there, expected = free_bytes(tmp_path / "not" / "yet"), shutil.disk_usage(tmp_path).free
    assert there == pytest.approx(expected, rel=0.2)


# The whole -----------------------------------------------------------------------------------------------------------


def test_the_command_shows_a_second_table_and_makes_no_run(place, monkeypatch):
    monkeypatch.setattr(probe, "measure", lambda *_, **__: [cost(node())])
    found = CliRunner().invoke(main, ["plan", "tiny.yaml", "--measure"])
    assert found.exit_code == 0, found.output
    first, second = found.stdout.split("\n\n")
    assert first.startswith("stage  ")
    assert "labelling" in second
    assert second.splitlines()[-1].startswith("total")
    assert not Path("runs").exists()


def test_without_measure_nothing_is_measured(place, monkeypatch):
    monkeypatch.setattr(probe, "measure", None)
    assert CliRunner().invoke(main, ["plan", "tiny.yaml"]).exit_code == 0


def test_more_ranks_are_tried_and_judged_where_there_are_cores_for_them(place, monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: 2)
    monkeypatch.setattr(probe, "LONGEST", 0.3)
    # the time in which a network answers is of no interest
    monkeypatch.setattr(probe.Probe, "_evaluation", lambda *_: (1000.0, 0.0))
    before, sizes = files(place), ["-o", "stages.teach.batch_size=16", "-o", "stages.distill.batch_size=16"]
    found = CliRunner().invoke(main, ["plan", "tiny.yaml", "--measure", *sizes])
    assert found.exit_code == 0
    assert files(place) == before
    _, costs, advice = found.stdout.split("\n\n")
    assert all(re.search(r" img/s(, batch .*)?, [0-9.]+ on 2 ranks  ", row) for row in costs.splitlines()[1:-1])
    assert re.match(
        r"--nproc 2 would take [\d.:]+( s)? for the steps that take [\d.:]+( s)? on one rank: (worth it|stay with)",
        advice,
    )


class Crew(crew.Crew):
    """The others are not started; who would have been is noted, and all that is said to them is forgotten."""

    counts: list[int]

    def __enter__(self):
        self.counts.append(self.count)
        return self

    def expect(self, word, patience=None):
        pass


@pytest.fixture
def counts(place, monkeypatch):
    """The numbers of ranks that were tried; there are many cores, and one rank was measured already."""
    monkeypatch.setattr(threads, "cores", lambda: 64)
    monkeypatch.setattr(probe, "Crew", Crew)
    monkeypatch.setattr(Crew, "counts", [], raising=False)
    speeds = {"teach": replace(SPEEDS, teachers=()), "distill": SPEEDS}
    monkeypatch.setattr(probe.Probe, "_speeds", lambda _, node: speeds[node.name])
    monkeypatch.setattr(probe, "paced_steps", lambda *_: 50.0)
    return Crew.counts


@pytest.mark.parametrize(
    ("teach", "distill", "tried", "ranks"),
    [(128, 128, [8], (8, 8)), (40, 24, [5], (5, 5)), (64, 8, [8], (8, 1)), (15, 15, [], (1, 1))],
)
def test_so_many_ranks_are_tried_as_the_largest_batch_feeds_and_eight_at_most(counts, teach, distill, tried, ranks):
    """Eight images for each; a stage whose own batch has not two for each is left out."""
    costs = measure("tiny.yaml", overrides=[f"stages.teach.batch_size={teach}", f"stages.distill.batch_size={distill}"])
    assert counts == tried
    assert tuple(cost.speeds.ranks for cost in costs) == ranks
    assert [cost.speeds.shared for cost in costs] == [50.0 if count > 1 else 0.0 for count in ranks]


def test_ranks_that_cannot_be_tried_leave_what_one_takes(counts, monkeypatch):
    def fail(self, word, patience=None):
        raise RankError("expected rank 1 to go on, it ended with signal 9")

    monkeypatch.setattr(Crew, "expect", fail)
    found = CliRunner().invoke(main, ["plan", "tiny.yaml", "--measure", "-o", "stages.teach.batch_size=64"])
    assert found.exit_code == 0, found.output
    assert counts == [8]
    _, costs = found.stdout.split("\n\n")
    teach, distill, _ = costs.splitlines()[1:]
    assert "  20 img/s, batch 8 of 64  " in teach
    assert "  20 img/s  " in distill
    assert "ranks" not in costs


@pytest.mark.parametrize(("shared", "words"), [(200.0, "worth it"), (105.0, "stay with one")])
def test_ranks_are_advised_where_they_gain_a_tenth(place, shared, words):
    found = cost(node(), steps=5, speeds=replace(SPEEDS, step=100.0, ranks=4, shared=shared))
    # 5 steps of 8 images
    assert (
        advice([found])
        == f"--nproc 4 would take {40 / shared:.1f} s for the steps that take 0.4 s on one rank: {words}"
    )
    assert advice([replace(found, speeds=None)]) == ""


def test_the_estimate_is_that_of_the_run(place, monkeypatch):
    """Within a factor of two, in seconds of this process's own work: others come and go on the machine meanwhile."""
    monkeypatch.setattr(time, "monotonic", time.process_time)
    monkeypatch.setattr(probe, "SECONDS", 4.0)
    stages = {"teach": {**RECIPE["stages"]["teach"], "epochs": 6, "eval_interval": 6}}
    Path("tiny.yaml").write_text(json.dumps({**RECIPE, "stages": stages}))
    before = files(place)
    [teach] = measure("tiny.yaml")
    assert files(place) == before
    result = ssld.run("tiny.yaml")
    taken = sum(status.seconds for _, status in result.stages)
    assert taken / 2 < teach.labelling + teach.training < taken * 2
    assert measure("tiny.yaml") == []


class Slow:
    """A teacher that takes ten milliseconds for each view."""

    spec = TeacherSpec(16, "slow", mean=None, std=None)

    def predict(self, images):
        time.sleep(0.01 * len(images))
        return np.zeros((len(images), 4), np.float32)


def test_a_teacher_is_asked_alone_and_as_in_labelling(place, monkeypatch):
    real = plugins.call
    monkeypatch.setattr(plugins, "call", lambda kind, *rest: Slow() if kind == "teachers" else real(kind, *rest))
    monkeypatch.setattr(probe.Probe, "_evaluation", lambda *_: (1000.0, 0.0))
    monkeypatch.setattr(probe, "LONGEST", 0.5)
    _, distill = measure("tiny.yaml")
    [speed] = distill.speeds.teachers
    assert 0 < speed.labelling <= speed.forward <= 100
    assert distill.pays_off == pytest.approx(2 * speed.forward / speed.labelling)


def test_labels_are_counted_also_where_no_time_was_left_to_measure(place, monkeypatch):
    monkeypatch.setattr(probe, "SECONDS", 0.0)
    teach, distill = measure("tiny.yaml")
    assert (teach.speeds, distill.speeds) == (None, None)
    assert (teach.labels, teach.store) == ((), None)
    assert distill.store == Path("runs/tiny/labels.store")
    # a 32nd of the 96 images is held out, to compare student and teacher on
    assert distill.labels[0].training == 2 * 93
    assert distill.labels[0].tested == 32 + 3
    # two classes of four, of two bits each, take one byte, their codes two, the mass of the rest two
    assert distill.labels[0].bytes == 2 * 93 * 5 + HEADER_BYTES


def test_labels_that_two_stages_share_are_counted_once(place, monkeypatch):
    monkeypatch.setattr(probe, "SECONDS", 0.0)
    again = {**RECIPE["stages"]["distill"], "epochs": 9}
    Path("tiny.yaml").write_text(json.dumps({**RECIPE, "stages": {**RECIPE["stages"], "again": again}}))
    _, distill, other = measure("tiny.yaml")
    assert (distill.labels[0].training, distill.labels[0].tested) == (2 * 93, 32 + 3)
    assert other.labels == (LabelWork(0, 0, 0),)
