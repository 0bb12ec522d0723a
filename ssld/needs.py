"""What a loss has to be fed, as it declares it, and whether a stage can feed it: the plan knows this without paddle."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ssld import plugins
from ssld.errors import PluginError
from ssld.settings import Named, Stored, Term, TrainingSettings

L = TypeVar("L", bound=Callable[..., Any])


@dataclass(frozen=True)
class Needs:
    """What a loss has to be given beside the student's logits and the teacher's of some classes and the rest.

    dense: the teacher's logits of all classes; labels: the true classes, int64 [B], as its parameter `labels`.
    temperature: at which labels of some classes must have been made; its option of that name says so, and no other.
    """

    dense: bool = False
    labels: bool = False
    temperature: float = 1.0


Declared = Needs | Callable[[Mapping[str, Any]], Needs]


def declares(needs: Declared) -> Callable[[L], L]:
    """Declare what a loss needs; where that depends on its options, as a function of them, defaults filled in.

    A loss that declares nothing is content with the logits of both, of all classes or of K and the rest. Its module
    should be readable without paddle, since the plan reads it.
    """

    def mark(loss: L) -> L:
        loss.needs = needs  # type: ignore[attr-defined]
        return loss

    return mark


def needs_of(setting: Named) -> Needs:
    """What the loss of that name declares, with these options. Raises PluginError where it has no answer."""
    loss = plugins.load("losses", setting.name)
    try:
        options = defaults(loss) | setting.options
        declared = getattr(loss, "needs", Needs())
        found = declared(options) if callable(declared) else declared
        warm = options.get("temperature", 1.0)
        # what is no number is refused with all other wrong options, when the loss is tried
        return replace(found, temperature=warm if isinstance(warm, int | float) else 1.0)
    except Exception as error:
        raise PluginError(
            f"loss {setting.name!r} of package {plugins.origin('losses', setting.name)} cannot say what it needs: "
            f"{type(error).__name__}: {error}; correct its options, or repair it"
        ) from error


def defaults(loss: Callable[..., Any]) -> dict[str, Any]:
    """The options that a recipe may leave out, as the loss has them then."""
    parameters = inspect.signature(loss).parameters.values()
    return {found.name: found.default for found in parameters if found.default is not inspect.Parameter.empty}


def temperature(settings: TrainingSettings) -> float:
    """At which the teachers of a stage are averaged: that of its losses, 1 where there is none."""
    return needs_of(settings.losses[0]).temperature if settings.losses else 1.0


def check(settings: TrainingSettings, classes: int) -> None:
    """Raise ValueError where a stage cannot feed one of its losses, with what could. classes: of the data."""
    if not settings.taught_by:
        return
    for term in settings.losses:
        needs = needs_of(term)
        if needs.labels and not settings.needs_labels:
            raise ValueError(
                f"loss {term.name}: expected a stage that reads labels, got {settings.kind}, which reads none; let the "
                f"teacher say the class, or learn from labels in a stage of kind finetune"
            )
        if settings.stored is not None and settings.stored.top_k < classes:
            _check_kept(term, needs, settings.stored, classes)
    _check_average(settings)


def _check_kept(term: Term, needs: Needs, kept: Stored, classes: int) -> None:
    """Of labels of K < C classes."""
    ways_on = f"keep all classes by top_k: {classes}, or write labels: online"
    if needs.dense:
        raise ValueError(
            f"loss {term.name}: expected soft labels of all {classes} classes, got labels.top_k: {kept.top_k}; "
            f"{ways_on}"
        )
    if needs.temperature != kept.temperature:
        raise ValueError(
            f"loss {term.name}: expected soft labels of its temperature, {needs.temperature:g}, got "
            f"labels.temperature: {kept.temperature:g} and {kept.top_k} of {classes} classes; make them equal, "
            f"{ways_on}"
        )


def _check_average(settings: TrainingSettings) -> None:
    """Teachers that are asked in every step are averaged once, at one temperature."""
    wanted = [needs_of(term).temperature for term in settings.losses]
    if settings.stored is None and len(settings.taught_by) > 1 and len(set(wanted)) > 1:
        got = ", ".join(f"{value:g} of {term.name}" for value, term in zip(wanted, settings.losses, strict=True))
        raise ValueError(
            f"expected losses of one temperature, at which {len(settings.taught_by)} teachers are averaged, got {got}; "
            f"make them equal, or name one teacher"
        )
