"""What a step minimizes: the weighted sum of the distances that a recipe names, and the cross-entropy with true labels.

Soft labels that hold only K classes of each sample are a coarser classification, of these K and one bucket with all
others: `bucketed` brings the student's logits to it, so that every distance takes them like any other classes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.autograd import PyLayer

from ssld import plugins
from ssld.contracts import Soft
from ssld.errors import DataError, PluginError, RecipeError
from ssld.needs import Needs, needs_of
from ssld.settings import Named, Term
from ssld.train.feed import Target

GIVEN = {"student", "teacher", "labels", "bucket"}
"""What a loss may take beside its options: the logits of both, true classes, and whether there is a bucket."""
TRIED = ((3, False), (2, True))
"""Columns of the logits on which a loss is tried: all classes, then one class and the bucket of the others."""


class Loss(Protocol):
    """What a loss becomes when its options are bound."""

    def __call__(self, student: Tensor, soft: Soft, labels: Tensor | None = None) -> Tensor:
        """One value per sample, float [B]. student: logits, float [B, C]; labels: int64 [B], where it needs them."""
        ...


def hard_ce(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the true classes, of which the share `smoothing` is spread evenly over all classes.

    logits: float [batch, classes]; labels: int64 [batch], each in [0, classes). Returns nats, float [batch]. Raises
    DataError for any other label, also for -100, for which paddle returns a loss of 0. Source of the smoothing:
    Szegedy et al. 2016, "Rethinking the Inception architecture for computer vision", section 7.
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
    loss = F.cross_entropy(logits, labels, reduction="none")
    if not smoothing:
        return loss
    # that of another class differs by the logits alone
    own = paddle.take_along_axis(logits, labels.unsqueeze(1), axis=1).squeeze(1)
    return loss + smoothing * (own - logits.mean(axis=1))


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


def objective(terms: Sequence[Term]) -> Callable[[Tensor, Target], Tensor]:
    """What a stage minimizes where its teacher alone teaches: from logits and a target to one value for each image."""
    loss = weighted(terms)
    labels = any(needs_of(term).labels for term in terms)
    return lambda logits, target: loss(logits, target.soft, target.labels if labels else None)


def named(setting: Named) -> Loss:
    """The loss that a recipe names, whatever its weight; otherwise as `weighted`."""
    return weighted([Term(name=setting.name, **setting.options)])


def weighted(terms: Sequence[Term]) -> Loss:
    """The sum of the losses that a recipe names, plug-ins of the group ssld.losses, each tried once.

    It takes the student's logits, float [B, C], and their soft labels, of all classes or of K. Raises RecipeError for
    an unknown name or a wrong option, PluginError for one that does not return one value per sample. What the plan
    refuses of labels of K classes (ssld.needs.check) is a RecipeError when the loss is called.
    """
    bound = [(term, _bound(term), needs_of(term)) for term in terms]

    def loss(student: Tensor, soft: Soft, labels: Tensor | None = None) -> Tensor:
        for term, _, needs in bound:
            _check_kept(term, needs, soft, student.shape[1])
        given = {"teacher": paddle.to_tensor(soft.logits, dtype=student.dtype), "bucket": soft.ids is not None}
        given |= {"student": bucketed(student, soft), "labels": labels}
        parts = [term.weight * distance(given) for term, distance, _ in bound]
        return sum(parts[1:], parts[0])

    return loss


def _bound(term: Term) -> Callable[[dict[str, Any]], Tensor]:
    """A loss with its options, which takes of the values that it is given those for which it has a parameter."""
    if taken := GIVEN & term.options.keys():
        raise RecipeError(
            f"loss {term.name}: expected options of its own, got {', '.join(sorted(taken))}, which the stage gives it; "
            f"take it out"
        )
    for columns, bucket in TRIED:
        _try(term, paddle.zeros([2, columns]), bucket)
    distance = plugins.load("losses", term.name)
    wanted = GIVEN & inspect.signature(distance).parameters.keys()
    return lambda given: distance(**{key: given[key] for key in wanted}, **term.options)


def _try(term: Term, logits: Tensor, bucket: bool) -> None:
    samples = logits.shape[0]
    given = {"student": logits, "teacher": logits, "labels": paddle.zeros([samples], "int64"), "bucket": bucket}
    values = plugins.call("losses", term.name, term.options, given)
    if not isinstance(values, Tensor) or list(values.shape) != [samples]:
        raise PluginError(
            f"loss {term.name!r} of {plugins.origin('losses', term.name)}: expected one value per sample, a "
            f"tensor of shape [{samples}] for logits {list(logits.shape)}, got {values}"
        )


def _check_kept(term: Term, needs: Needs, soft: Soft, classes: int) -> None:
    if soft.ids is None:
        return
    kept = f"{soft.ids.shape[1]} of {classes} classes"
    ways_on = f"keep all classes by top_k: {classes}, or write labels: online"
    if needs.dense:
        raise RecipeError(f"loss {term.name}: expected soft labels of all classes, got {kept}; {ways_on}")
    if soft.temperature != needs.temperature:
        raise RecipeError(
            f"loss {term.name}: expected soft labels made at its temperature, {needs.temperature}, got "
            f"{soft.temperature}, and {kept}; make the two temperatures equal, {ways_on}"
        )


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
