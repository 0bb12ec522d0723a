"""Distances of the student's classes to the teacher's, and the cross-entropy with true labels.

Every distance takes the logits of both, float [batch, classes], of any finite size, and returns one value in nats per
sample, float [batch]. Only the student receives a gradient. Each raises DataError when the two shapes differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ssld import plugins
from ssld.errors import DataError, PluginError, RecipeError
from ssld.settings import Named

Loss = Callable[[Tensor, Tensor], Tensor]


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
    log_m = paddle.logaddexp(log_s, log_t) - math.log(2)
    terms = log_s.exp() * (log_s - log_m) + log_t.exp() * (log_t - log_m)
    return terms.sum(axis=1) / 2


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of both at the temperature, times its square, so that gradients keep their size.

    Source: Hinton, Vinyals, Dean 2015, "Distilling the knowledge in a neural network", section 2. Raises RecipeError
    unless the temperature is a positive number.
    """
    if not 0 < temperature < math.inf:
        raise RecipeError(f"loss kl: expected a temperature above 0, got {temperature}; leave it out for 1")
    log_s, log_t = _log_probabilities(student / temperature, teacher / temperature)
    return (log_t.exp() * (log_t - log_s)).sum(axis=1) * temperature**2


def ce(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the teacher's probabilities: KL(teacher || student) plus the teacher's entropy."""
    log_s, log_t = _log_probabilities(student, teacher)
    return -(log_t.exp() * log_s).sum(axis=1)


def hard_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the true classes.

    logits: float [batch, classes]; labels: int64 [batch], each in [0, classes). Returns nats, float [batch]. Raises
    DataError for any other label, also for -100, for which paddle returns a loss of 0.
    """
    samples, classes = logits.shape
    if list(labels.shape) != [samples]:
        raise DataError(f"expected one label for each of {samples} samples, got labels of shape {list(labels.shape)}")
    known = labels.numpy()
    wrong = known[(known < 0) | (known >= classes)]
    if wrong.size:
        raise DataError(
            f"expected labels from 0 to {classes - 1}, got {', '.join(map(str, wrong[:5]))} in a batch of {samples}; "
            f"the network's classes must be those of the data"
        )
    return F.cross_entropy(logits, labels, reduction="none")


def named(setting: Named) -> Loss:
    """The loss that a recipe names, a plug-in of the group ssld.losses, with its options bound; it is tried once.

    Raises RecipeError for an unknown name or a wrong option, PluginError unless it returns one value per sample.
    """
    loss = plugins.load("losses", setting.name)
    logits = paddle.zeros([2, 3])
    values = plugins.call("losses", setting.name, setting.options, {"student": logits, "teacher": logits})
    if not isinstance(values, Tensor) or list(values.shape) != [2]:
        raise PluginError(
            f"loss {setting.name!r} of {plugins.origin('losses', setting.name)}: expected one value per sample, a "
            f"tensor of shape [2] for logits [2, 3], got {values}"
        )
    return partial(loss, **setting.options)


def _log_probabilities(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise DataError(
            f"expected logits of one shape, [batch, classes], got {list(student.shape)} from the student and "
            f"{list(teacher.shape)} from the teacher; both must know the same classes"
        )
    return F.log_softmax(student, axis=1), F.log_softmax(teacher.detach(), axis=1)
