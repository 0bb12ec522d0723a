"""Pretraining: the cross-entropy with the labels, from weights that the seed draws."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest

from ssld.errors import DataError
from ssld.settings import Context
from ssld.stages.pretrain import Pretrain, stage
from ssld.train.feed import Target


def test_objective_is_the_cross_entropy_of_each_image(objective_of, make_task):
    logits = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    hard = np.array([3, 0, 1, 1, 2])
    got = objective_of(stage, make_task())(paddle.to_tensor(logits), Target(0, np.zeros(0), ("a",) * 5, hard, None))
    expected = [math.log(np.exp(row.astype(float)).sum()) - row[label] for row, label in zip(logits, hard, strict=True)]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)


def test_smoothing_spreads_a_share_of_each_label(objective_of, make_task):
    """The mean over all classes of the cross-entropy with each, by its share."""
    logits = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)

    def minimized(hard, **given):
        target = Target(0, np.zeros(0), ("a",) * 5, np.full(5, hard), None)
        return objective_of(stage, make_task("pretrain", given))(paddle.to_tensor(logits), target).numpy()

    expected = 0.8 * minimized(2) + 0.2 * np.mean([minimized(hard) for hard in range(4)], axis=0)
    np.testing.assert_allclose(minimized(2, smoothing=0.2), expected, rtol=1e-5)


@pytest.mark.usefixtures("unmeasured")
def test_unlabeled_data_are_refused(make_task, shapes):
    with pytest.raises(DataError, match="expected labeled images, got one without a label: shapes"):
        stage.run(make_task(data=shapes(22, labeled=False)))


def test_network_is_another_word_for_student_and_the_rate_is_the_published_one():
    settings = Pretrain.model_validate(
        {"kind": "pretrain", "network": "ResNet50_vd", "data": "labeled", "epochs": 120, "batch_size": 1024}
    )
    resolved = settings.resolved(Context(resolution=224, samples=10**6, classes=1000))
    assert resolved.student.name == "ResNet50_vd"
    assert resolved.learning_rate == pytest.approx(0.4)  # PaddleClas's ResNet50_vd at 1,024 images
    assert (resolved.warmup_epochs, resolved.weight_decay, resolved.resolution) == (5, 1e-4, 224)
    assert Pretrain.needs_labels
