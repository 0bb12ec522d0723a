"""Before anything is spent: everything that a run will need is tried once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ssld.errors import RecipeError
from ssld.files import writable
from ssld.graph import Node, place_of
from ssld.inputs import Inputs
from ssld.recipe import Recipe
from ssld.train import compiling, losses, networks


def preflight(nodes: Sequence[Node], inputs: Inputs) -> None:
    """Try the device, and for each stage its network, loss, weights file, and teachers where they are there already.

    Raises what the first of them raises: RecipeError, PluginError, CheckpointError, TeacherError or DataError.
    """
    plan, run = inputs.members.plan, inputs.members.run
    networks.use_device(inputs.members.options.device)
    for node in nodes:
        settings = node.settings
        with placed(plan.recipe, node, "student"):
            network = networks.build(settings.student.name, settings.student.options, len(plan.data.classes))
        compiling.prepare(network, inputs.journal.note)
        if settings.start is not None and settings.start not in settings.inputs:
            weights = inputs.initial(node)
            assert weights is not None, "the stage names a file"
            networks.load(network, networks.completed(weights, network), networks.start_of(node.name, settings))
        if settings.losses:
            with placed(plan.recipe, node, "loss"):
                losses.weighted(settings.losses)
        if settings.taught_by:
            writable(run.labels(node))
        # a stage that is still to run cannot be asked yet
        if not set(settings.teacher_stages) & {other.name for other in nodes}:
            inputs.soft.check(node)


@contextmanager
def placed(recipe: Recipe, node: Node, field: str) -> Iterator[None]:
    """What a plug-in says of its options is raised with the place of the key that names it."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{place_of(recipe, node.name, field)}: {error}") from error
