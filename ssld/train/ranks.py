"""How the processes that train a stage together meet, and what they do when they have met: add up."""

from __future__ import annotations

import os
import socket
from functools import cache
from typing import Any

import paddle
from paddle.base import core

from ssld.contracts import Ranks
from ssld.errors import RankError

HOST = "127.0.0.1"
PATIENCE = 300
"""Seconds in which all ranks must have come together."""


def add_up(tensor: paddle.Tensor, ranks: Ranks) -> None:
    """Replace a tensor by its sum over all ranks, the same bits on each. Raises RankError when one is gone."""
    if ranks.count == 1:
        return
    try:
        ranks.group.all_reduce(tensor, core.ReduceOp.SUM, True).wait()
    except RuntimeError as error:
        how = str(error).strip().splitlines()[-1]
        raise RankError(f"expected {ranks.count} ranks, one is gone: {how}") from error


@cache
def meeting_place() -> tuple[int, Any]:
    """A port of this machine, and the store behind it by which ranks find each other; one for the whole process."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    # a store for one does not wait for others, who cannot come before they know the port
    return port, core.TCPStore(HOST, port, True, 1, PATIENCE)


def join(number: int, count: int, name: int, port: int | None = None) -> Ranks:
    """Come together with the other ranks. name: of the group, another one each time; port: of rank 0's store.

    paddle.distributed.init_parallel_env makes its group once in a process; a process may lead several runs.
    """
    store = meeting_place()[1] if port is None else core.TCPStore(HOST, port, False, count, PATIENCE)
    # where paddle reads the number of a process
    os.environ["PADDLE_TRAINER_ID"] = str(number)
    return Ranks(number, count, core.ProcessGroupGloo.create(store, number, count, name))
