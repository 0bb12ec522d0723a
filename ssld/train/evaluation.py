"""How good a network is on a labeled set."""

from __future__ import annotations

import numpy as np
from paddle import nn

from ssld.data.loader import Damage, evaluation_batches
from ssld.data.samples import Samples
from ssld.data.transforms import Pipeline, normalize
from ssld.metrics import top_k
from ssld.train.frozen import Frozen

BATCH = 64


def evaluate(network: nn.Layer, samples: Samples, pipeline: Pipeline, device: str) -> dict[str, float]:
    """Top-1 and top-5 accuracy in [0, 1] over all samples, run as a frozen network."""
    frozen = Frozen(network, pipeline.resolution, device=device)
    logits, labels = [], []
    for batch in evaluation_batches(samples, pipeline, batch_size=BATCH, damage=Damage(0)):
        logits.append(frozen(normalize(batch.images[0], pipeline.mean, pipeline.std)))
        assert batch.labels is not None, "validation sets are opened with labels"
        labels.append(batch.labels)
    scores, truth = np.concatenate(logits), np.concatenate(labels)
    return {"top1": top_k(scores, truth, 1), "top5": top_k(scores, truth, min(5, scores.shape[1]))}
