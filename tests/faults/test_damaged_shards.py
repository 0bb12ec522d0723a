"""Damaged shards: no sample is lost or joined wrongly without being named.

What a sound shard holds, and where, is known from how it was written here, never from the product's reader. Of a
damaged one the product must either refuse to read, by the name of the shard, or deliver samples that are equal to the
sound ones and name every other one.

One kind of damage cannot be seen by anybody, because a tar has checksums of headers only: changed bytes of an image
that still decodes, and of a label that is still a number. Such a sample must come under its own key; with an index from
before the damage its label is right as well.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from ssld.data import index as index_module
from ssld.data.images import decode
from ssld.data.index import SIDECAR, index_shard
from ssld.data.loader import Damage, evaluation_batches
from ssld.data.samples import Samples
from ssld.data.sources import open_source
from ssld.data.transforms import Pipeline, view
from ssld.errors import DataError

NORMAL, LONG = 100, 1_000
"""Shards of each kind of damage."""
BLOCK = 512
VIEW = Pipeline.read([{"ResizeImage": {"size": [4, 4]}}, "NormalizeImage"], 4)


# Sound shards ---------------------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """Where the bytes of one member lie: its headers from `start`, its data from `data` to `stop`."""

    name: str
    start: int
    data: int
    stop: int


@dataclass
class Shard:
    """A sound tar, and what it holds.

    samples: image and label by key.
    """

    name: str
    content: bytes = b""
    spans: list[Span] = field(default_factory=list)
    samples: dict[str, tuple[bytes, int]] = field(default_factory=dict)

    def differs(self, content: bytes) -> set[str]:
        """The members whose data are others in `content`, where nothing was moved."""
        if len(content) != len(self.content):
            return set()
        return {
            span.name for span in self.spans if content[span.data : span.stop] != self.content[span.data : span.stop]
        }


def picture(rng: np.random.Generator, kind: str) -> bytes:
    buffer = io.BytesIO()
    height, width = rng.integers(4, 24, 2)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write(name: str, number: int) -> Shard:
    """Nine samples of images of all kinds, labels before and behind, and members that are no part of a sample."""
    rng = np.random.default_rng([5, number])
    shard, buffer = Shard(name), io.BytesIO()
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    with tarfile.open(fileobj=buffer, mode="w", format=formats[number % 3]) as tar:

        def add(member: str, data: bytes) -> None:
            start = tar.offset
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            behind = tar.offset - -(-len(data) // BLOCK) * BLOCK
            shard.spans.append(Span(member, start, behind, behind + len(data)))

        for sample in range(9):
            kind, suffix = (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"))[sample % 3]
            key = f"train/{sample:04d}"
            if number % 3 and sample % 4 == 3:
                key = f"train/{'é' * 60}{sample:04d}"  # too long for one header
            image, label = picture(rng, kind), int(rng.integers(0, 120))
            members = [(f"{key}.{suffix}", image), (f"{key}.cls", str(label).encode())]
            members += [(f"{key}.json", b"{}" * 300)] if sample % 5 == 1 else []
            for member, data in members if rng.integers(2) else reversed(members):
                add(member, data)
            shard.samples[f"{name}/{key}"] = image, label
    shard.content = buffer.getvalue()
    return shard


SHARDS = [write("a", number) for number in range(6)]
OTHER = write("b", 6)
"""Lies beside the damaged one, and has samples of the same keys."""


# Damage ---------------------------------------------------------------------------------------------------------------


def cut(rng: np.random.Generator, shard: Shard) -> bytes:
    """Cut off at any byte, at any block, or where a member ends."""
    length = len(shard.content)
    at = (
        int(rng.integers(length)),
        int(rng.integers(length // BLOCK)) * BLOCK,
        shard.spans[int(rng.integers(len(shard.spans)))].start,
    )
    return shard.content[: at[int(rng.integers(3))]]


def flip(rng: np.random.Generator, shard: Shard) -> bytes:
    """One bit, or some bits that lie near each other."""
    content = bytearray(shard.content)
    place = int(rng.integers(shard.spans[-1].stop + 3 * BLOCK))
    for _ in range(1 if rng.integers(2) else int(rng.integers(2, 9))):
        byte = min(len(content) - 1, place + int(rng.integers(32)))
        content[byte] ^= 1 << int(rng.integers(8))
    return bytes(content)


def edit(rng: np.random.Generator, shard: Shard) -> bytes:
    """A header overwritten, cleared, copied over another, swapped with it, moved, taken out or doubled."""
    content = bytearray(shard.content)
    one, two = (shard.spans[int(i)] for i in rng.choice(len(shard.spans), 2, replace=False))
    # a long name has headers of its own, and a block or more of text, before the last one
    block = one.start + BLOCK * int(rng.integers((one.data - one.start) // BLOCK))
    mine, other = slice(block, block + BLOCK), slice(two.data - BLOCK, two.data)
    inside = block + int(rng.integers(BLOCK))
    length = int(rng.integers(1, 20))
    what = int(rng.integers(9))
    if what == 0:
        content[inside : inside + length] = rng.bytes(length)
    elif what == 1:
        content[mine] = rng.bytes(BLOCK)
    elif what == 2:
        content[mine] = bytes(BLOCK)
    elif what == 3:
        content[mine] = content[other]
    elif what == 4:
        content[mine], content[other] = content[other], content[mine]
    elif what == 5:
        del content[inside : inside + length]
    elif what == 6:
        del content[mine]
    elif what == 7:
        content[block:block] = content[mine]
    else:
        content[inside : inside + length] = bytes(length)
    return bytes(content)


Make = Callable[[np.random.Generator, Shard], bytes]
DAMAGE: tuple[Make, ...] = (cut, flip, edit)


# What the product must do ---------------------------------------------------------------------------------------------


class Delivered(NamedTuple):
    """What a reader gave: (key, label, bytes, pixels) of each sample, and what it said of the others."""

    samples: list[tuple[str, int, bytes, np.ndarray | None]]
    named: list[str]


Reader = Callable[[], Delivered]


def pixels(data: bytes) -> np.ndarray:
    return view(decode(data), VIEW, 0)


def read_all(samples: Samples) -> Delivered:
    """Everything that an evaluation shows."""
    damage = Damage(len(samples))
    found = []
    for batch in evaluation_batches(samples, VIEW, batch_size=4, workers=0, damage=damage):
        for key, label, index, image in zip(batch.keys, batch.labels, batch.indices, batch.images[0], strict=True):
            found.append((key, int(label), bytes(samples.read(int(index))), image))
    return Delivered(found, [f"{samples.key(index)} {said}" for index, said in damage.found.items()])


def verdict(shard: Shard, content: bytes, read: Reader) -> tuple[str, list[str]]:
    """How the reader took it, in a word, and in what it broke the promise."""
    sound = {**shard.samples, **OTHER.samples}
    try:
        delivered = read()
    except DataError as error:
        return "refused", [] if "a.tar" in str(error) else [f"an error that does not name the shard: {error}"]
    words, problems = {"harmless"}, []
    for key, label, data, image in delivered.samples:
        if key not in sound:
            problems.append(f"{key} is no sample")
            continue
        changed = {name for name in shard.differs(content) if f"a/{name}".startswith(f"{key}.")}
        word, problem = compared(sound[key], (label, data, image), changed)
        words.add(word)
        problems += [f"{key} has {problem}"] if problem else []
    counts = Counter(key for key, *_ in delivered.samples)
    problems += [f"{key} comes {count} times" for key, count in counts.items() if count > 1]
    lost = [key for key in sound if key not in counts]
    words |= {"named"} if lost else set()
    problems += [
        f"{key} is lost, not named" for key in lost if not any(line.startswith(key) for line in delivered.named)
    ]
    return max(words, key=WORDS.index), problems


WORDS = ("harmless", "named", "other pixels", "another label")
"""From what costs nothing to what nobody can see."""


def compared(
    sound: tuple[bytes, int], got: tuple[int, bytes, np.ndarray | None], changed: set[str]
) -> tuple[str, str | None]:
    """One sample and the sound one: a word, and what is wrong. changed: its members of which a byte is another."""
    label, data, image = got
    wanted, true = sound
    if label != true:
        return "another label", None if any(name.endswith(".cls") for name in changed) else f"the label {label}"
    if data.rstrip(b"\0") == wanted.rstrip(b"\0"):
        # a header with the size of another may give an image more of the zeros behind it
        same = image is None or np.array_equal(image, pixels(wanted))
        return "harmless", None if same else "other pixels than its bytes"
    touched = len(data) == len(wanted) and any(not name.endswith((".cls", ".json")) for name in changed)
    return "other pixels", None if touched else "the bytes of another"


Opening = Callable[[Path, Shard, bytes], Reader]
"""Lay the sound shard down, damage it, and open it before or after."""


def source(folder: Path) -> Samples:
    return open_source({"shards": str(folder / "{a,b}.tar")}, labeled=True, cache=folder / "cache")


def lay_down(folder: Path, shard: Shard) -> None:
    (folder / "b.tar").write_bytes(OTHER.content)
    (folder / "a.tar").write_bytes(shard.content)


def fresh(folder: Path, shard: Shard, content: bytes) -> Reader:
    """Damaged before anybody looked at it."""
    lay_down(folder, shard)
    (folder / "a.tar").write_bytes(content)
    return lambda: read_all(source(folder))


def stale(folder: Path, shard: Shard, content: bytes) -> Reader:
    """Damaged while a run reads it, behind its old time, as by a bad disk."""
    lay_down(folder, shard)
    time = (folder / "a.tar").stat().st_mtime_ns
    samples = source(folder)
    (folder / "a.tar").write_bytes(content)
    os.utime(folder / "a.tar", ns=(time, time))
    return lambda: read_all(samples)


def replaced(folder: Path, shard: Shard, content: bytes) -> Reader:
    """Written anew while a run reads it."""
    lay_down(folder, shard)
    samples = source(folder)
    later = (folder / "a.tar").stat().st_mtime_ns + 1
    (folder / "a.tar").write_bytes(content)
    os.utime(folder / "a.tar", ns=(later, later))
    return lambda: read_all(samples)


def cached(folder: Path, shard: Shard, content: bytes) -> Reader:
    """Damaged after a run that kept its index, and with the old time, as by a bad disk."""
    lay_down(folder, shard)
    time = (folder / "a.tar").stat().st_mtime_ns
    source(folder)
    (folder / "a.tar").write_bytes(content)
    os.utime(folder / "a.tar", ns=(time, time))
    return lambda: read_all(source(folder))


def packed(folder: Path, shard: Shard, content: bytes) -> Reader:
    """Damaged after it was packed with an index beside it, and with the old time, as by a bad copy."""
    lay_down(folder, shard)
    (folder / SIDECAR).write_bytes(index_shard(folder / "a.tar").encode())
    (folder / "a.tar").write_bytes(content)
    os.utime(folder / "a.tar", ns=(0, 0))
    return lambda: read_all(source(folder))


OPENINGS: tuple[Opening, ...] = (fresh, stale, cached, packed, replaced)


def campaign(folder: Path, damage: Make, count: int, openings: tuple[Opening, ...]) -> tuple[Counter[str], list[str]]:
    """How `count` damaged shards were taken, and what was wrong, with the numbers that make them again."""
    words, problems = Counter[str](), []
    for number in range(count):
        shard = SHARDS[number % len(SHARDS)]
        content = damage(np.random.default_rng([6, DAMAGE.index(damage), number]), shard)
        opening = openings[number // len(SHARDS) % len(openings)]
        here = folder / f"{number}"
        here.mkdir()
        word, found = verdict(shard, content, opening(here, shard, content))
        words[f"{opening.__name__}: {word}"] += 1
        problems += [f"{damage.__name__} number {number}, {opening.__name__}: {line}" for line in found]
    return words, problems


def expect_none_silent(folder: Path, damage: Make, count: int) -> None:
    words, problems = campaign(folder, damage, count, OPENINGS)
    assert not problems, f"{len(problems)} problems, {words}\n" + "\n".join(problems[:20])
    # the damage was such that it can be seen, and a file that was written anew is seen always
    assert words["fresh: refused"] > count // 20
    assert [word for word in words if word.startswith("replaced")] == ["replaced: refused"]


every_damage = pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)


def test_sound_shards_deliver_all(tmp_path: Path) -> None:
    for number, shard in enumerate(SHARDS):
        for opening in OPENINGS:
            here = tmp_path / f"{number} {opening.__name__}"
            here.mkdir()
            # one that was written anew is refused, whatever it holds
            word = "refused" if opening is replaced else "harmless"
            assert verdict(shard, shard.content, opening(here, shard, shard.content)) == (word, [])


@every_damage
def test_no_sample_is_lost_or_joined_without_being_named(tmp_path: Path, damage: Make) -> None:
    expect_none_silent(tmp_path, damage, NORMAL)


@pytest.mark.soak
@pytest.mark.timeout(1500)
@every_damage
def test_a_thousand_of_each(tmp_path: Path, damage: Make) -> None:
    expect_none_silent(tmp_path, damage, LONG)


# Tests of the test ----------------------------------------------------------------------------------------------------


def as_it_comes(folder: Path, shard: Shard, content: bytes) -> Reader:
    """The first label to the first image, and so on, and on after whatever is wrong."""
    lay_down(folder, shard)
    (folder / "a.tar").write_bytes(content)

    def read() -> Delivered:
        images, labels = [], []
        for name in "ab":
            with suppress(tarfile.TarError, ValueError), tarfile.open(folder / f"{name}.tar", "r:") as tar:
                for member in tar:
                    key, _, suffix = member.name.partition(".")
                    data = tar.extractfile(member)
                    if data is not None and suffix == "cls":
                        labels.append(int(data.read()))
                    elif data is not None and suffix != "json":
                        images.append((f"{name}/{key}", data.read()))
        return Delivered([(key, label, data, None) for (key, data), label in zip(images, labels, strict=False)], [])

    return read


def test_of_the_test_a_reader_that_joins_across_damage_is_found(tmp_path: Path) -> None:
    _, problems = campaign(tmp_path, edit, NORMAL, (as_it_comes,))
    assert any("has the label" in line for line in problems)
    assert any("is lost, not named" in line for line in problems)


@pytest.mark.parametrize(("check", "damage"), [("_check_whole", cut), ("_check_tail", edit), ("_check_tail", flip)])
def test_of_the_test_a_check_that_is_left_out_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str, damage: Make
) -> None:
    monkeypatch.setattr(index_module, check, lambda *_: None)
    _, problems = campaign(tmp_path, damage, NORMAL, (fresh,))
    assert any("is lost, not named" in line for line in problems)


def test_of_the_test_a_label_from_another_sample_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Samples, "key", lambda samples, i: samples.store.key((i + 1) % len(samples)))
    _, problems = campaign(tmp_path, flip, 6, (fresh,))
    assert problems


# What a campaign hardly meets ----------------------------------------------------------------------------------------


def test_a_label_that_was_changed_is_right_where_an_index_is_from_before(tmp_path: Path) -> None:
    """And without one, the image stays under its own key: nobody can tell one digit from another."""
    shard = SHARDS[0]
    labels = [span for span in shard.spans if span.name.endswith(".cls")]
    for number, span in enumerate(labels):
        content = bytearray(shard.content)
        content[span.data] ^= 1
        for opening in OPENINGS:
            here = tmp_path / f"{number} {opening.__name__}"
            here.mkdir()
            word, problems = verdict(shard, bytes(content), opening(here, shard, bytes(content)))
            assert problems == []
            assert word == {fresh: "another label", replaced: "refused"}.get(opening, "harmless")


def test_an_end_that_was_never_written_is_seen_but_for_the_last_record(tmp_path: Path) -> None:
    """A copy that was broken off may leave zeros, which look like the end of a tar where they begin with a member."""
    for shard in SHARDS:
        for span in shard.spans:
            tail = len(shard.content) - span.start
            lay_down(tmp_path, shard)
            (tmp_path / "a.tar").write_bytes(shard.content[: span.start] + bytes(tail))
            if tail > 10_240 + 2 * BLOCK:
                with pytest.raises(DataError, match=r"a\.tar: "):
                    source(tmp_path)


def test_an_end_that_was_never_written_is_seen_by_an_index_from_before(tmp_path: Path) -> None:
    shard = SHARDS[0]
    for number, span in enumerate(shard.spans):
        content = shard.content[: span.start] + bytes(len(shard.content) - span.start)
        for opening in (stale, cached, packed):
            here = tmp_path / f"{number} {opening.__name__}"
            here.mkdir()
            assert verdict(shard, content, opening(here, shard, content))[1] == []


@pytest.mark.parametrize("padding", range(0, 24))
def test_a_tar_of_any_length_ends_where_it_should(tmp_path: Path, padding: int) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = 100 + padding * BLOCK
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    assert index_shard(path).counts.tolist() == [1]


def test_a_file_with_holes_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("hole.png")
        info.size = 8
        info.pax_headers = {"GNU.sparse.map": "0,4,1000,4", "GNU.sparse.size": "2000"}
        tar.addfile(info, io.BytesIO(b"12345678"))
    with pytest.raises(DataError, match=r"a\.tar: hole\.png: expected a whole file, got one with holes"):
        index_shard(path)
