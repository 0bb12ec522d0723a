from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from ssld.data.braces import expanded
from ssld.data.sources import open_source
from ssld.errors import DataError, RecipeError

MANY = ("{0..999999999}.tar", "{0..99}" * 9 + ".tar", "{a,b,c,d}" * 20 + ".tar", "{a{0..999999},b{0..9}}.tar")
DEEP = ("{a," * 50 + "}" * 50 + ".tar", "{" * 50 + "}" * 50 + ".tar")


@pytest.mark.parametrize("pattern", [*MANY, *DEEP])
def test_braces_for_more_shards_than_there_can_be_fill_no_memory(pattern):
    with pytest.raises(RecipeError, match="at most 1,000,000 shards"):
        expanded(pattern)


@pytest.mark.parametrize(
    ("pattern", "count", "last"),
    [
        ("{{00..99},{a..z}}/{0..9}.tar", 1260, "z/9.tar"),
        ("x,y-{9..0}.tar", 10, "x,y-0.tar"),
        ("{00..98..2},{a,b}.tar", 100, "98,b.tar"),
    ],
)
def test_few_shards_are_not_too_many(pattern, count, last):
    names = expanded(pattern)
    assert len(names) == len(set(names)) == count
    assert names[-1] == last


@pytest.mark.parametrize("pattern", ["a{b.tar", "{000001..000003.tar", "{0.." + "9" * 5000 + "}.tar"])
def test_braces_that_are_none_are_refused(pattern):
    with pytest.raises(RecipeError, match="expected braces in pairs"):
        expanded(pattern)


def test_braces_may_be_longer_than_the_name_of_a_file(tmp_path: Path):
    names = [f"{'a' * 20}-{number}" for number in range(200)]
    for name in names:
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo(f"{name}.png"), io.BytesIO())
    pattern = f"{tmp_path}/{{{','.join(names)}}}.tar"
    for spec in (pattern, {"shards": pattern}):
        assert len(open_source(spec, labeled=False, cache=tmp_path / "cache")) == len(names)
    (tmp_path / f"{names[7]}.tar").unlink()
    with pytest.raises(DataError, match=f"expected {len(names)} shards, got 1 missing"):
        open_source(pattern, labeled=False, cache=tmp_path / "cache")
