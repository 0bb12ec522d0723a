"""Accuracy of a network on a labeled set, against one that is counted by hand."""

from __future__ import annotations

import tracemalloc
from collections import deque
from dataclasses import replace

import numpy as np
import paddle
import pytest
from paddle import nn
from PIL import Image

from ssld.contracts import Reference, Soft
from ssld.data.transforms import Pipeline
from ssld.errors import DataError, Interrupted
from ssld.train import evaluation, networks
from ssld.train.evaluation import Evaluator, evaluate
from ssld.train.losses import hard_ce
from ssld.train.momentum import Momentum

CLASSES = 12
PIPELINE = Pipeline.read(
    [{"ResizeImage": {"size": 16}}, {"NormalizeImage": {"mean": [0.5] * 3, "std": [0.25] * 3}}], 16
)


class Linear(nn.Layer):
    def __init__(self):
        super().__init__()
        paddle.seed(0)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(0.9)
        self.fc = nn.Linear(3 * 16 * 16, CLASSES)

    def forward(self, x):
        return self.fc(self.dropout(self.flatten(x)))


def scores_of(network, samples, index):
    """The logits of one sample in float64, written out."""
    pixels = np.asarray(Image.fromarray(samples.read(index)).resize((16, 16), Image.Resampling.BILINEAR))
    image = ((pixels / 255 - 0.5) / 0.25).transpose(2, 0, 1).reshape(-1)
    return image @ network.fc.weight.numpy().astype(np.float64) + network.fc.bias.numpy()


def test_top1_and_top5_are_those_of_a_count_by_hand(shapes, monkeypatch):
    """Of batches of 7, the last holds one image."""
    monkeypatch.setattr(evaluation, "BATCH", 7)
    network, samples = Linear(), shapes(50, seed=4)
    assert len(samples) % 7 == 1
    ranks = []
    for i in range(len(samples)):
        scores = scores_of(network, samples, i)
        ranks.append(int((scores > scores[samples.labels[i]]).sum()))
    found = evaluate(network, samples, PIPELINE, "cpu")
    assert found == {"top1": np.mean(np.array(ranks) == 0), "top5": np.mean(np.array(ranks) < 5)}
    assert 0 < found["top1"] < found["top5"] < 1


def test_the_network_stays_as_it_was(shapes):
    network = Linear()
    network.train()
    before = {name: value.numpy().copy() for name, value in network.state_dict().items()}
    evaluate(network, shapes(4), PIPELINE, "cpu")
    assert network.training
    assert network.dropout.training
    assert all(np.array_equal(value.numpy(), before[name]) for name, value in network.state_dict().items())


def test_an_evaluator_measures_the_weights_of_the_moment(shapes, monkeypatch):
    """As if each time were the first; and all cores work on it, since the other ranks wait for it."""
    monkeypatch.setattr(evaluation, "cores", lambda: 2)
    monkeypatch.setenv("SSLD_RANKS", "2")
    threads = []

    class Noted(evaluation.Frozen):
        def __init__(self, *arguments, **options):
            threads.append(options["threads"])
            super().__init__(*arguments, **options)

    monkeypatch.setattr(evaluation, "Frozen", Noted)
    network, samples = Linear(), shapes(40, seed=4)
    measure = Evaluator(network, PIPELINE, "cpu")
    found = []
    for seed in (1, 2, 3):
        network.fc.weight.set_value(np.random.default_rng(seed).normal(size=network.fc.weight.shape).astype("float32"))
        found.append(measure(samples))
        assert found[-1] == evaluate(network, samples, PIPELINE, "cpu")
        right = [scores_of(network, samples, i).argmax() == samples.labels[i] for i in range(len(samples))]
        assert found[-1]["top1"] == np.mean(right)
    assert len({measured["top1"] for measured in found}) > 1
    assert threads == [2] * 4


def trained(samples, evaluated):
    """The weights of a student after four steps, with an evaluation between them or without, as bytes."""
    paddle.seed(0)
    network = networks.build("MobileNetV3_small_x0_35", {}, CLASSES)
    optimizer, measure = Momentum(network), Evaluator(network, PIPELINE, "cpu")
    draws = np.random.default_rng(0)
    for step in range(4):
        network.train()
        images = paddle.to_tensor(draws.normal(size=(8, 3, 16, 16)).astype(np.float32))
        hard_ce(network(images), paddle.to_tensor(np.arange(8))).mean().backward()
        optimizer.step(0.1)
        if evaluated and step != 2:
            measure(samples)
    return {name: value.tobytes() for name, value in networks.arrays(network).items()}


def test_training_goes_on_to_the_last_bit_as_if_it_had_not_been_measured(shapes):
    assert trained(shapes(8), True) == trained(shapes(8), False)


def test_top5_of_fewer_classes_is_certain(shapes):
    class Two(Linear):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3 * 16 * 16, 4)

    assert evaluate(Two(), shapes(6), PIPELINE, "cpu")["top5"] == 1.0


def torn(samples, damaged):
    """The same samples, some of which are no images."""
    store = samples.store

    class Torn:
        def __getattr__(self, name):
            return getattr(store, name)

        def read(self, row):
            return b"no image" if row in damaged else store.read(row)

    return replace(samples, store=Torn())


def referred(samples, taught, damage_budget=0):
    """A reference whose labels are these rows of logits, by the index of the sample."""
    return Reference(samples, lambda indices: Soft(None, taught[indices]), 0.9, 0.3, damage_budget)


@pytest.mark.parametrize("damaged", [(), (0, 8)])
def test_agreement_and_divergence_are_those_of_a_count_by_hand(shapes, monkeypatch, damaged):
    """What cannot be read is left out, and the others keep their labels; of batches of 7, the last is short."""
    monkeypatch.setattr(evaluation, "BATCH", 7)
    network, samples = Linear(), torn(shapes(20, seed=5, labeled=False), damaged)
    taught = np.random.default_rng(2).normal(size=(20, CLASSES)).astype(np.float32)
    right = [i for i in range(20) if i not in damaged]
    scores = np.array([scores_of(network, samples, i) for i in right])
    for row, i in enumerate(right[::2]):
        taught[i, scores[2 * row].argmax()] = 5  # half of them are sure to agree
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (scores, taught[right].astype(float)))
    found = evaluate(network, shapes(4), PIPELINE, "cpu", referred(samples, taught, len(damaged)))
    assert found["agreement"] == np.mean(p.argmax(1) == q.argmax(1))
    assert 0.5 <= found["agreement"] < 1
    assert found["kl"] == pytest.approx((q * np.log(q / p)).sum(1).mean(), rel=1e-3)
    assert {name: found[name] for name in ("top1", "top5")} == evaluate(network, shapes(4), PIPELINE, "cpu")


class Made:
    """A network that costs nothing, with logits of whole numbers so that many are equal, drawn batch by batch.

    said: all that it has answered; broken: the image, counted over all, of which it says NaN.
    """

    def __init__(self, classes):
        self.draw, self.classes, self.said, self.asked, self.broken = np.random.default_rng(0), classes, [], 0, None

    def __call__(self, images):
        self.said.append(self.draw.integers(0, 4, (len(images), self.classes)))
        logits = self.said[-1].astype(np.float32)
        if self.broken in range(self.asked, self.asked + len(images)):
            logits[self.broken - self.asked, 1] = np.nan
        self.asked += len(images)
        return logits


@pytest.fixture
def made(monkeypatch):
    """made(classes): the network that the next evaluation takes in place of its own, in batches of 8."""
    monkeypatch.setattr(evaluation, "BATCH", 8)

    def make(classes):
        network = Made(classes)
        monkeypatch.setattr(Evaluator, "_now", lambda self: network)
        return network

    return make


def test_counted_batch_by_batch_the_numbers_are_those_of_all_at_once(made, shapes):
    network, samples = made(CLASSES), shapes(50, seed=4)
    taught = np.random.default_rng(3).normal(size=(50, CLASSES)).astype(np.float32)
    found = evaluate(Linear(), samples, PIPELINE, "cpu", referred(samples, taught))
    validated, compared = np.concatenate(network.said).astype(float).reshape(2, 50, CLASSES)
    # a stable sort of the falling logits: of equal ones the smaller class comes first
    order = np.argsort(-validated, axis=1, kind="stable")
    place = (order == samples.labels[:, None]).argmax(axis=1)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (compared, taught.astype(float)))
    assert found == {
        "top1": np.mean(place == 0),
        "top5": np.mean(place < 5),
        "agreement": np.mean(compared.argmax(1) == taught.argmax(1)),
        "kl": pytest.approx((q * np.log(q / p)).sum(1).mean(), rel=1e-12),
    }
    assert 0 < found["top1"] < found["top5"] < 1
    assert len(np.unique(validated[0])) < CLASSES, "there are equal ones"


def test_memory_does_not_grow_with_the_set(made, shapes):
    """Beyond a few bytes for an image, which are nothing beside its logits."""
    classes, peaks = 2000, []
    for count in (16, 160):
        samples = shapes(count, seed=4)
        reference = Reference(samples, lambda at: Soft(None, np.zeros((len(at), classes), np.float32)), 0.9, 0.3, 0)
        measure = Evaluator(Linear(), PIPELINE, "cpu")
        # the peak of a longer evaluation must not come from what the test keeps
        made(classes).said = deque(maxlen=1)
        tracemalloc.start()
        measure(samples, reference)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    logits = 4 * classes
    assert peaks[1] - peaks[0] < (160 - 16) * logits / 4


@pytest.mark.parametrize(("nth", "answered"), [(1, 0), (2, 0), (4, 2), (9, 7), (12, 10)])
def test_it_may_be_ended_before_the_export_and_before_every_batch(made, shapes, nth, answered):
    """Of 50 images make 7 batches of 8, and of the 20 of the reference 3."""
    network, asked = made(CLASSES), []

    def go_on():
        asked.append(len(network.said))
        if len(asked) == nth:
            raise Interrupted("stopped", 143)

    reference = referred(shapes(20, seed=5), np.zeros((20, CLASSES), np.float32))
    evaluator = Evaluator(Linear(), PIPELINE, "cpu", go_on)
    if nth < 12:
        with pytest.raises(Interrupted):
            evaluator(shapes(50, seed=4), reference)
    else:
        evaluator(shapes(50, seed=4), reference)
    assert asked == [0, *range(answered + 1)][:nth] if nth < 12 else [0, *range(10)]
    assert len(network.said) == answered


def test_logits_that_are_no_numbers_are_refused_with_the_image(made, shapes):
    made(CLASSES).broken = 11
    with pytest.raises(DataError, match=r"image 11.*: expected numbers as logits, got NaN"):
        evaluate(Linear(), shapes(20), PIPELINE, "cpu")


def test_more_damage_than_the_reference_allows_is_named(shapes):
    samples = torn(shapes(6, seed=5), (0, 3))
    reference = referred(samples, np.zeros((6, CLASSES), np.float32), 1)
    with pytest.raises(DataError, match=r"expected at most 1 damaged images, got 2; the last is .*image 3"):
        evaluate(Linear(), shapes(4), PIPELINE, "cpu", reference)


def test_a_validation_set_is_whole(shapes):
    with pytest.raises(DataError, match=r"expected at most 0 damaged images, got 1"):
        evaluate(Linear(), torn(shapes(6), (2,)), PIPELINE, "cpu")
