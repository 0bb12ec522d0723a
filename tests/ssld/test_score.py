"""How good a checkpoint is: the weights that it holds, prepared as it says, on the data that are named."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from PIL import Image

from ssld.contracts import State
from ssld.data.transforms import Pipeline
from ssld.errors import CheckpointError, DataError
from ssld.rundir import Options, RunDirectory
from ssld.score import score
from ssld.train import networks

EVAL = Pipeline.read([{"ResizeImage": {"size": 24}}, {"NormalizeImage": {"mean": [0.5] * 3, "std": [0.25] * 3}}], 24)


@pytest.fixture(scope="module")
def network():
    """A student whose answers depend on the image, though it has learned nothing."""
    made = networks.build("MobileNetV3_small_x0_35", {}, 4, seed=5)
    made.train()
    with paddle.no_grad():
        for _ in range(30):
            made(paddle.randn([16, 3, 24, 24]))
    made.eval()
    return made


@pytest.fixture
def stage(make_task, network, tmp_path):
    """The directory of a stage with two checkpoints, of which the later one holds the network."""
    task = make_task()
    model = SimpleNamespace(**{**vars(task.model), "pipeline": EVAL})
    node = SimpleNamespace(name="student", fingerprint="", basis={}, settings=task.settings)
    weights = networks.arrays(network)
    kept = {"best": {"step": 1}}
    for step, factor in ((1, 0), (2, 1)):
        scaled = {name: value * factor for name, value in weights.items()}
        run = RunDirectory(tmp_path)
        run.begin("", Options())
        run.save(node, SimpleNamespace(model=model, soft=None), State(step, scaled, facts=kept), {})
    return run.stage(node)


def test_the_latest_of_a_stage_is_measured_as_a_count_by_hand(stage, network, shapes):
    samples = shapes(30, seed=4)
    right = 0
    for i in range(len(samples)):
        pixels = np.asarray(Image.fromarray(samples.read(i)).resize((24, 24), Image.Resampling.BILINEAR))
        image = ((pixels / 255 - 0.5) / 0.25).transpose(2, 0, 1)[None].astype(np.float32)
        with paddle.no_grad():
            right += int(network(paddle.to_tensor(image)).numpy().argmax() == samples.labels[i])
    count, found = score(stage, samples.name)
    assert (count, found["top5"]) == (30, 1.0)
    assert found["top1"] == pytest.approx(right / 30)
    assert score(stage / "latest", samples.name) == (count, found)
    # the first checkpoint's weights are all zero: it answers one class
    assert score(stage / "best", samples.name)[1]["top1"] != found["top1"]


def test_other_classes_are_refused(stage):
    with pytest.raises(DataError, match="expected the 4 classes"):
        score(stage, "builtin:shapes?count=8&size=20&classes=5")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nothing: expected a checkpoint or a stage directory"):
        score(tmp_path / "nothing", "builtin:shapes?count=8&size=20")
