"""What keeping soft labels will take is said before, and holds when the files are there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ssld import plugins
from ssld.contracts import TeacherSpec
from ssld.data import samples as sampling
from ssld.errors import DataError
from ssld.graph import make_plan
from ssld.labels.format import pack
from ssld.labels.store import Probe
from ssld.members import Members
from ssld.preview.forecast import LabelForecast, label_forecasts
from ssld.recipe import read_recipe
from ssld.rundir import Options, RunDirectory

SHAPES = "builtin:shapes?size=16&classes=4&"
PROBE = Probe(0, "f" * 64, "f" * 64)
RECIPE = {
    "name": "forecast",
    "images": {"resolution": 16},
    "data": {
        "unlabeled": f"{SHAPES}count=72",
        "labeled": f"{SHAPES}count=16&seed=1",
        "validation": f"{SHAPES}count=24&seed=2",
    },
    "stages": {
        "teach": {"kind": "pretrain", "network": "MobileNetV3_small_x0_35", "data": "labeled", "epochs": 1},
        "distill": {
            "kind": "distill",
            "teacher": {"plugin": "acme"},
            "student": "MobileNetV3_small_x0_35",
            "data": ["unlabeled", "labeled"],
            "epochs": 6,
            "labels": {"views": 2, "top_k": 3},
        },
    },
}


class Unasked:
    """A teacher that fails when it is asked."""

    def __init__(self, seed):
        self.spec = TeacherSpec(12, f"{seed}".rjust(64, "0"), engine="paddle.inference 3.3.1 with oneDNN, float32")

    def predict(self, images):
        raise AssertionError("a forecast asks no teacher")


@pytest.fixture
def forecast_of(monkeypatch, tmp_path):
    """forecast_of(*overrides, waiting=()): members of a run in the directory `run`, and their forecasts."""
    load, origin = plugins.load, plugins.origin

    def make(seed=0, refuse=False):
        if refuse:
            raise DataError("the service does not answer")
        return Unasked(seed)

    monkeypatch.setattr(plugins, "load", lambda kind, name: make if name == "acme" else load(kind, name))
    monkeypatch.setattr(plugins, "origin", lambda kind, name: "acme 1" if name == "acme" else origin(kind, name))
    monkeypatch.setattr(sampling, "VIRTUAL_SHARD", 16)
    monkeypatch.chdir(tmp_path)

    def forecast(*overrides, waiting=()):
        Path("recipe.yaml").write_text(json.dumps(RECIPE))
        plan = make_plan(read_recipe("recipe.yaml", overrides))
        members = Members(RunDirectory(Path("run")), plan, Options(), lambda _: None)
        return members, label_forecasts(members, plan.node("distill"), waiting, set())

    return forecast


def write(members, shards=None):
    """Random labels for these shards of the first teacher, all when left out; returns the bytes that were written."""
    node = members.plan.node("distill")
    store, _ = members.stores(node)[0]
    samples, about = members.plan.data.named(node.settings.data), store.description
    written = 0
    for shard in range(len(samples.shard_ids)) if shards is None else shards:
        shape = (int(samples.shard_sizes[shard]), about.replay.views, len(about.classes))
        logits = np.random.default_rng(shard).normal(0, 3, shape).astype(np.float32)
        store.commit(samples, shard, pack(logits, about.top_k), PROBE, 1)
        written += store.file(samples, shard).stat().st_size
    return written


def images_of(members):
    return len(members.plan.data.named(("unlabeled", "labeled")))


def test_passes_and_shards_are_counted(forecast_of):
    """Of the pool, five shards; of the labeled images, one more."""
    members, (forecast,) = forecast_of()
    images = images_of(members)
    assert 80 < images < 88, "some of the pool are held out"
    assert (forecast.teacher, forecast.size) == ("plugin acme (acme 1)", 12)
    assert forecast.directory.parent == Path("run/labels.store")
    assert (forecast.images, forecast.views, forecast.epochs) == (images, 2, 6)
    assert (forecast.shards, forecast.missing) == (6, 6)
    assert forecast.passes == 2 * images
    assert forecast.what().startswith(
        f"run: 6 of 6 shards, {2 * images} passes of the teacher instead of {6 * images} online, "
    )


@pytest.mark.parametrize(
    ("shard", "views", "top_k", "count"),
    [(16, 1, 1, 72), (16, 2, 3, 72), (64, 8, 4, 400), (1000, 4, 4, 3000), (1000, 8, 1, 3000)],
)
def test_the_bytes_are_those_of_the_files_that_are_then_written(forecast_of, monkeypatch, shard, views, top_k, count):
    monkeypatch.setattr(sampling, "VIRTUAL_SHARD", shard)
    members, (forecast,) = forecast_of(
        f"data.unlabeled={SHAPES}count={count}", f"stages.distill.labels={{views: {views}, top_k: {top_k}}}"
    )
    assert forecast.bytes == pytest.approx(write(members), rel=0.15)


def test_what_is_there_is_not_counted_again(forecast_of):
    members, (before,) = forecast_of()
    written = write(members, [0, 3])
    _, (after,) = forecast_of()
    sizes = members.plan.data.named(("unlabeled", "labeled")).shard_sizes
    assert (after.shards, after.missing) == (6, 4)
    assert before.passes - after.passes == 2 * (sizes[0] + sizes[3])
    assert before.bytes - after.bytes == pytest.approx(written, rel=0.15)


def test_where_all_is_there_nothing_is_to_be_done(forecast_of):
    members, _ = forecast_of()
    write(members)
    _, (forecast,) = forecast_of()
    assert (forecast.passes, forecast.bytes, forecast.missing) == (0, 0, 0)
    assert forecast.what() == (
        f"skip: all 6 shards are in {forecast.directory}, no pass of the teacher instead of "
        f"{6 * images_of(members)} online"
    )


def test_another_student_seed_and_length_need_no_pass(forecast_of):
    members, _ = forecast_of()
    write(members)
    _, (forecast,) = forecast_of("seed=3", "stages.distill.resolution=32", "stages.distill.epochs=90")
    assert (forecast.passes, forecast.epochs) == (0, 90)


def test_each_teacher_is_forecast_by_itself(forecast_of):
    """The first has labels, the second none."""
    members, _ = forecast_of()
    write(members)
    _, forecasts = forecast_of("stages.distill.teacher=[{plugin: acme}, {plugin: acme, seed: 1}]")
    assert [forecast.passes for forecast in forecasts] == [0, 2 * images_of(members)]


def test_a_teacher_that_is_asked_online_has_no_forecast(forecast_of):
    assert forecast_of("stages.distill.labels=online")[1] == ()


def test_of_a_teacher_that_is_still_to_be_trained_the_passes_are_known(forecast_of):
    members, (forecast,) = forecast_of("stages.distill.teacher={stage: teach}", waiting={"teach", "distill"})
    images = images_of(members)
    assert (forecast.teacher, forecast.passes, forecast.directory) == ("stage teach", 2 * images, None)
    assert forecast.what().startswith(
        f"run: 6 of 6 shards, {2 * images} passes of the teacher instead of {6 * images} online, "
    )
    assert forecast.what().endswith(" after teach")


def test_a_teacher_that_cannot_be_had_ends_the_plan_as_it_would_end_the_run(forecast_of):
    with pytest.raises(DataError, match="the service does not answer"):
        forecast_of("stages.distill.teacher={plugin: acme, refuse: true}")


def test_thousands_are_set_apart():
    forecast = LabelForecast("t", 5000, 5, 5, 5000, 2, 100, bytes_per_view=25, why_unknown="after teach")
    assert forecast.what() == (
        "run: 5 of 5 shards, 10,000 passes of the teacher instead of 500,000 online, 258 kB after teach"
    )
