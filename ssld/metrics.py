"""How often the right class is among the first k, how sure one can be of it, and how far student and teacher agree."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from ssld.contracts import Soft
from ssld.errors import DataError


def places(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the label of each sample, int64 [samples]; 0 where it is the answer.

    logits: float [samples, classes]; labels: int [samples], each in [0, classes). The largest logit comes first, and of
    equal ones the smaller class, so that a network that says the same of all classes counts as if it always answered 0.
    Raises DataError for NaN, a label outside the classes, shapes that do not belong together, or no sample at all.

    >>> places(np.array([[3.0, 2.0, 1.0], [3.0, 3.0, 3.0]]), np.array([1, 2])).tolist()
    [1, 2]
    """
    _check(logits, labels)
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    ahead = (logits > own) | ((logits == own) & earlier)
    found: np.ndarray = ahead.sum(axis=1)
    return found


def top_k(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share, in [0, 1], of samples whose label is among the first k classes, as `places` counts them.

    >>> top_k(np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), np.array([0, 1]), k=1)
    0.5
    """
    return float((places(logits, labels) < k).mean())


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


def best_class(soft: Soft) -> np.ndarray:
    """The most probable class by soft labels, int64 [samples]; the smaller one of equal ones.

    Where some classes are kept only, the rest of the classes does not count, however large its sum.
    """
    if soft.ids is None:
        return soft.logits.argmax(axis=1)
    best = soft.logits[:, :-1].argmax(axis=1)
    return np.take_along_axis(soft.ids, best[:, None], axis=1)[:, 0]


def agreement(logits: np.ndarray, soft: Soft) -> tuple[float, float]:
    """How often, in [0, 1], student and teacher answer the same, and the mean KL(teacher || student) in nats.

    Of each sample as `compared` says.
    """
    same, divergence = compared(logits, soft)
    return float(same.mean()), float(divergence.mean())


def compared(logits: np.ndarray, soft: Soft) -> tuple[np.ndarray, np.ndarray]:
    """Whether student and teacher answer the same, bool [samples], and KL(teacher || student), float64 [samples].

    logits: the student's, float [samples, classes]. Classes that the soft labels do not keep count as one.
    """
    student = _log_softmax(logits.astype(np.float64) / soft.temperature)
    teacher = _log_softmax(soft.logits.astype(np.float64) / soft.temperature)
    if soft.ids is not None:
        others = student.copy()
        np.put_along_axis(others, soft.ids, -np.inf, axis=1)
        rest = np.logaddexp.reduce(others, axis=1)
        student = np.column_stack([np.take_along_axis(student, soft.ids, axis=1), rest])
    divergence: np.ndarray = (np.exp(teacher) * (teacher - student)).sum(axis=1)
    return logits.argmax(axis=1) == best_class(soft), divergence


def means(batches: Iterable[Sequence[np.ndarray]]) -> list[float]:
    """The mean of each of some values over all samples, which come in batches: arrays [samples of the batch].

    Raises DataError where there is no sample at all.

    >>> means([(np.array([True, False]), np.array([1, 2])), (np.array([False]), np.array([6]))])
    [0.3333333333333333, 3.0]
    """
    total: np.ndarray = np.zeros(1)
    samples = 0
    for batch in batches:
        total = total + np.sum(batch, axis=1, dtype=np.float64)
        samples += len(batch[0])
    if not samples:
        raise DataError("expected at least one sample to take a mean of, got none")
    found: list[float] = (total / samples).tolist()
    return found


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    result: np.ndarray = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return result


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
