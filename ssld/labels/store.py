"""Where soft labels are kept: a directory for each way of making them, a file in it for each shard.

ROOT/<fingerprint>/labels.json            what the labels are, and the class names
ROOT/<fingerprint>/<shard>.safetensors    the soft labels of one shard, with a header of their own

A shard goes by a hash of its keys and of what its bytes are known by, so it has the same labels in whatever set it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ssld.contracts import TeacherSpec
from ssld.data import transforms
from ssld.data.loader import Replay
from ssld.data.samples import Samples, digest
from ssld.data.transforms import Pipeline
from ssld.environment import environment
from ssld.errors import DataError, LabelError
from ssld.files import ABANDONED, commit_exclusive, disk, reported, sweep_old, write_atomic
from ssld.labels.format import QUANTIZER, Packed, decode, encode
from ssld.watch import watch

FORMAT = 1
DESCRIPTION = "labels.json"
SUFFIX = ".safetensors"
MADE_WITH = ("machine", "cpu", "python", "ssld", "numpy", "pillow")


@dataclass(frozen=True)
class Description:
    """All that soft labels depend on besides the images.

    teacher: what it is and what it is shown; pipeline: the views, at the teacher's size; replay: how many, and their
    seed; top_k: classes kept; temperature: of the teacher's softmax; classes: the names of the student's classes.
    who: the teacher in words, for people.
    """

    teacher: TeacherSpec
    pipeline: Pipeline
    replay: Replay
    top_k: int
    temperature: float
    classes: tuple[str, ...]
    who: str

    @cached_property
    def basis(self) -> dict[str, Any]:
        """The description as JSON, class names by their hash; equal for labels that can stand for each other."""
        return {
            "format": FORMAT,
            "teacher": {
                "fingerprint": self.teacher.fingerprint,
                "precision": self.teacher.precision,
                "mean": self.teacher.mean and list(self.teacher.mean),
                "std": self.teacher.std and list(self.teacher.std),
            },
            "transform": {
                "revision": transforms.REVISION,
                "library": "pillow",
                "steps": [{type(step).__name__: step.model_dump(mode="json")} for step in self.pipeline.steps],
                "size": self.pipeline.resolution,
            },
            "seed": self.replay.seed,
            "views": self.replay.views,
            "top_k": self.top_k,
            "temperature": self.temperature,
            "quantizer": QUANTIZER,
            "classes": {"number": len(self.classes), "sha256": digest(*self.classes)},
        }

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the basis."""
        return hashlib.sha256(json.dumps(self.basis, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Probe:
    """The first labelled view of a shard, by hashes: does the same image still give the same pixels and answer?

    sample: its place in the shard; pixels: of its view 0, rendered; logits: of the teacher's answer, which another
    type of processor may change.
    """

    sample: int
    pixels: str
    logits: str


@dataclass(frozen=True, eq=False)
class Labels:
    """A label file that was found whole: its header, its labels [N, V], and a hash of all of it."""

    header: Mapping[str, Any]
    packed: Packed
    sha256: str

    @property
    def probe(self) -> Probe | None:
        """None where no image of the shard was readable."""
        found = self.header["probe"]
        return None if found is None else Probe(**found)


@dataclass(frozen=True, eq=False)
class Store:
    """The label files of one description below a root."""

    root: Path
    description: Description

    @cached_property
    def directory(self) -> Path:
        return self.root / self.description.fingerprint[:16]

    def file(self, samples: Samples, shard: int) -> Path:
        """The label file of a shard, whether it is there or not."""
        return self.directory / f"{samples.shard_ids[shard][:32]}{SUFFIX}"

    def missing(self, samples: Samples) -> list[int]:
        """The shards without a label file."""
        there = {path.name for path in self.directory.iterdir()} if self.directory.is_dir() else set()
        return [shard for shard in range(len(samples.shard_ids)) if self.file(samples, shard).name not in there]

    def begin(self) -> None:
        """Make the directory with its description, and remove what killed processes left in it."""
        about = {**self.description.basis, "names": list(self.description.classes)}
        data, path = (json.dumps(about, indent=1, sort_keys=True) + "\n").encode(), self.directory / DESCRIPTION
        if not path.is_file() or path.read_bytes() != data:
            write_atomic(path, data)
        sweep_old(self.directory, ABANDONED)

    def commit(self, samples: Samples, shard: int, packed: Packed, probe: Probe | None, shards_left: int) -> bool:
        """Write the labels of a shard, [N, V]; False where another process was first, whose file then stands.

        shards_left: to be written, this one included, for the message of a full disk.
        """
        data, path = encode(self._header(samples, shard, probe), packed), self.file(samples, shard)
        with watch.awaiting(lambda: f"soft labels to be written to {path}"):
            return commit_exclusive(path, data, len(data) * shards_left)

    def load(self, samples: Samples, shard: int) -> Labels:
        """The labels of a shard, after every byte was checked.

        Raises LabelError for a file that is not there, is damaged, or is not what its name says; DataError for one
        that cannot be read, which says nothing against it.
        """
        path = self.file(samples, shard)
        with watch.awaiting(lambda: f"soft labels to be read from {path}"):
            return self._read(path, samples, shard)

    def _read(self, path: Path, samples: Samples, shard: int) -> Labels:
        try:
            data = path.read_bytes()
        except (FileNotFoundError, IsADirectoryError) as error:
            raise LabelError(
                f"{path}: expected the soft labels of shard {shard} of {samples.name}, got: {error.strerror}; label it "
                f"again"
            ) from error
        except OSError as error:
            raise DataError(f"{path}: expected to read soft labels, got: {error.strerror}; make it readable") from error
        header, packed = decode(data, path)
        for key, wanted, got in self._differences(samples, shard, header, packed):
            raise LabelError(
                f"{path}: expected {key} {wanted}, got {got}: the labels of another teacher, transform, seed or shard; "
                f"the file is not used, label it again"
            )
        # what lies in front of the arrays holds their sha256
        front = 8 + int.from_bytes(data[:8], "little")
        return Labels(header, packed, hashlib.sha256(data[:front]).hexdigest())

    def drop_damaged(self, samples: Samples, shard: int) -> None:
        """Take a damaged label file away, where it is there; one that another process has mended meanwhile stays."""
        path = self.file(samples, shard)
        aside = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
        with reported(path, 0):
            if not os.path.lexists(path):
                return
            with contextlib.suppress(FileNotFoundError):
                disk.rename(path, aside)
                try:
                    self._read(aside, samples, shard)
                    disk.replace(aside, path)
                except LabelError:
                    disk.remove(aside)
                except DataError:
                    # which says nothing against it
                    disk.replace(aside, path)
                    raise

    def _header(self, samples: Samples, shard: int, probe: Probe | None) -> dict[str, Any]:
        """What a label file says of itself."""
        made = environment()
        return {
            **self.description.basis,
            "fingerprint": self.description.fingerprint,
            "shard": {"id": samples.shard_ids[shard], "keys": keys_hash(samples, shard)},
            "probe": None if probe is None else asdict(probe),
            "made": {
                "teacher": self.description.who,
                "engine": self.description.teacher.engine,
                **{name: made[name] for name in MADE_WITH},
            },
        }

    def _differences(
        self, samples: Samples, shard: int, header: Mapping[str, Any], packed: Packed
    ) -> Iterator[tuple[str, object, object]]:
        """What of a label file is not as it must be: (what, wanted, got)."""
        shape = [int(samples.shard_sizes[shard]), self.description.replay.views]
        found = header.get("shard") or {}
        facts = (
            ("fingerprint", self.description.fingerprint, header.get("fingerprint")),
            ("shard", samples.shard_ids[shard], found.get("id")),
            ("labels [samples, views]", shape, list(packed.rest.shape)),
        )
        return (fact for fact in facts if fact[1] != fact[2])


def keys_hash(samples: Samples, shard: int) -> str:
    """sha256 over the keys of a shard, in order."""
    start, stop = samples.borders[shard : shard + 2]
    return hashlib.sha256("\0".join(samples.key(i) for i in range(start, stop)).encode()).hexdigest()
