"""Accuracy of a network on a labeled set, against one that is counted by hand."""

from __future__ import annotations

import numpy as np
import paddle
from paddle import nn
from PIL import Image

from ssld.data.transforms import Pipeline
from ssld.train import evaluation
from ssld.train.evaluation import evaluate

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


def test_top1_and_top5_are_those_of_a_count_by_hand(shapes, monkeypatch):
    """Of batches of 7, the last holds one image."""
    monkeypatch.setattr(evaluation, "BATCH", 7)
    network, samples = Linear(), shapes(50, seed=4)
    assert len(samples) % 7 == 1
    ranks = []
    for i in range(len(samples)):
        pixels = np.asarray(Image.fromarray(samples.read(i)).resize((16, 16), Image.Resampling.BILINEAR))
        image = ((pixels / 255 - 0.5) / 0.25).transpose(2, 0, 1).reshape(-1)
        scores = image @ network.fc.weight.numpy().astype(np.float64) + network.fc.bias.numpy()
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


def test_top5_of_fewer_classes_is_certain(shapes):
    class Two(Linear):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3 * 16 * 16, 4)

    assert evaluate(Two(), shapes(6), PIPELINE, "cpu")["top5"] == 1.0
