"""Distillation: the teacher's soft labels alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import paddle
import pytest
from pydantic import ValidationError

from ssld.contracts import Soft
from ssld.errors import RecipeError
from ssld.stages.distill import Distill, stage
from ssld.train.feed import Target

TAUGHT = {"teacher": {"stage": "teach"}}


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.usefixtures("unmeasured")
def test_labels_are_never_read(make_task, shapes, teacher):
    """The same weights, bit for bit, from a pool and from images whose labels are all impossible."""
    pool = shapes(22, labeled=False)
    mislabeled = replace(pool, labels=np.full(22, -7))
    ends = [stage.run(make_task("distill", TAUGHT, data=data, teacher=teacher)) for data in (pool, mislabeled)]
    first, second = (end.state.weights for end in ends)
    assert not Distill.needs_labels
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("unmeasured")
def test_another_teacher_gives_another_student(make_task, teacher):
    class Opposite:
        spec = teacher.spec

        def predict(self, images):
            return -teacher.predict(images)

    tasks = (make_task("distill", TAUGHT, teacher=one) for one in (teacher, Opposite()))
    first, second = (stage.run(task).state.weights["fc.weight"] for task in tasks)
    assert not np.allclose(first, second)


@pytest.mark.parametrize("loss", ["js", {"name": "kl", "temperature": 4}])
@pytest.mark.parametrize("kept", [None, 2], ids=["all classes", "two classes and the rest"])
def test_objective_is_the_named_loss_on_the_soft_labels(objective_of, make_task, teacher, loss, kept):
    """Of kept classes, those that are not kept are one on both sides."""
    temperature = 1 if loss == "js" else 4
    draw = np.random.default_rng(1)
    student, taught = (draw.normal(size=(3, 4)).astype(np.float32) for _ in range(2))
    p, q = (softmax(logits.astype(float) / temperature) for logits in (student, taught))
    soft = Soft(None, taught, temperature)
    if kept:
        ids = np.argsort(-taught, axis=1)[:, :kept]
        p, q = (np.column_stack([part := np.take_along_axis(x, ids, 1), 1 - part.sum(1)]) for x in (p, q))
        soft = Soft(ids, (temperature * np.log(q)).astype(np.float32), temperature)
    objective = objective_of(stage, make_task("distill", {**TAUGHT, "loss": loss}, teacher=teacher))
    got = objective(paddle.to_tensor(student), Target(0, np.zeros(0), ("a",) * 3, None, soft)).numpy()
    if loss == "js":
        expected = ((p * np.log(p / q)).sum(1) + (q * np.log(q / p)).sum(1)) / 2
    else:
        expected = 16 * (q * np.log(q / p)).sum(1)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_loss_is_named_before_the_first_step(make_task, teacher):
    with pytest.raises(RecipeError, match="unknown loss 'jss', did you mean js"):
        stage.run(make_task("distill", {**TAUGHT, "loss": "jss"}, teacher=teacher))


def test_a_teacher_is_required():
    with pytest.raises(ValidationError, match="teacher"):
        Distill.model_validate({"kind": "distill", "student": "ResNet18_vd", "data": "unlabeled", "epochs": 1})
