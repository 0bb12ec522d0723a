"""A run directory: where each result lies, what is finished, and why a stage must run again.

RUN/recipe.yaml      the merged recipe
RUN/run.json         the options of the command
RUN/run.lock         held by the process that works here
RUN/train.log  RUN/metrics.jsonl
RUN/labels.store/    soft labels, where the recipe names no other place; content goes by hashes, so it is never wrong
RUN/test.json        how the last stage did on the test set, where there is one
RUN/distill/step-00001234/    checkpoints of the stage `distill`, with links `latest` and `best`
RUN/attempt.1/distill/        results that a later attempt set aside; no stage has a dot in its name
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssld import checkpoint, recipe
from ssld.contracts import Model, State, Task
from ssld.data.transforms import Pipeline
from ssld.environment import environment
from ssld.errors import CheckpointError, DataError, OutputError, StorageError
from ssld.files import disk, move, readable, reported, sweep, writable, write_atomic
from ssld.graph import Node
from ssld.watch import watch
from ssld.wording import cut

LABELS = "labels.store"
OWN = ("recipe.yaml", "run.json", "run.lock", "train.log", "metrics.jsonl", LABELS)
"""The files of a run that are there before its first stage."""
STARTED_IN = "started_in"
"""Beside the options in run.json."""
STATE = {"fingerprint": str, "basis": dict, "finished": bool, "metrics": dict, "facts": dict, "model": dict}
"""What a stage says of itself in a checkpoint, beside what is for people."""


@dataclass(frozen=True)
class Options:
    """What the command line adds to a recipe; kept, so that a resumed run goes on with the same."""

    device: str = "cpu"
    limit: int | None = None
    trust_teacher: bool = False
    nproc: int = 1
    stall_timeout: float = 600.0
    """Seconds that an image, a teacher's answer, a step or a checkpoint may take; 0 for any time."""

    def __post_init__(self) -> None:
        for name, right, wanted in (
            ("device", isinstance(self.device, str), "text"),
            ("limit", self.limit is None or _counts(self.limit), "a number of images, 1 or more"),
            ("trust_teacher", isinstance(self.trust_teacher, bool), "true or false"),
            ("nproc", _counts(self.nproc), "a number of processes, 1 or more"),
            ("stall_timeout", _lasts(self.stall_timeout), "seconds, 0 or more"),
        ):
            if not right:
                raise ValueError(f"{name}: expected {wanted}, got {getattr(self, name)!r}")


def _counts(value: object) -> bool:
    return type(value) is int and value > 0


def _lasts(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]


@dataclass(frozen=True)
class Status:
    """Where one stage of a plan stands: "done", "resume", "changed" or "new", and why."""

    kind: str
    why: str
    checkpoint: checkpoint.Checkpoint | None = None

    @property
    def metrics(self) -> Mapping[str, float]:
        return self.checkpoint.state["metrics"] if self.checkpoint else {}

    @property
    def seconds(self) -> float:
        return self.checkpoint.state["facts"].get("seconds", 0.0) if self.checkpoint else 0.0


class RunDirectory:
    """Reads and writes one run's files. Writing needs the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, name: str, out: str | Path | None) -> RunDirectory:
        """The run of the recipe of that name: out, or runs/NAME when left out."""
        return cls(Path(out) if out is not None else Path("runs") / name)

    def exists(self) -> bool:
        with readable(self.path):
            return all((self.path / name).is_file() for name in ("recipe.yaml", "run.json"))

    def claim(self) -> None:
        """Make sure that the directory can be written and is a run's, or empty. Raises OutputError, or CheckpointError
        for a run whose options are lost.

        What is no run is not touched: somebody may have named a directory of their own by mistake.
        """
        with readable(self.path):
            if (self.path / "recipe.yaml").is_file():
                # what says how it went on may be lost
                self._options()
            strangers = [] if self.exists() or not self.path.is_dir() else sorted(self._strangers())
        if strangers:
            raise OutputError(
                f"{self.path}: expected a run or an empty directory, got one that holds {', '.join(strangers[:3])}"
                f"{', …' if len(strangers) > 3 else ''}; choose another --out"
            )
        writable(self.path)

    def _strangers(self) -> Iterator[str]:
        """What a run that was killed before it began would not have left; its recipe is the last that it writes."""
        names = (path.name for path in self.path.iterdir())
        return (name for name in names if name not in OWN[1:] and not name.startswith(".tmp-"))

    def clear(self) -> None:
        """Remove what a killed process left half done; only for the holder of the lock."""
        sweep(self.path, depth=2, skip=(LABELS,))

    def begin(self, text: str, options: Options) -> None:
        """Record the recipe and the options, and where this process is, from where the paths of the recipe count."""
        facts = {**asdict(options), STARTED_IN: str(Path.cwd())}
        write_atomic(self.path / "run.json", (json.dumps(facts, indent=1) + "\n").encode())
        write_atomic(self.path / "recipe.yaml", text.encode())

    def forget(self) -> None:
        """Take back `begin`: the run failed before anything was spent, and is no run to resume."""
        with reported(self.path, 0):
            for name in ("recipe.yaml", "run.json"):
                if (self.path / name).exists():
                    disk.remove(self.path / name)

    def recorded(self) -> tuple[recipe.Recipe, Options]:
        """The recipe and options with which this run began."""
        return recipe.read_recipe(self.path / "recipe.yaml"), self._options()

    def options(self) -> Options:
        """Those with which the run began; the defaults where there is none."""
        return self._options() if self.exists() else Options()

    @contextmanager
    def from_its_place(self) -> Iterator[None]:
        """Add to an error about data, in another directory than the run was started in, which one that was."""
        try:
            yield
        except DataError as error:
            with suppress(DataError, ValueError, RecursionError):
                place = self._facts().get(STARTED_IN)
                if place not in (None, str(Path.cwd())):
                    error.add_note(
                        f"the run was started in {place}, from where the paths of its recipe count; go there"
                    )
            raise

    def _facts(self) -> dict[str, Any]:
        path = self.path / "run.json"
        with readable(path):
            facts = json.loads(path.read_bytes())
        if not isinstance(facts, dict):
            raise ValueError(f"expected a mapping, got {cut(facts)}")
        return facts

    def _options(self) -> Options:
        path = self.path / "run.json"
        try:
            if not path.exists():
                raise ValueError("no such file")
            return Options(**{name: value for name, value in self._facts().items() if name != STARTED_IN})
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: expected the options of the run, got: {error}; restore it, or write {{}} into it for the "
                f"defaults"
            ) from error

    def labels(self, node: Node) -> Path:
        """Where the soft labels of a stage are kept."""
        stored = node.settings.stored
        return Path(stored.store).expanduser() if stored and stored.store else self.path / LABELS

    def stage(self, node: Node) -> Path:
        return self.path / node.name

    def status(self, node: Node, report: Callable[[str], None]) -> Status:
        """Compare what is on disk with what the plan wants. Damaged checkpoints are named through report."""
        found = checkpoint.latest(self.stage(node), report)
        if found is None:
            return Status("new", "not run yet")
        _expect_state(found)
        if found.state["fingerprint"] != node.fingerprint:
            return Status(
                "changed", "; ".join(recipe.differences(brief(found.state["basis"]), brief(node.basis))), found
            )
        if found.state["finished"]:
            return Status("done", "finished", found)
        return Status("resume", f"stopped after step {found.step} of {node.steps}", found)

    def reached(self, node: Node, report: Callable[[str], None]) -> checkpoint.Checkpoint | None:
        """The checkpoint from which a stopped stage goes on."""
        status = self.status(node, report)
        return status.checkpoint if status.kind == "resume" else None

    def save(self, node: Node, task: Task[Any], state: State, metrics: Mapping[str, float] | None = None) -> None:
        """Commit a checkpoint, and tidy the stage's directory. metrics: those of a finished stage.

        Raises StorageError where the run is gone: a checkpoint in its place would belong to no run.
        """
        facts = {
            "stage": node.name,
            "fingerprint": node.fingerprint,
            "basis": node.basis,
            "teacher": task.soft.fingerprint if task.soft else None,
            "labels": task.soft.files if task.soft else "",
            "finished": metrics is not None,
            "metrics": metrics or {},
            "facts": dict(state.facts),
            "model": model_to_json(task.model),
            "environment": environment(),
        }
        with watch.awaiting(lambda: f"step {state.step} to be written to {self.stage(node)}"):
            if not self.exists():
                raise StorageError(
                    f"cannot write step {state.step} of {node.name}: expected the run in {self.path}, got none: it was "
                    "removed or moved meanwhile; go on from where it is now with ssld resume --out DIR"
                )
            tensors = {"student": state.weights, "optimizer": state.optimizer}
            checkpoint.save(self.stage(node), state.step, tensors, facts)
            self.tidy(node, state.step, state.facts)

    def tidy(self, node: Node, step: int, facts: Mapping[str, Any]) -> None:
        """Point `latest` and `best` to where they belong after step `step`, and remove what need not stay.

        A process may be killed between a save and this, so it is done at the start of every run as well.
        """
        root = self.stage(node)
        # damaged ones may lie above the step just saved: they count for nothing
        existing = [saved for saved in checkpoint.steps(root) if saved <= step]
        best = facts.get("best", {}).get("step", 0)
        for name, target in (("latest", step), ("best", best)):
            if target in existing:
                checkpoint.point(root, name, target)
        checkpoint.retain(root, {*existing[-node.settings.keep_last :], best, *facts.get("kept", ())})

    def tested(self, node: Node, test: str) -> dict[str, float] | None:
        """The metrics of the finished node on the test set of that identity, where they were measured.

        What cannot be read is measured again.
        """
        try:
            found = json.loads((self.path / "test.json").read_text())
            known = (found["stage"], found["test"]) == (node.fingerprint, test)
            return {name: float(value) for name, value in found["metrics"].items()} if known else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def keep_tested(self, node: Node, test: str, metrics: Mapping[str, float]) -> None:
        """Record the metrics of the finished node on the test set of that identity."""
        found = {"stage": node.fingerprint, "test": test, "metrics": dict(metrics)}
        write_atomic(self.path / "test.json", (json.dumps(found, indent=1) + "\n").encode())

    def set_aside(self, nodes: list[Node]) -> tuple[Path, int]:
        """Move the results of these stages to a new attempt folder; returns it and how many there were.

        What was made last goes first, so that a killed process never leaves a result whose origin is gone.
        """
        there = [node for node in nodes if self.stage(node).is_dir()]
        taken = [int(number) for path in self.path.glob("attempt.*") if (number := path.suffix[1:]).isdigit()]
        target = self.path / f"attempt.{1 + max(taken, default=0)}"
        if (self.path / "test.json").exists() and there:
            move(self.path / "test.json", target / "test.json")
        for node in reversed(there):
            move(self.stage(node), target / node.name)
        return target, len(there)


def _expect_state(found: checkpoint.Checkpoint) -> None:
    """Raises CheckpointError for a state that no stage has written."""
    for key, kind in STATE.items():
        if not isinstance(found.state.get(key), kind):
            raise CheckpointError(
                f"{found.path}: expected the state of a stage with its {key}, got {cut(found.state.get(key))}; restore "
                "it, or delete it"
            )


def brief(value: Any) -> Any:
    """The same, with hashes cut to what a person compares."""
    if isinstance(value, Mapping):
        return {key: brief(item) for key, item in value.items()}
    return f"{value[:8]}…" if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value


def state_of(found: checkpoint.Checkpoint) -> State:
    """What a stopped stage goes on from."""
    return State(found.step, found.tensors("student"), found.tensors("optimizer"), found.state["facts"])


def result_of(found: checkpoint.Checkpoint) -> tuple[Model, dict[str, Any]]:
    """A finished stage's model and weights. Raises CheckpointError for a state that no stage has written."""
    try:
        model = model_from_json(found.state["model"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{found.path}: expected the state of a stage, got one whose model is none ({error!r}); restore it"
        ) from error
    return model, found.tensors("student")


def model_to_json(model: Model) -> dict[str, Any]:
    return {
        "network": model.network,
        "options": dict(model.options),
        "classes": list(model.classes),
        "pipeline": model.pipeline.to_json(),
    }


def model_from_json(value: Mapping[str, Any]) -> Model:
    return Model(value["network"], value["options"], tuple(value["classes"]), Pipeline.from_json(value["pipeline"]))
