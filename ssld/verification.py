"""Are soft labels still what their teacher says? Every byte is checked, and the teacher is asked again about some."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssld.contracts import Soft
from ssld.data.loader import Damage
from ssld.data.samples import Samples
from ssld.errors import DataError, LabelError, RecipeError
from ssld.graph import make_plan
from ssld.labels.inspect import Kept, kept_in
from ssld.labels.labelling import answers
from ssld.labels.reader import Reader
from ssld.labels.store import Store
from ssld.members import Members
from ssld.metrics import agreement
from ssld.rundir import LABELS, RunDirectory
from ssld.teaching.asking import Member

SAMPLED = 64
AGREEMENT = 0.95


@dataclass(frozen=True)
class Verdict:
    """A teacher's answers against what is kept of them.

    agreement: share of views with the same most probable class; kl: mean KL(kept || teacher) in nats; largest: of all
    differences of a probability.
    """

    images: int
    views: int
    agreement: float
    kl: float
    largest: float


def verify_all(
    found: list[Kept], run: Path | None, tolerance: float, report: Callable[[str], None]
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Verify several directories of labels: a row of a table for each, and all that is wrong.

    run: one that uses them, the one that each lies in when left out; tolerance: the largest mean KL, in nats.
    """
    rows, faults = [], []
    for kept in found:
        broken = [str(fault) for _, _, fault in kept.headers() if fault]
        faults += broken
        if broken or not kept.files:
            rows.append((kept.directory.name, str(len(kept.files)), *[""] * 5))
            continue
        try:
            verdict = verify(kept, run or run_of(kept), report)
        except RecipeError as error:
            # labels of another run, in a store that is shared: nothing is wrong with them
            report(f"not asked about again: {error}")
            rows.append((kept.directory.name, str(len(kept.files)), "not asked", *[""] * 4))
            continue
        except DataError as error:
            faults.append(str(error))
            continue
        if verdict.agreement < AGREEMENT or not verdict.kl <= tolerance:
            faults.append(
                f"{kept.directory}: expected the teacher to agree with at least {AGREEMENT:.0%} of its labels and a KL "
                f"of at most {tolerance:g}, got {verdict.agreement:.1%} and {verdict.kl:.2g}; remove them with ssld "
                f"labels rm, and label again"
            )
        numbers = (f"{verdict.agreement:.4f}", f"{verdict.kl:.2g}", f"{verdict.largest:.2g}")
        rows.append((kept.directory.name, str(len(kept.files)), str(verdict.images), str(verdict.views), *numbers))
    return rows, faults


def kept_at(place: Path) -> list[Kept]:
    """The label directories at a place; of a run, those of every store that its recipe names."""
    run = RunDirectory(place)
    if not run.exists():
        return kept_in(place)
    stages = run.recorded()[0].stages.values()
    stores = [Path(stage.stored.store).expanduser() for stage in stages if stage.stored and stage.stored.store]
    there = [store for store in dict.fromkeys([*stores, run.path / LABELS]) if store.is_dir()]
    return [kept for store in there for kept in kept_in(store)] or kept_in(place)


def run_of(kept: Kept) -> Path:
    """The run that a label directory lies in. Raises RecipeError where it lies in none."""
    for parent in kept.directory.resolve().parents:
        if RunDirectory(parent).exists():
            return parent
    raise RecipeError(
        f"{kept.directory}: expected labels inside a run, got none above; name a run that uses them by --run"
    )


def verify(kept: Kept, run: Path, report: Callable[[str], None]) -> Verdict:
    """Ask the teacher again about a sample of the images that have labels.

    run: one whose recipe has the teacher and the images. Raises RecipeError where it does not use these labels.
    """
    recipe, options = RunDirectory(run).recorded()
    members = Members(RunDirectory(run), make_plan(recipe, limit=options.limit), options, report)
    unlabelled = ""
    for store, member, samples in _used(members):
        if store.directory.resolve() != kept.directory.resolve():
            continue
        # stages share labels of one kind, and one of them may have none of its images yet
        if len(store.missing(samples)) < len(samples.shard_ids):
            return _compare(store, member, samples)
        unlabelled = samples.name
    if unlabelled:
        raise LabelError(f"{kept.directory}: expected labels of {unlabelled}, got none")
    raise RecipeError(f"{run}: expected a run that uses the labels of {kept.directory}, got one that does not")


def _used(members: Members) -> Iterator[tuple[Store, Member, Samples]]:
    """All the labels that a run uses."""
    data = members.plan.data
    for node in members.plan.nodes:
        if not node.settings.taught_by:
            continue
        if node.settings.stored:
            for store, member in members.stores(node):
                yield store, member, data.named(node.settings.data)
        for store, member in members.tested_stores(node, members.of(node)):
            yield store, member, data.checked
            yield store, member, data.compared


def _compare(store: Store, member: Member, samples: Samples) -> Verdict:
    reader = Reader(store, samples)
    for fault in reader.open_present().values():
        raise fault
    reader.expect_same_views()
    labeled = np.concatenate([np.empty(0, np.int64), *(reader.indices(shard) for shard in reader.shards)])
    if not len(labeled):
        raise LabelError(f"{store.directory}: expected labels of {samples.name}, got none")
    chosen = labeled[np.linspace(0, len(labeled) - 1, min(SAMPLED, len(labeled))).astype(int)]
    answered = list(answers(store, member.teacher, samples, chosen.tolist(), Damage(len(chosen))))
    logits = np.concatenate([found for _, found in answered])
    indices, views = (np.concatenate([getattr(batch, part) for batch, _ in answered]) for part in ("indices", "views"))
    kept = reader.at(indices, views)
    same, kl = agreement(logits, kept)
    return Verdict(len(chosen), len(indices), same, kl, _largest(logits, kept))


def _largest(logits: np.ndarray, kept: Soft) -> float:
    fresh = np.exp(logits / kept.temperature - np.logaddexp.reduce(logits / kept.temperature, axis=1, keepdims=True))
    stored = np.exp(kept.logits / kept.temperature)
    if kept.ids is not None:
        fresh, stored = np.take_along_axis(fresh, kept.ids, axis=1), stored[:, :-1]
    return float(np.abs(fresh - stored).max())
