"""Several teachers as one: the weighted mean of their probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssld.contracts import Soft


def average(parts: Sequence[tuple[Soft, float]], classes: int) -> Soft:
    """The mean of the teachers' probabilities by weight: as many classes as the first names, and the rest.

    parts: soft labels of the same batch at the same temperature, and weights above 0, of any sum. A class that one
    teacher names and another does not is given its even share of that other's rest. The most probable class comes
    first; ties go to the smaller class.
    """
    if len(parts) == 1:
        return parts[0][0]
    temperature = parts[0][0].temperature
    total = sum(weight for _, weight in parts)
    weights = [weight / total for _, weight in parts]
    if parts[0][0].ids is None:
        mean = np.sum([weight * _probabilities(soft) for weight, (soft, _) in zip(weights, parts, strict=True)], axis=0)
        return Soft(None, _logits(mean, temperature), temperature)
    ids, kept, rest = _merged([soft for soft, _ in parts], weights, classes)
    return Soft(ids, _logits(np.column_stack([kept, rest]), temperature), temperature)


def _probabilities(soft: Soft) -> np.ndarray:
    scaled = soft.logits.astype(np.float64) / soft.temperature
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    result: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return result


def _logits(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    result: np.ndarray = temperature * np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
    return result.astype(np.float32)


def _merged(softs: Sequence[Soft], weights: Sequence[float], classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class ids [B, K], their mean probabilities [B, K], and those of the rest [B]."""
    named = [soft.ids for soft in softs if soft.ids is not None]
    ids = np.concatenate(named, axis=1)
    seen = np.tril(ids[:, :, None] == ids[:, None, :], -1).any(axis=2)
    mean, unnamed = np.zeros(ids.shape), np.zeros(len(ids))
    for own, soft, weight in zip(named, softs, weights, strict=True):
        probabilities = _probabilities(soft)
        same = ids[:, :, None] == own[:, None, :]
        share = probabilities[:, -1:] / (classes - own.shape[1])
        mean += weight * np.where(same.any(axis=2), (same * probabilities[:, None, :-1]).sum(axis=2), share)
        unnamed += weight * share[:, 0] * (classes - (~seen).sum(axis=1))
    order = np.lexsort((ids, np.where(seen, 1.0, -mean)), axis=1)
    sorted_mean = np.take_along_axis(np.where(seen, 0.0, mean), order, axis=1)
    kept, dropped = np.split(sorted_mean, [named[0].shape[1]], axis=1)
    # the rest is summed by itself: near p = 1, the difference to 1 would be rounding alone
    return np.take_along_axis(ids, order, axis=1)[:, : kept.shape[1]], kept, unnamed + dropped.sum(axis=1)
