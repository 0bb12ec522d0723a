"""How good a network is on a labeled set."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing

import numpy as np
from paddle import nn

from ssld.contracts import Reference
from ssld.data.loader import Damage, evaluation_batches
from ssld.data.samples import Samples
from ssld.data.transforms import Pipeline, normalize
from ssld.errors import DataError
from ssld.metrics import compared, means, places
from ssld.threads import cores, decoders
from ssld.train.frozen import Frozen
from ssld.watch import watch

BATCH = 64


class Evaluator:
    """Measures a network that trains on: each call is about its weights of that moment. It is exported once.

    go_on(): is asked at the beginning and before every batch, and may raise to end it.
    No rank takes a step before rank 0 has evaluated, so an evaluation takes the cores of all of them.
    """

    def __init__(
        self, network: nn.Layer, pipeline: Pipeline, device: str, go_on: Callable[[], None] = lambda: None
    ) -> None:
        self._network = network
        self._pipeline = pipeline
        self._device = device
        self._go_on = go_on
        self._frozen: Frozen | None = None

    def __call__(self, samples: Samples, reference: Reference | None = None) -> dict[str, float]:
        """Top-1 and top-5 accuracy in [0, 1] over all samples, run as a frozen network.

        With a reference also `agreement`, the share of its images that student and teacher put in the same class, and
        `kl`, the mean divergence of the student from the teacher in nats.
        """
        self._go_on()
        with watch.awaiting(lambda: "the student to be exported"):
            frozen = self._now()
        truth = samples.labels
        assert truth is not None, "validation sets are opened with labels"
        with closing(answers(frozen, samples, self._pipeline, Damage(0), self._go_on)) as found:
            ahead = (places(scores, truth[indices]) for scores, indices in found)
            top1, top5 = means((before < 1, before < 5) for before in ahead)
        metrics = {"top1": top1, "top5": top5}
        if reference is not None:
            damage = Damage(reference.damage_budget)
            with closing(answers(frozen, reference.samples, self._pipeline, damage, self._go_on)) as found:
                metrics["agreement"], metrics["kl"] = means(
                    compared(scores, reference.soft(indices)) for scores, indices in found
                )
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


def answers(
    frozen: Frozen, samples: Samples, pipeline: Pipeline, damage: Damage, go_on: Callable[[], None]
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    """Batches of the samples that are readable: their logits [B, classes], and their indices [B].

    Raises DataError, with the sample, for logits that are no numbers, and what go_on() raises, asked before each batch.
    """
    workers = decoders(cores())
    batches = evaluation_batches(samples, pipeline, batch_size=BATCH, workers=workers, damage=damage)
    with closing(batches):
        for batch in batches:
            go_on()
            with watch.awaiting(lambda: f"a student's logits of {samples.name}"):
                logits = frozen(normalize(batch.images[0], pipeline.mean, pipeline.std))
            broken = np.isnan(logits).any(axis=1)
            if broken.any():
                raise DataError(
                    f"{samples.where(int(batch.indices[broken.argmax()]))}: expected numbers as logits, got NaN; the "
                    f"network's weights are damaged"
                )
            yield logits, batch.indices
