"""The training loop: what a step does, when it measures and saves, and that a stopped run goes on bit for bit."""

from __future__ import annotations

import hashlib
import json
import math
import signal

import numpy as np
import paddle
import pytest
from paddle import nn
from PIL import Image

from ssld.contracts import Reference, Soft, TeacherSpec
from ssld.data.transforms import normalize, view
from ssld.distances import js
from ssld.errors import DataError, Interrupted
from ssld.train import evaluation, loop, networks
from ssld.train.losses import hard_ce

CLASSES = 4


class Prototypes:
    """A teacher that compares every image with a fixed random one of each class."""

    def __init__(self, size=16):
        self.spec = TeacherSpec(size, "prototypes")
        self.prototypes = np.random.default_rng(0).normal(size=(3 * size * size, CLASSES)).astype(np.float32)

    def predict(self, images):
        return images.reshape(len(images), -1) @ self.prototypes / 10


class Linear(nn.Layer):
    """One linear layer over all pixels, from weights drawn here."""

    def __init__(self):
        super().__init__()
        paddle.seed(3)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(3 * 16 * 16, CLASSES)

    def forward(self, x):
        return self.fc(self.flatten(x))


def labels(logits, target):
    return hard_ce(logits, target.labels)


def soft_labels(logits, target):
    """The loss of SSLD with the teacher's probabilities of all classes."""
    return js(logits, paddle.to_tensor(target.soft.logits))


def trained(task, objective=None):
    """Train the task's student as a stage does: on soft labels where there is a teacher."""
    if objective is None:
        objective = labels if task.soft is None else soft_labels
    return loop.fit(task, networks.student(task), objective)


def fitted(task):
    """Train a linear layer, which is exported at once, from where the task stopped."""
    layer = Linear()
    if task.resume is not None:
        networks.load(layer, task.resume.weights, "the layer")
    return loop.fit(task, layer, labels)


def sha256(arrays):
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    return digest.hexdigest()


def bits(state):
    facts = {key: value for key, value in state.facts.items() if key != "seconds"}
    return state.step, sha256(state.weights), sha256(state.optimizer), facts


def measured(monkeypatch, accuracies):
    """Let the evaluations answer these in turn; returns the list of those that are left."""
    left = list(accuracies)
    monkeypatch.setattr(loop, "Evaluator", lambda *_: lambda *_: {"top1": left.pop(0), "top5": 1.0})
    return left


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(("samples", "batch", "epochs"), [(22, 8, 2), (16, 8, 3), (5, 8, 2), (9, 2, 1)])
def test_every_batch_is_full_and_every_epoch_whole(make_task, shapes, samples, batch, epochs):
    seen = []
    task = make_task("pretrain", {"epochs": epochs, "batch_size": batch}, data=shapes(samples))

    def objective(logits, target):
        seen.append((target.step, len(target.images), target.keys))
        return labels(logits, target)

    outcome = loop.fit(task, Linear(), objective)
    steps = math.ceil(epochs * samples / batch)
    assert outcome.state.step == steps
    assert [step for step, *_ in seen] == list(range(steps))
    assert {size for _, size, _ in seen} == {batch}
    keys = [key for *_, keys in seen for key in keys]
    for epoch in range(epochs):
        assert len(set(keys[epoch * samples : (epoch + 1) * samples])) == samples


@pytest.mark.usefixtures("unmeasured")
def test_weights_are_those_of_gradient_descent_in_float64(make_task):
    """All steps of a linear softmax classifier, written out: warm-up, cosine, momentum, decay."""
    peak, momentum, decay, samples, batch, epochs = 0.05, 0.8, 0.02, 22, 8, 3
    total, warmup = math.ceil(epochs * samples / batch), round(1 * samples / batch)
    settings = {"epochs": epochs, "learning_rate": peak, "momentum": momentum, "weight_decay": decay}
    batches = []

    def objective(logits, target):
        batches.append((target.images.reshape(batch, -1).astype(np.float64), target.hard))
        return labels(logits, target)

    layer = Linear()
    start = {name: value.numpy().astype(np.float64) for name, value in layer.state_dict().items()}
    weight, bias = start["fc.weight"], start["fc.bias"]
    outcome = loop.fit(make_task("pretrain", {**settings, "warmup_epochs": 1.0}), layer, objective)

    velocity = [np.zeros_like(weight), np.zeros_like(bias)]
    assert len(batches) == total
    for step, (x, y) in enumerate(batches):
        rate = peak * step / warmup
        if step >= warmup:
            rate = peak / 2 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        scores = x @ weight + bias
        chances = np.exp(scores - scores.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        error = (chances - np.eye(CLASSES)[y]) / batch
        gradients = [x.T @ error + decay * weight, error.sum(0) + decay * bias]
        velocity = [momentum * v + g for v, g in zip(velocity, gradients, strict=True)]
        weight, bias = weight - rate * velocity[0], bias - rate * velocity[1]
    np.testing.assert_allclose(outcome.state.weights["fc.weight"], weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outcome.state.weights["fc.bias"], bias, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outcome.state.optimizer["fc.weight"], velocity[0], rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("teacher", [None, Prototypes()], ids=["labels", "teacher"])
def test_resume_from_any_step_gives_equal_bits(make_task, teacher):
    """Dropout is on, and what a step holds crosses the border between two epochs."""
    states = []
    whole = trained(make_task("pretrain", {"save_steps": 1}, teacher=teacher, save=states.append))
    assert [state.step for state in states] == [1, 2, 3, 4, 5]
    assert len({sha256(state.weights) for state in [*states, whole.state]}) == 6
    for state in states:
        paddle.seed(state.step)
        again = trained(make_task("pretrain", {"save_steps": 1}, teacher=teacher, resume=state))
        assert bits(again.state) == bits(whole.state)


def test_resume_around_a_real_evaluation_gives_equal_bits(make_task):
    """From the save that follows the first of the two evaluations."""
    states = []
    whole = trained(make_task("pretrain", save=states.append))
    assert [state.step for state in states] == [3]
    assert bits(trained(make_task("pretrain", resume=states[0])).state) == bits(whole.state)


@pytest.mark.usefixtures("unmeasured")
def test_dropout_is_on_and_drawn_by_the_task_seed(make_task):
    def first_step(dropout, seed):
        student = {"name": "MobileNetV3_small_x0_35", "dropout": dropout}
        losses = []
        task = make_task("pretrain", {"student": student, "epochs": 1}, seed=seed)
        network = networks.build(student["name"], {"dropout": dropout}, CLASSES)

        def objective(logits, target):
            losses.append(labels(logits, target).numpy().tolist())
            return labels(logits, target)

        loop.fit(task, network, objective)
        return losses[0]

    assert first_step(0.5, 1) == first_step(0.5, 1)
    assert first_step(0.5, 1) != first_step(0.0, 1)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_update(make_task, value):
    states, batch = [], []
    task = make_task("pretrain", {"save_steps": 1}, save=states.append)
    network = networks.student(task)

    def objective(logits, target):
        loss = labels(logits, target)
        if target.step == 3:
            batch.extend(target.keys)
            return loss * value
        return loss

    with pytest.raises(DataError, match=rf"the loss of step 4 is {value}.*learning_rate") as caught:
        loop.fit(task, network, objective)
    assert all(key in str(caught.value) for key in batch[:4])
    assert [state.step for state in states] == [1, 2, 3]
    for name, parameter in network.named_parameters():
        if not parameter.stop_gradient:
            assert np.array_equal(parameter.numpy(), states[-1].weights[name]), name


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("step", [2, 3])
def test_a_signal_ends_the_stage_after_one_save(make_task, monkeypatch, number, code, step):
    """Step 3 ends the first epoch, whose result is worth a save of its own: still one."""
    measured(monkeypatch, [0.5, 0.6])
    states, done = [], []

    def stop():
        done.append(1)
        return number if len(done) == step else None

    task = make_task("pretrain", save=states.append, stop=stop)
    with pytest.raises(Interrupted, match=rf"{number.name} after step {step} of 6; the state is saved") as caught:
        loop.fit(task, Linear(), labels)
    assert caught.value.exit_code == code
    assert [state.step for state in states] == [step]


@pytest.mark.usefixtures("unmeasured")
def test_a_signal_after_the_last_evaluation_lets_the_stage_finish(make_task):
    outcome = loop.fit(
        make_task(stop=lambda: signal.SIGTERM, settings={"epochs": 1, "batch_size": 22}), Linear(), labels
    )
    assert outcome.state.step == 1


class Asked:
    """Hears a signal when it is asked for the nth time, and from then on."""

    def __init__(self, nth):
        self.nth, self.times = nth, 0

    def __call__(self):
        self.times += 1
        return signal.SIGTERM if self.times >= self.nth else None


def rows(folder):
    """What was measured, without the time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{**line, "time": 0} for line in lines if line["event"] == "evaluation"]


@pytest.mark.parametrize("step", [3, 6], ids=["in the middle", "at the end"])
@pytest.mark.parametrize("batches", [0, 2])
def test_an_evaluation_that_a_signal_ends_is_done_when_the_stage_goes_on(
    make_task, monkeypatch, shapes, tmp_path, step, batches
):
    """All that is saved, written and chosen is as if nothing had come; 12 images make 3 batches of 4.

    The signal is seen before the network is exported, or before the batch with that number.
    """
    monkeypatch.setattr(evaluation, "BATCH", 4)
    settings, data = {"save_steps": 1, "save_interval": 1, "learning_rate": 0.5}, shapes(24)
    saved = []
    whole = fitted(make_task("pretrain", settings, data=data, save=saved.append))
    expected = rows(tmp_path)
    assert [row["step"] for row in expected] == [3, 6]
    (tmp_path / "metrics.jsonl").write_text("")

    broken = []
    # once in each step, four times in an evaluation
    asked = Asked(step + (4 if step == 6 else 0) + 1 + batches)
    with pytest.raises(Interrupted, match=rf"after step {step} of 6; the state is saved") as caught:
        fitted(make_task("pretrain", settings, data=data, save=broken.append, stop=asked))
    assert caught.value.exit_code == 143
    assert asked.times == asked.nth
    assert [state.step for state in broken] == list(range(1, step + 1))
    assert broken[-1].facts["due"]
    assert rows(tmp_path) == expected[: step // 3 - 1]

    again = []
    went_on = fitted(make_task("pretrain", settings, data=data, save=again.append, resume=broken[-1]))
    assert bits(went_on.state) == bits(whole.state)
    assert went_on.metrics == whole.metrics
    assert rows(tmp_path) == expected
    # in place of what was saved without the evaluation
    assert list(map(bits, [*broken[:-1], *again])) == list(map(bits, saved))


def test_a_signal_that_comes_while_it_goes_on_with_an_evaluation_ends_it_again(make_task, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 4)
    whole = fitted(make_task("pretrain"))
    states = []
    with pytest.raises(Interrupted):
        fitted(make_task("pretrain", save=states.append, stop=Asked(5)))
    for _ in range(2):
        with pytest.raises(Interrupted, match="after step 3 of 6; the state is saved"):
            fitted(make_task("pretrain", save=states.append, stop=Asked(2), resume=states[-1]))
    assert [(state.step, state.facts["due"]) for state in states] == [(3, True)] * 3
    assert bits(fitted(make_task("pretrain", resume=states[-1])).state) == bits(whole.state)


def test_best_is_the_first_of_equals_and_is_saved(make_task, monkeypatch, shapes):
    left = measured(monkeypatch, [0.2, 0.5, 0.4, 0.5])
    states = []
    outcome = loop.fit(make_task("pretrain", {"epochs": 4}, data=shapes(16), save=states.append), Linear(), labels)
    assert left == []
    assert outcome.state.facts["best"] == {"step": 4, "top1": 0.5}
    assert [state.step for state in states] == [2, 4]
    assert [state.facts["best"]["step"] for state in states] == [2, 4]
    assert outcome.metrics["top1"] == 0.5


def test_save_interval_keeps_for_good(make_task, monkeypatch, shapes):
    measured(monkeypatch, [0.5, 0.4, 0.3, 0.2, 0.1])
    states = []
    task = make_task("pretrain", {"epochs": 5, "save_interval": 2}, data=shapes(16), save=states.append)
    outcome = loop.fit(task, Linear(), labels)
    assert outcome.state.facts["kept"] == [4, 8]
    assert [state.step for state in states] == [2, 4, 8]


@pytest.mark.parametrize(
    ("samples", "epochs", "interval", "epochs_measured"),
    [
        (16, 5, 2, [2, 4, 5]),
        (22, 3, 1, [1, 2, 3]),
        (16, 2, 9, [2]),
        pytest.param(*(3, 6, 2, [2, 5, 6])),
    ],
)
def test_evaluations_are_at_the_interval_and_at_the_end(
    make_task, monkeypatch, shapes, samples, epochs, interval, epochs_measured
):
    """Of three images, a batch of eight ends two or three epochs at once."""
    measured(monkeypatch, [0.5] * 10)
    seen = []
    task = make_task("pretrain", {"epochs": epochs, "eval_interval": interval}, data=shapes(samples))
    monkeypatch.setattr(task.journal, "measured", lambda stage, step, epoch, *_: seen.append((step, epoch)))
    loop.fit(task, Linear(), labels)
    assert [epoch for _, epoch in seen] == epochs_measured
    assert all(step * 8 >= epoch * samples for step, epoch in seen)


def test_an_evaluation_stands_beside_the_teacher_and_chance(make_task, shapes, tmp_path):
    """The student is compared on the reference's images with what the reference says of these."""
    asked = []

    def soft(indices):
        asked.append(indices.tolist())
        return Soft(None, np.eye(CLASSES, dtype=np.float32)[indices % CLASSES] * 1000)

    reference = Reference(shapes(10, seed=7, labeled=False), soft, teacher=0.875, chance=0.3, damage_budget=0)
    layer = Linear()
    task = make_task("pretrain", {"epochs": 1}, reference=reference)
    outcome = loop.fit(task, layer, labels)
    assert asked == [list(range(10))]
    shown = task.model.pipeline
    images = np.stack([view(Image.fromarray(reference.samples.read(i)), shown, seed=0) for i in range(10)])
    scores = layer(paddle.to_tensor(normalize(images, shown.mean, shown.std))).numpy()
    assert outcome.metrics["agreement"] == np.mean(scores.argmax(1) == np.arange(10) % CLASSES)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (event,) = [line for line in lines if line["event"] == "evaluation"]
    assert (event["teacher_top1"], event["chance_top1"]) == (0.875, 0.3)
    assert {name: event[name] for name in outcome.metrics} == outcome.metrics


def test_without_a_teacher_there_is_no_line_to_compare_with(make_task, tmp_path):
    outcome = loop.fit(make_task("pretrain", {"epochs": 1}), Linear(), labels)
    assert outcome.metrics.keys() == {"top1", "top5"}
    event = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert event.keys() == {"time", "event", "stage", "step", "epoch", "top1", "top5"}


def test_save_steps(make_task, monkeypatch):
    measured(monkeypatch, [0.0, 0.0])
    states = []
    loop.fit(make_task("pretrain", {"save_steps": 4}, save=states.append), Linear(), labels)
    assert [state.step for state in states] == [3, 4]  # 3 is the end of the first epoch, and the best so far


def test_without_save_steps_a_save_is_due_by_time(make_task, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    settings = make_task().settings
    clock = loop.Clock(60.0)
    assert (clock.seconds(), loop.save_is_due(settings, 1, clock)) == (60.0, False)
    now[0] += loop.SAVE_EVERY_SECONDS
    assert loop.save_is_due(settings, 1, clock)
    clock.saved()
    assert not loop.save_is_due(settings, 1, clock)
    assert clock.seconds() == 60 + loop.SAVE_EVERY_SECONDS


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step", [2, 6], ids=["in the middle", "at the end"])
def test_weights_that_are_not_finite_are_not_saved(make_task, value, step):
    """Statistics of a batch norm can overflow while every loss is still finite."""
    states, prepared = [], []
    network = Linear()
    network.register_buffer("_variance", paddle.ones([2]))
    network.register_buffer("_mean", paddle.zeros([2]))

    def prepare(layer):
        prepared.append(1)
        if len(prepared) == step:
            layer._variance.set_value(paddle.to_tensor([1.0, value]))

    task = make_task("pretrain", {"save_steps": 1}, save=states.append)
    with pytest.raises(DataError, match=rf"finite weights after step {step}, got NaN or infinity in _variance"):
        loop.fit(task, network, labels, prepare=prepare)
    assert [state.step for state in states] == list(range(1, step))
    assert all(np.isfinite(array).all() for state in states for array in state.weights.values())


@pytest.mark.usefixtures("unmeasured")
def test_seconds_go_on_from_the_stopped_run(make_task):
    states = []
    trained(make_task("pretrain", {"save_steps": 1}, save=states.append))
    before = loop.State(states[0].step, states[0].weights, states[0].optimizer, {**states[0].facts, "seconds": 500.0})
    assert trained(make_task(resume=before)).state.facts["seconds"] >= 500.0
