"""Distances of the student's classes to the teacher's: the losses of the group ssld.losses that come with ssld.

Every distance takes the logits of both, float [batch, classes], of any finite size, and returns one value in nats per
image, float [batch]; `dist` alone is a difference of correlations. Only the student receives a gradient. Each raises
DataError when the two shapes differ.

Where soft labels hold K of C classes, the logits are those of a coarser classification, of these K and one bucket with
all others; `bucket` says so to a distance that has such a parameter. Each says what the bucket does to it. What is true
of all: a divergence of the coarser classes is at most that of all (no sum over classes can grow by adding some up,
Cover and Thomas 2006, section 2.7); it is equal where student and teacher agree on the shares within the rest, and all
others of a bucket are pushed together, each by its share. Probabilities of the K are exact.

The module is readable without paddle, so that the plan knows what each loss needs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ssld.errors import DataError
from ssld.needs import Needs, declares

if TYPE_CHECKING:
    from ssld.train.feed import Tensor

Temperature = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0)]
Says = Literal["teacher", "labels"]
"""Who says which class is the right one: the teacher by its most probable class, so that no label is read, or they."""


def js(student: Tensor, teacher: Tensor) -> Tensor:
    """(KL(teacher || student) + KL(student || teacher)) / 2, at least 0 and without an upper bound.

    The loss of SSLD. PaddleClas calls it "JS" (ppcls/loss/dmlloss.py), but it is half of Jeffreys' symmetric
    divergence; the Jensen-Shannon divergence is `true_js`. PaddleClas adds 1e-12 to every probability before the
    logarithm, which caps a term at 27.6 nats; here the log-softmax needs no such constant.
    """
    log_s, log_t = _log_probabilities(student, teacher)
    return ((log_t.exp() - log_s.exp()) * (log_t - log_s)).sum(axis=1) / 2


def true_js(student: Tensor, teacher: Tensor) -> Tensor:
    """Jensen-Shannon divergence, within [0, log 2].

    Source: Lin 1991, "Divergence measures based on the Shannon entropy", with equal weights.
    """
    log_s, log_t = _log_probabilities(student, teacher)
    log_m = log_s.logaddexp(log_t) - math.log(2)
    terms = log_s.exp() * (log_s - log_m) + log_t.exp() * (log_t - log_m)
    return terms.sum(axis=1) / 2


def kl(student: Tensor, teacher: Tensor, temperature: Temperature = 1.0) -> Tensor:
    """KL(teacher || student) of both at the temperature, times its square, so that gradients keep their size.

    Source: Hinton, Vinyals, Dean 2015, "Distilling the knowledge in a neural network", section 2.
    """
    log_s, log_t = _log_probabilities(student / temperature, teacher / temperature)
    return _divergence(log_s, log_t) * temperature**2


def ce(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the teacher's probabilities: KL(teacher || student) plus the teacher's entropy.

    With a bucket it is the divergence that is at most that of all classes; the entropy is that of the coarser ones.
    """
    log_s, log_t = _log_probabilities(student, teacher)
    return -(log_t.exp() * log_s).sum(axis=1)


@declares(lambda options: Needs(dense=options["target"] == "labels", labels=options["target"] == "labels"))
def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    bucket: bool = False,
    *,
    temperature: Temperature = 1.0,
    alpha: Share = 1.0,
    beta: Share = 1.0,
    target: Says = "teacher",
) -> Tensor:
    """temperature² * (alpha * KL of the target against all others + beta * KL among those others).

    KL(teacher || student) weighs the second part with the teacher's probability of all others, so that it says little
    where the teacher is sure. Source: Zhao et al. 2022, "Decoupled knowledge distillation", section 3.3; the defaults
    are PaddleClas's. labels: int64 [batch], for target "labels", as in the paper.

    With a bucket, the first part is exact, since the teacher's most probable class is among the K; the second is at
    most that of all classes, and nothing where K is 1. Labels may name a class of the bucket, so they need all classes.
    """
    _check_shapes(student, teacher)
    column = _right_class(target, labels, teacher, bucket)
    s, t = (_against_others(logits / temperature, column) for logits in (student, teacher.detach()))
    odds_s, odds_t = (relative.take_along_axis(column, axis=1).squeeze(1) for relative in (s, t))
    of_target = sum(
        _log_sigmoid(sign * odds_t).exp() * (_log_sigmoid(sign * odds_t) - _log_sigmoid(sign * odds_s))
        for sign in (1, -1)
    )
    of_others = (_without(t, column).exp() * (t - s)).sum(axis=1)
    return (alpha * of_target + beta * of_others) * temperature**2


@declares(Needs(dense=True))
def dist(student: Tensor, teacher: Tensor, beta: Share = 1.0, gamma: Share = 1.0) -> Tensor:
    """beta * (1 - correlation between classes) + gamma * (1 - correlation within classes), each part within [0, 2].

    Of probabilities: an image's over its classes, then a class's over the images of the batch, as a mean over all
    classes that is the same for every image. Pearson's coefficient asks for the teacher's order and proportions, not
    for its values. Source: Huang et al. 2022, "Knowledge distillation from a stronger teacher", section 4; the
    defaults are PaddleClas's, and so is 1e-8 beside the product of both deviations. Here it tempers the whole
    difference to 1, so that a class that hardly varies within the batch counts little, and a student that equals its
    teacher is pushed nowhere; there the coefficient alone, which counts such a class as unrelated.

    Of a bucket neither makes sense: a column would be another class in every image, and a mean over K + 1 is none over
    C. Of a batch that several ranks share, each relates its own images, so that N ranks relate as a batch of an N-th.
    """
    log_s, log_t = _log_probabilities(student, teacher)
    s, t = log_s.exp(), log_t.exp()
    distance = beta * _unlikeness(s, t, axis=1)
    return distance + gamma * _unlikeness(s, t, axis=0).mean() if gamma else distance


@declares(
    lambda options: Needs(
        dense=options["target"] == "labels" or options["temperature"] != 1, labels=options["target"] == "labels"
    )
)
def wsl(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    bucket: bool = False,
    *,
    temperature: Temperature = 2.0,
    target: Says = "teacher",
) -> Tensor:
    """Cross-entropy with the teacher at the temperature, times its square, weighted image by image.

    The weight is 1 - exp(-hard loss of the student / hard loss of the teacher), both of the target at temperature 1:
    little where the student does better than its teacher. It takes no part in the gradient. Source: Zhou et al. 2021,
    "Rethinking soft labels for knowledge distillation: a bias-variance tradeoff perspective"; the default is
    PaddleClas's. A teacher's hard loss below 1e-7, which float32 cannot tell from 0, counts as that.

    With a bucket, at temperature 1 alone, the weight is exact, and the cross-entropy that of the coarser classes. At
    another temperature the labels do not tell the probabilities that the weight is made of, so it needs all classes.
    """
    log_s, log_t = _log_probabilities(student, teacher)
    column = _right_class(target, labels, teacher, bucket)
    hard_s, hard_t = (-log.detach().take_along_axis(column, axis=1).squeeze(1) for log in (log_s, log_t))
    weight = -(-hard_s / hard_t.clip(min=1e-7)).expm1()
    warm_s, warm_t = _log_probabilities(student / temperature, teacher / temperature)
    return -weight * (warm_t.exp() * warm_s).sum(axis=1) * temperature**2


def _divergence(log_s: Tensor, log_t: Tensor) -> Tensor:
    """KL(t || s) of each row."""
    return (log_t.exp() * (log_t - log_s)).sum(axis=1)


def _unlikeness(first: Tensor, second: Tensor, axis: int) -> Tensor:
    """1 - Pearson's coefficient along an axis; 0 where one of the two does not vary."""
    first, second = (values - values.mean(axis=axis, keepdim=True) for values in (first, second))
    # the root of 0 has no slope
    sizes = [((values * values).sum(axis=axis) + 1e-24).sqrt() for values in (first, second)]
    most = sizes[0] * sizes[1]
    return (most - (first * second).sum(axis=axis)) / (most + 1e-8)


def _right_class(says: Says, labels: Tensor | None, teacher: Tensor, bucket: bool) -> Tensor:
    """The column of each row's right class, int64 [B, 1]; a bucket is no class, whatever it holds."""
    if says == "teacher":
        return (teacher[:, :-1] if bucket else teacher).argmax(axis=1, keepdim=True)
    if labels is None:
        raise DataError("expected the true classes for target: labels, got none; let the teacher say the class")
    return labels.unsqueeze(1)


def _against_others(logits: Tensor, column: Tensor) -> Tensor:
    """Logits less the logsumexp of all but one column: that one's log odds, and the others' shares among themselves."""
    others = _without(logits, column)
    highest = others.detach().max(axis=1, keepdim=True)
    return logits - highest - (others - highest).exp().sum(axis=1, keepdim=True).log()


def _without(logits: Tensor, column: Tensor) -> Tensor:
    return logits.put_along_axis(column, logits.new_full(column.shape, -math.inf), axis=1)


def _log_sigmoid(odds: Tensor) -> Tensor:
    # in two parts that are even and odd, so that their slopes at 0 add up to 1/2
    size = odds.abs()
    return (odds - size) / 2 - (-size).exp().log1p()


def _log_probabilities(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    _check_shapes(student, teacher)
    return _log_softmax(student), _log_softmax(teacher.detach())


def _check_shapes(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise DataError(
            f"expected logits of one shape, [batch, classes], got {list(student.shape)} from the student and "
            f"{list(teacher.shape)} from the teacher; both must know the same classes"
        )


def _log_softmax(logits: Tensor) -> Tensor:
    # paddle 3.3.1 takes time that grows with the square of the classes on a CPU: 13 s for [256, 21841], this 0.05 s
    below = logits - logits.detach().max(axis=1, keepdim=True)
    return below - below.exp().sum(axis=1, keepdim=True).log()
