"""How good a teacher's answers are: how often right, how sure, and whether as sure as right."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ssld.contracts import Soft
from ssld.metrics import top_k
from ssld.teaching.asking import Quality, quality

BINS = 15
"""Of confidence, all of the same width, as Guo et al. use."""
HALF = 0.5


@dataclass(frozen=True)
class Appraisal:
    """What a teacher's answers to labeled images are worth.

    quality: top-1 beside chance; top5: in [0, 1]; entropy: the mean in nats; classes: how many, for its largest value.
    calibration: the expected calibration error in [0, 1], by which accuracy differs from confidence.
    """

    quality: Quality
    top5: float
    entropy: float
    classes: int
    calibration: float

    @property
    def entropy_share(self) -> float:
        """The mean entropy as a share of log(classes): 0 for a teacher that is sure, 1 for one that knows nothing."""
        return self.entropy / math.log(self.classes)

    @property
    def usable(self) -> bool:
        """Whether it is better than the best constant answer, as a run demands."""
        return self.quality.low > self.quality.chance

    @property
    def poor(self) -> bool:
        """Whether it may be shown the images in a wrong way: no better than chance, or more often wrong than right."""
        return not self.usable or self.quality.accuracy < HALF


def appraise(logits: np.ndarray, labels: np.ndarray) -> Appraisal:
    """Judge logits, float [N, classes], by the true classes, int64 [N]."""
    log_probabilities = _log_softmax(logits)
    return Appraisal(
        quality(Soft(None, logits), labels),
        top_k(logits, labels, min(5, logits.shape[1])),
        entropy(log_probabilities),
        logits.shape[1],
        calibration_error(np.exp(log_probabilities), labels),
    )


def entropy(log_probabilities: np.ndarray) -> float:
    """Mean entropy in nats of log-probabilities, float [N, classes].

    >>> round(entropy(np.log([[0.5, 0.5], [0.5, 0.5]])), 4)
    0.6931
    """
    return float(-(np.exp(log_probabilities) * log_probabilities).sum(axis=1).mean())


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance of accuracy and confidence over bins of confidence, in [0, 1].

    probabilities: float [N, classes]; labels: int64 [N]. Confidence is the largest probability; bin m of 15 holds
    ((m - 1) / 15, m / 15]. Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.

    >>> calibration_error(np.array([[0.75, 0.25], [0.75, 0.25]]), np.array([0, 1]))
    0.25
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(labels))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    result: np.ndarray = wide - np.logaddexp.reduce(wide, axis=1, keepdims=True)
    return result
