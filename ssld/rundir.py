"""A run directory: where each result lies, what is finished, and why a stage must run again.

RUN/recipe.yaml      the merged recipe
RUN/run.json         the options of the command
RUN/run.lock         held by the process that works here
RUN/train.log  RUN/metrics.jsonl
RUN/distill/step-00001234/    checkpoints of the stage `distill`, with links `latest` and `best`
RUN/attempt.1/distill/        results that a later attempt set aside; no stage has a dot in its name
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ssld import checkpoint, recipe
from ssld.contracts import Model, State
from ssld.data.transforms import Pipeline
from ssld.errors import CheckpointError
from ssld.files import write_atomic
from ssld.graph import Node


@dataclass(frozen=True)
class Options:
    """What the command line adds to a recipe; kept, so that a resumed run goes on with the same."""

    device: str = "cpu"
    limit: int | None = None
    trust_teacher: bool = False


@dataclass(frozen=True)
class Status:
    """Where one stage of a plan stands: "done", "resume", "changed" or "new", and why."""

    kind: str
    why: str
    checkpoint: checkpoint.Checkpoint | None = None

    @property
    def short(self) -> str:
        """The state in one word."""
        return {"done": "finished", "resume": "stopped", "changed": "changed", "new": "to do"}[self.kind]

    @property
    def action(self) -> str:
        """What `ssld run` does about it."""
        return {"done": "skip", "resume": "go on", "changed": "run again", "new": "run"}[self.kind]

    @property
    def metrics(self) -> Mapping[str, float]:
        return self.checkpoint.state["facts"]["metrics"] if self.checkpoint else {}

    @property
    def seconds(self) -> float:
        return self.checkpoint.state["facts"]["seconds"] if self.checkpoint else 0.0


class RunDirectory:
    """Reads and writes one run's files. Writing needs the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        return (self.path / "recipe.yaml").is_file()

    def begin(self, text: str, options: Options) -> None:
        """Record the recipe and the options."""
        write_atomic(self.path / "run.json", (json.dumps(asdict(options), indent=1) + "\n").encode())
        write_atomic(self.path / "recipe.yaml", text.encode())

    def recorded(self) -> tuple[recipe.Recipe, Options]:
        """The recipe and options with which this run began."""
        try:
            options = Options(**json.loads((self.path / "run.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self.path / 'run.json'}: expected the options of the run, got {error}; start it again with ssld run"
            ) from error
        return recipe.read_recipe(self.path / "recipe.yaml"), options

    def stage(self, node: Node) -> Path:
        return self.path / node.name

    def status(self, node: Node, report: Callable[[str], None]) -> Status:
        """Compare what is on disk with what the plan wants. Damaged checkpoints are named through report."""
        found = checkpoint.latest(self.stage(node), report) if self.stage(node).is_dir() else None
        if found is None:
            return Status("new", "not run yet")
        if found.state["fingerprint"] != node.fingerprint:
            return Status("changed", "; ".join(recipe.differences(found.state["basis"], node.basis)), found)
        if found.state["finished"]:
            return Status("done", "finished", found)
        return Status("resume", f"stopped after step {found.step} of {node.steps}", found)

    def save(self, node: Node, model: Model, state: State, *, finished: bool) -> None:
        """Commit a checkpoint, move the links, remove what the retention rule does not keep."""
        root = self.stage(node)
        facts = dict(state.facts)
        checkpoint.save(
            root,
            state.step,
            {"student": state.weights, "optimizer": state.optimizer},
            {
                "stage": node.name,
                "fingerprint": node.fingerprint,
                "basis": node.basis,
                "finished": finished,
                "facts": facts,
                "model": model_to_json(model),
                "environment": environment(),
            },
        )
        checkpoint.point(root, "latest", state.step)
        best = facts.get("best", {}).get("step", 0)
        existing = checkpoint.steps(root)
        if best in existing:
            checkpoint.point(root, "best", best)
        # damaged ones may lie above the step just saved: they count for nothing
        last = [step for step in existing if step <= state.step][-node.settings.keep_last :]
        checkpoint.retain(root, {*last, best, *facts.get("kept", ())})

    def set_aside(self, nodes: list[Node]) -> tuple[Path, int]:
        """Move the results of these stages to a new attempt folder; returns it and how many there were."""
        there = [node for node in nodes if self.stage(node).is_dir()]
        taken = [int(number) for path in self.path.glob("attempt.*") if (number := path.suffix[1:]).isdigit()]
        target = self.path / f"attempt.{1 + max(taken, default=0)}"
        if there:
            target.mkdir(parents=True)
        for node in there:
            self.stage(node).rename(target / node.name)
        return target, len(there)


def state_of(found: checkpoint.Checkpoint) -> State:
    """What a stopped stage goes on from."""
    return State(found.step, found.tensors("student"), found.tensors("optimizer"), found.state["facts"])


def result_of(found: checkpoint.Checkpoint) -> tuple[Model, dict[str, Any]]:
    """A finished stage's model and weights."""
    return model_from_json(found.state["model"]), found.tensors("student")


def model_to_json(model: Model) -> dict[str, Any]:
    return {
        "network": model.network,
        "options": dict(model.options),
        "classes": list(model.classes),
        "pipeline": model.pipeline.to_json(),
    }


def model_from_json(value: Mapping[str, Any]) -> Model:
    return Model(value["network"], value["options"], tuple(value["classes"]), Pipeline.from_json(value["pipeline"]))


def environment() -> dict[str, str]:
    """What the bits of a result depend on besides the recipe."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR")
    packages = ("ssld", "paddlepaddle", "numpy", "pillow")
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        **{name: os.environ.get(name, "") for name in names},
    }


def cpu_name() -> str:
    """The processor's model where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
