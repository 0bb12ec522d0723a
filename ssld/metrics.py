"""How often the right class is among the first k, and how sure one can be of it."""

import math

import numpy as np

from ssld.errors import DataError


def top_k(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share, in [0, 1], of samples whose label is among the k classes of the largest logits.

    logits: float [samples, classes]; labels: int [samples], each in [0, classes). Of equal logits the smaller class
    comes first, so that a network that says the same of all classes scores as if it always answered 0. Raises
    DataError for NaN, a label outside the classes, shapes that do not belong together, or no sample at all.

    >>> top_k(np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), np.array([0, 1]), k=1)
    0.5
    """
    _check(logits, labels)
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    ahead = (logits > own) | ((logits == own) & earlier)
    return float((ahead.sum(axis=1) < k).mean())


def wilson(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Interval within [0, 1] for the probability behind `correct` hits of `total`, at z standard errors (1.96: 95 %).

    Raises DataError unless 0 <= correct <= total and total > 0. Source: Wilson 1927, "Probable inference, the law of
    succession, and statistical inference".

    >>> [round(bound, 3) for bound in wilson(50, 100)]
    [0.404, 0.596]
    """
    if not (0 <= correct <= total and total > 0):
        raise DataError(f"expected 0 to {total} hits of at least one sample, got {correct} of {total}")
    share, spread = correct / total, z * z / total
    middle = share + spread / 2
    half = z * math.sqrt((share * (1 - share) + spread / 4) / total)
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def _check(logits: np.ndarray, labels: np.ndarray) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not labels.size:
        raise DataError(
            f"expected logits [samples, classes] and a label for each of at least one sample, "
            f"got logits {list(logits.shape)} and labels {list(labels.shape)}"
        )
    broken = np.isnan(logits).any(axis=1)
    if broken.any():
        raise DataError(
            f"expected numbers as logits, got NaN for {broken.sum()} of {len(logits)} samples, first for sample "
            f"{broken.argmax()}; the network's weights or its input are damaged"
        )
    wrong = labels[(labels < 0) | (labels >= logits.shape[1])]
    if wrong.size:
        raise DataError(
            f"expected labels from 0 to {logits.shape[1] - 1}, got {', '.join(map(str, wrong[:5]))}; "
            f"the network's classes must be those of the data"
        )
