"""Distances of the student's classes to the teacher's, and the cross-entropy with true labels.

Every distance takes the logits of both, float [batch, classes], of any finite size, and returns one value in nats per
sample, float [batch]. Only the student receives a gradient. Each raises DataError when the two shapes differ.

Soft labels that hold only K classes of each sample are a coarser classification, of these K and one bucket with all
others: `bucketed` brings the student's logits to it, so that every distance takes them like any other classes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.autograd import PyLayer

from ssld import plugins
from ssld.contracts import Soft
from ssld.errors import DataError, PluginError, RecipeError
from ssld.settings import Named

Loss = Callable[[Tensor, Soft], Tensor]


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


def bucketed(student: Tensor, soft: Soft) -> Tensor:
    """The student's logits for the K classes of the soft labels and, in the last column, for all others together.

    student: float [B, C]. Returns float [B, K + 1], whose softmax(· / soft.temperature) are the student's probabilities
    at that temperature, those outside the K summed; where the labels hold all classes, the student's logits as they
    are. Raises DataError unless each sample has K < C different classes of the C.

    >>> student = paddle.to_tensor([[3.0, 1.0, 1.0, 1.0]]).log()
    >>> bucketed(student, Soft(np.array([[0]]), np.zeros([1, 2], np.float32))).exp().numpy()
    array([[3., 3.]], dtype=float32)
    """
    if soft.ids is None:
        return student
    _check_ids(soft.ids, *student.shape)
    return _Bucketed.apply(student, soft.ids, soft.temperature)  # type: ignore[no-untyped-call]


class _Bucketed(PyLayer):
    """[B, C] to [B, K + 1]. Beside the logits and their gradient it needs one copy of them, for the time of `forward`.

    paddle's own operators would keep such copies until the backward pass, and make more of them there. As with every
    PyLayer of paddle 3.3.1, a second backward pass over a retained graph ends the process.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, classes: np.ndarray, temperature: float) -> Tensor:
        ids = paddle.to_tensor(classes)
        # the sum is over the others only: 1 minus the sum of the K leaves nothing where the student is sure of them
        nothing = paddle.full(ids.shape, -math.inf, student.dtype)
        others = paddle.put_along_axis(student, ids, nothing, axis=1)
        highest = others.max(axis=1, keepdim=True)
        shares = _exponentials(others.subtract_(highest), temperature)
        rest = highest + temperature * shares.sum(axis=1, keepdim=True).log()
        ctx.temperature = temperature
        ctx.save_for_backward(student, ids, rest)
        # broadcasting, the default, would copy the logits
        kept = paddle.take_along_axis(student, ids, axis=1, broadcast=False)
        return paddle.concat([kept, rest], axis=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        student, ids, rest = ctx.saved_tensor()
        kept, bucket = gradients[0][:, :-1], gradients[0][:, -1:]
        # each other class gets the bucket's gradient by its share in it; what this leaves at the K is overwritten
        shares = _exponentials(paddle.subtract(student, rest), ctx.temperature)
        return shares.multiply_(bucket).put_along_axis_(ids, kept, axis=1)


def _exponentials(differences: Tensor, temperature: float) -> Tensor:
    """exp(differences / temperature), written over the differences."""
    return differences.scale_(1 / temperature).exp_()  # type: ignore[no-untyped-call]


def named(setting: Named, temperature: float | None = None) -> Loss:
    """The loss that a recipe names, a plug-in of the group ssld.losses, with its options bound; it is tried once.

    It takes the student's logits, float [B, C], and their soft labels, of all classes or of K. temperature: at which
    those of K classes will have been made, where there will be some. Raises RecipeError for an unknown name or a wrong
    option, PluginError unless it returns one value per sample. Labels of K classes that were made at another
    temperature than the loss's own are a RecipeError, here and when it is called.
    """
    distance = partial(plugins.load("losses", setting.name), **setting.options)
    # all classes, then one class and the bucket of the others
    for classes in (3, 2):
        _try(setting, paddle.zeros([2, classes]))
    own = _temperature(distance)

    def loss(student: Tensor, soft: Soft) -> Tensor:
        if soft.ids is not None and soft.temperature != own:
            classes = student.shape[1]
            raise RecipeError(
                f"loss {setting.name}: expected soft labels made at its temperature, {own}, got "
                f"{soft.temperature}, and {soft.ids.shape[1]} of {classes} classes; make the two temperatures equal, "
                f"keep all classes by top_k: {classes}, or write labels: online"
            )
        return distance(bucketed(student, soft), paddle.to_tensor(soft.logits, dtype=student.dtype))

    if temperature is not None:
        loss(paddle.zeros([2, 3]), Soft(np.zeros((2, 1), np.int64), np.zeros((2, 2), np.float32), temperature))
    return loss


def _try(setting: Named, logits: Tensor) -> None:
    values = plugins.call("losses", setting.name, setting.options, {"student": logits, "teacher": logits})
    samples = logits.shape[0]
    if not isinstance(values, Tensor) or list(values.shape) != [samples]:
        raise PluginError(
            f"loss {setting.name!r} of {plugins.origin('losses', setting.name)}: expected one value per sample, a "
            f"tensor of shape [{samples}] for logits {list(logits.shape)}, got {values}"
        )


def _temperature(distance: partial[Tensor]) -> Any:
    """What the loss divides logits by: its option of that name, or that option's default; 1 where it has none."""
    option = inspect.signature(distance).parameters.get("temperature")
    return distance.keywords.get("temperature", 1.0 if option is None else option.default)


def _check_ids(ids: np.ndarray, samples: int, classes: int) -> None:
    # paddle counts a negative class from the end, and of a class that comes twice it keeps one gradient
    in_order = np.sort(ids, axis=1)
    if (
        len(ids) != samples
        or not 0 < ids.shape[1] < classes
        or in_order[:, 0].min() < 0
        or in_order[:, -1].max() >= classes
        or (np.diff(in_order) == 0).any()
    ):
        raise DataError(
            f"expected soft labels of some of the classes 0 to {classes - 1}, each once, for {samples} samples, got "
            f"classes of shape {list(ids.shape)} from {ids.min(initial=0)} to {ids.max(initial=0)}; data, labels and "
            f"network must have the same classes"
        )


def _log_probabilities(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise DataError(
            f"expected logits of one shape, [batch, classes], got {list(student.shape)} from the student and "
            f"{list(teacher.shape)} from the teacher; both must know the same classes"
        )
    return _log_softmax(student), _log_softmax(teacher.detach())


def _log_softmax(logits: Tensor) -> Tensor:
    # paddle 3.3.1 takes time that grows with the square of the classes on a CPU: 13 s for [256, 21841], this 0.05 s
    below = logits - logits.detach().max(axis=1, keepdim=True)
    return below - below.exp().sum(axis=1, keepdim=True).log()
