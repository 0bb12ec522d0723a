"""What a changed recipe means for results that are there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssld.errors import ChangedError
from ssld.graph import Node, Plan
from ssld.journal import Journal, duration
from ssld.recipe import differences
from ssld.rundir import Options, RunDirectory, Status, brief

# what a result was made from besides the recipe's own text
BEHIND = ("data", "validation", "classes", "files", "plug-ins", "kind")


@dataclass(frozen=True)
class Old:
    """Results that must make way. before: where every stage stood; reason: why they must."""

    nodes: tuple[Node, ...]
    before: list[tuple[Node, Status]]
    reason: str

    def set_aside(self, directory: RunDirectory, journal: Journal) -> None:
        """Move them to an attempt folder, and say what that costs."""
        spent = sum(status.seconds for node, status in self.before if node in self.nodes)
        target, count = directory.set_aside(list(self.nodes))
        if count:
            journal.note(f"{self.reason}: {count} results, {duration(spent)} of work, are set aside in {target}")


def refusal(directory: Path, changed: list[Node], why: list[str]) -> ChangedError:
    """The answer to a changed recipe, with both ways on."""
    return ChangedError(
        f"{directory} holds results of another recipe or other data:\n  "
        + "\n  ".join(why)
        + f"\nssld run with --rerun does {', '.join(node.name for node in changed)} again (the old results move to "
        f"{directory}/attempt.N); with another --out it leaves them"
    )


def what_changed(directory: RunDirectory, plan: Plan, options: Options, before: list[tuple[Node, Status]]) -> list[str]:
    """What differs from the recorded run, a line each: in the recipe, the options, and what lies behind the recipe."""
    recorded, recorded_options = directory.recorded()
    lines = differences(recorded.tree.value, plan.recipe.tree.value)
    if recorded_options.limit != options.limit:
        lines.append(f"--limit: {recorded_options.limit or 'not given'} → {options.limit or 'not given'}")
    behind = [
        f"{node.name}: {line}"
        for node, status in before
        if status.kind == "changed" and status.checkpoint is not None
        for line in differences(
            *(brief({key: basis[key] for key in BEHIND}) for basis in (status.checkpoint.state["basis"], node.basis))
        )
    ]
    # after a --rerun that was killed, the recorded recipe is the new one already
    return [*lines, *behind] or [f"{node.name}: {status.why}" for node, status in before if status.kind == "changed"]
