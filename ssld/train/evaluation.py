"""How good a network is on a labeled set."""

from __future__ import annotations

import numpy as np
from paddle import nn

from ssld.contracts import Reference
from ssld.data.loader import Damage, evaluation_batches
from ssld.data.samples import Samples
from ssld.data.transforms import Pipeline, normalize
from ssld.metrics import agreement, top_k
from ssld.threads import cores, decoders
from ssld.train.frozen import Frozen

BATCH = 64


class Evaluator:
    """Measures a network that trains on: each call is about its weights of that moment. It is exported once.

    No rank takes a step before rank 0 has evaluated, so an evaluation takes the cores of all of them.
    """

    def __init__(self, network: nn.Layer, pipeline: Pipeline, device: str) -> None:
        self._network = network
        self._pipeline = pipeline
        self._device = device
        self._frozen: Frozen | None = None

    def __call__(self, samples: Samples, reference: Reference | None = None) -> dict[str, float]:
        """Top-1 and top-5 accuracy in [0, 1] over all samples, run as a frozen network.

        With a reference also `agreement`, the share of its images that student and teacher put in the same class, and
        `kl`, the mean divergence of the student from the teacher in nats.
        """
        frozen = self._now()
        scores, indices = answers(frozen, samples, self._pipeline, Damage(0))
        assert samples.labels is not None, "validation sets are opened with labels"
        truth = samples.labels[indices]
        metrics = {"top1": top_k(scores, truth, 1), "top5": top_k(scores, truth, min(5, scores.shape[1]))}
        if reference is not None:
            scores, indices = answers(frozen, reference.samples, self._pipeline, Damage(reference.damage_budget))
            metrics["agreement"], metrics["kl"] = agreement(scores, reference.soft(indices))
        return metrics

    def _now(self) -> Frozen:
        """The network as it is now."""
        if self._frozen is None:
            self._frozen = Frozen(self._network, self._pipeline.resolution, device=self._device, threads=cores())
        else:
            self._frozen.refresh(self._network)
        return self._frozen


def evaluate(
    network: nn.Layer, samples: Samples, pipeline: Pipeline, device: str, reference: Reference | None = None
) -> dict[str, float]:
    """What an `Evaluator` says of a network that is measured once."""
    return Evaluator(network, pipeline, device)(samples, reference)


def answers(frozen: Frozen, samples: Samples, pipeline: Pipeline, damage: Damage) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, classes] of the samples that are readable, and their indices [N]."""
    logits, indices, workers = [], [], decoders(cores())
    for batch in evaluation_batches(samples, pipeline, batch_size=BATCH, workers=workers, damage=damage):
        logits.append(frozen(normalize(batch.images[0], pipeline.mean, pipeline.std)))
        indices.append(batch.indices)
    return np.concatenate(logits), np.concatenate(indices)
