"""Everything that is measured of speed and memory, in one table.

    python benchmarks/speed.py
    python benchmarks/speed.py --only step --only epoch

Every figure is the median of five turns, every ratio the median of the ratios within a turn; what is compared takes
turns in one run. Needs Linux and the extra `demo`.
"""

from itertools import chain

import augmenting
import click
import decoding
import epoch
import evaluation
import labelling
import memory
import opening
import ranks
import startup
import step
import stored
from measuring import conditions, show, table

BENCHMARKS = {
    module.__name__: module.rows
    for module in (step, ranks, epoch, stored, labelling, evaluation, decoding, augmenting, startup, opening, memory)
}


@click.command()
@click.option("--only", "parts", multiple=True, help="Benchmarks with this in their name; may be given several times.")
@click.option("--quick", is_flag=True, help="Tiny sizes, one turn: to see that everything runs.")
def main(parts: tuple[str, ...], quick: bool) -> None:
    """Print the table as Markdown, a row as soon as it is known."""
    chosen = [name for name in BENCHMARKS if not parts or any(part in name for part in parts)]
    if not chosen:
        raise click.UsageError(f"expected a part of {', '.join(BENCHMARKS)}, got {', '.join(parts)}")
    click.echo(conditions())
    show(table(chain.from_iterable(BENCHMARKS[name](quick) for name in chosen)))


if __name__ == "__main__":
    main()
