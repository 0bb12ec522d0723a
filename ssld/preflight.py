"""Before anything is spent: everything that a run will need is tried once."""

from __future__ import annotations

from collections.abc import Sequence

from ssld.graph import Node
from ssld.inputs import Inputs
from ssld.journal import Journal
from ssld.train import losses, networks


def preflight(nodes: Sequence[Node], inputs: Inputs, journal: Journal) -> None:
    """Try the device, and for each stage its network, loss, weights file, and teacher where it is there already.

    Raises what the first of them raises: RecipeError, PluginError, CheckpointError, TeacherError or DataError.
    """
    networks.use_device(inputs.options.device)
    for node in nodes:
        settings = node.settings
        network = networks.build(settings.student.name, settings.student.options, len(inputs.plan.data.classes))
        if settings.start is not None and settings.start not in settings.inputs:
            weights = inputs.initial(node, journal)
            assert weights is not None, "the stage names a file"
            networks.load(network, weights, networks.start_of(node.name, settings))
        if loss := getattr(settings, "loss", None):
            losses.named(loss)
        # a stage that is still to run cannot be asked yet
        if settings.taught_by is not None and settings.taught_by.stage not in {other.name for other in nodes}:
            inputs.teacher(node, journal)
