"""Cut a folder of class sub-folders into a small labeled set and a pool, as list files beside it.

    python benchmarks/labeled_part.py cifar10/train --labeled 2000

writes cifar10/labeled.txt, cifar10/pool.txt (PaddleClas lists, paths below cifar10/train) and cifar10/classes.txt. The
choice is balanced and depends on nothing but the file names, so that everyone gets the same.
"""

from pathlib import Path

import click
import numpy as np

from ssld.data.samples import spread
from ssld.data.sources import open_source


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--labeled", type=click.IntRange(min=1), required=True, help="Images that keep their label.")
@click.option("--pool", type=click.IntRange(min=1), help="Images of the pool; all the others when left out.")
def main(folder: Path, labeled: int, pool: int | None) -> None:
    """Write the three files."""
    samples = open_source(str(folder), labeled=True)
    assert samples.labels is not None
    assert samples.classes is not None
    order = spread(samples.labels, "labeled part")
    for name, chosen in (("labeled", order[:labeled]), ("pool", order[labeled:][:pool])):
        lines = [f"{samples.key(int(i))} {samples.labels[i]}\n" for i in np.sort(chosen)]
        (folder.parent / f"{name}.txt").write_text("".join(lines))
    (folder.parent / "classes.txt").write_text("".join(f"{name}\n" for name in samples.classes))


if __name__ == "__main__":
    main()
