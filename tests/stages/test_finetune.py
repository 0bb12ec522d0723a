"""Finetuning: the teacher's share, the labels' share, and a hundredth of the rate."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from pydantic import ValidationError

from ssld.contracts import Soft
from ssld.settings import Context
from ssld.stages import distill, pretrain
from ssld.stages.distill import Distill
from ssld.stages.finetune import Finetune, stage
from ssld.train import networks
from ssld.train.feed import Target

START = {"from": "distill"}
TAUGHT = {"teacher": {"stage": "teach"}}


@pytest.fixture
def initial():
    return networks.arrays(networks.build("MobileNetV3_small_x0_35", {}, 4, seed=7))


def settings(**values):
    return Finetune.model_validate({"kind": "finetune", **START, "data": "labeled", "epochs": 30, **values})


def same(first, second):
    assert first.state.weights.keys() == second.state.weights.keys()
    return all(np.array_equal(array, second.state.weights[name]) for name, array in first.state.weights.items())


@pytest.mark.usefixtures("unmeasured")
def test_all_hard_is_pretraining_from_the_given_weights(make_task, initial):
    finetuned = stage.run(make_task("finetune", {**START, "hard": 1, "weight_decay": 1e-4}, initial=initial))
    pretrained = pretrain.stage.run(make_task("pretrain", {"weight_decay": 1e-4}, initial=initial))
    assert same(finetuned, pretrained)


@pytest.mark.usefixtures("unmeasured")
def test_no_hard_is_distillation_from_the_given_weights(make_task, initial, teacher):
    finetuned = stage.run(make_task("finetune", {**START, **TAUGHT}, initial=initial, teacher=teacher))
    distilled = distill.stage.run(make_task("distill", TAUGHT, initial=initial, teacher=teacher))
    assert same(finetuned, distilled)


def test_a_share_of_both_is_their_weighted_sum(objective_of, make_task, teacher):
    draw = np.random.default_rng(2)
    logits = paddle.to_tensor(draw.normal(size=(3, 4)).astype(np.float32))
    taught = Soft(None, draw.normal(size=(3, 4)).astype(np.float32))
    target = Target(0, np.zeros(0), ("a",) * 3, np.array([1, 3, 0]), taught)
    soft, mixed, hard = (
        objective_of(stage, make_task("finetune", {**START, **given, "hard": share}, teacher=teacher))(logits, target)
        for share, given in ((0, TAUGHT), (0.25, TAUGHT), (1, {}))
    )
    assert np.abs(soft.numpy() - hard.numpy()).min() > 0.05
    np.testing.assert_allclose(mixed.numpy(), 0.75 * soft.numpy() + 0.25 * hard.numpy(), rtol=1e-5)


def test_smoothing_is_of_the_true_labels_alone(objective_of, make_task, teacher):
    """Four classes: of 0.4, 0.3 go to the other three, whose losses exceed the true one's by what their logits lack."""
    logits = np.array([[2.0, 0.5, -1.0, 0.0], [0.0, 1.0, 0.0, 3.0]], np.float32)
    target = Target(0, np.zeros(0), ("a",) * 2, np.array([0, 1]), Soft(None, logits[::-1].copy()))
    plain, smooth = (
        objective_of(stage, make_task("finetune", {**START, **TAUGHT, "hard": 0.5, **given}, teacher=teacher))(
            paddle.to_tensor(logits), target
        ).numpy()
        for given in ({}, {"smoothing": 0.4})
    )
    more = [0.1 * sum(row[true] - row) for row, true in zip(logits, (0, 1), strict=True)]
    np.testing.assert_allclose(smooth - plain, 0.5 * np.array(more), rtol=1e-5)
    with pytest.raises(ValidationError, match="expected hard above 0 beside smoothing"):
        settings(**TAUGHT, smoothing=0.1)


def test_a_sum_of_losses_may_ask_for_the_true_classes(objective_of, make_task, teacher):
    draw = np.random.default_rng(2)
    logits, taught = (draw.normal(size=(3, 4)).astype(np.float32) for _ in range(2))
    target = Target(0, np.zeros(0), ("a",) * 3, np.array([1, 3, 0]), Soft(None, taught))
    told = {"name": "dkd", "target": "labels", "beta": 0}

    def minimized(loss):
        objective = objective_of(stage, make_task("finetune", {**START, **TAUGHT, "loss": loss}, teacher=teacher))
        return objective(paddle.to_tensor(logits), target).numpy()

    p, q = (np.exp(x)[[0, 1, 2], [1, 3, 0]] / np.exp(x).sum(1) for x in (taught.astype(float), logits.astype(float)))
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    np.testing.assert_allclose(minimized(told), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(minimized(["js", {**told, "weight": 2}]), minimized("js") + 2 * expected, rtol=1e-4)


def test_without_hard_labels_an_unlabeled_set_will_do(objective_of, make_task, teacher):
    objective = objective_of(stage, make_task("finetune", {**START, **TAUGHT}, teacher=teacher))
    target = Target(0, np.zeros(0), ("a",) * 2, None, Soft(None, np.ones((2, 4), np.float32)))
    np.testing.assert_allclose(objective(paddle.zeros([2, 4]), target).numpy(), 0, atol=1e-6)


def test_something_must_teach():
    with pytest.raises(ValidationError, match=r"expected a teacher, or hard: 1 .*, got hard: 0\.5"):
        settings(hard=0.5)
    assert settings(hard=1).teacher is None
    with pytest.raises(ValidationError, match=r"expected no teacher beside hard: 1"):
        settings(hard=1, **TAUGHT)


@pytest.mark.parametrize(
    ("parent_rate", "parent_batch", "batch", "expected"),
    [(0.4, 1024, 1024, 0.004), (3.65625, 5760, 2048, 0.013), (None, 256, 128, 0.0005)],
)
def test_the_rate_is_a_hundredth_per_image(parent_rate, parent_batch, batch, expected):
    """Of what distillation was given, or of what it derived: 0.1 per 256 images."""
    given = {"batch_size": parent_batch} | ({} if parent_rate is None else {"learning_rate": parent_rate})
    common = {"kind": "distill", "student": "ResNet50_vd", "data": "unlabeled", "epochs": 360, **TAUGHT}
    parent = Distill.model_validate({**common, **given}).resolved(
        Context(resolution=224, samples=5_000_000, classes=1000)
    )
    context = Context(resolution=224, samples=1_281_167, classes=1000, parent=parent)
    assert settings(**TAUGHT, batch_size=batch).resolved(context).learning_rate == pytest.approx(expected)


def test_from_a_file_the_rate_is_a_hundredth_of_the_default():
    context = Context(resolution=224, samples=1_281_167, classes=1000)
    tuned = settings(**{**TAUGHT, "from": "student.safetensors"}, student="ResNet50_vd", batch_size=1024)
    assert tuned.resolved(context).learning_rate == pytest.approx(0.004)
    assert tuned.inputs == ("teach",)
