"""Who may use how many cores: as the process is bound, as its container may, divided among ranks."""

import os
import subprocess
import sys

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from ssld import threads

BOUND = "from ssld import threads; print(threads.cores(), threads.share(), threads.of_step())"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(cores, quota): a process bound to so many cores, in a container with that quota."""

    def make(cores, quota=None):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        if quota is not None:
            (tmp_path / "cpu.max").write_text(quota)
        monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")

    return make


@pytest.mark.parametrize(
    ("bound", "quota", "cores"),
    [
        (6, None, 6),
        (6, "max 100000\n", 6),
        (6, "200000 100000\n", 2),
        (6, "150000 100000\n", 2),
        (6, "20000 100000\n", 1),
        (2, "800000 100000\n", 2),
    ],
)
def test_cores_are_those_of_the_process_and_of_its_container(machine, bound, quota, cores):
    machine(bound, quota)
    assert threads.cores() == cores


@pytest.mark.parametrize(("ranks", "share"), [(None, 6), ("1", 6), ("4", 1), ("3", 2), ("9", 1)])
def test_ranks_share_the_cores(machine, monkeypatch, ranks, share):
    machine(6)
    monkeypatch.delenv("SSLD_RANKS", raising=False)
    if ranks is not None:
        monkeypatch.setenv("SSLD_RANKS", ranks)
    assert threads.share() == share
    assert threads.cores() == 6


@pytest.mark.parametrize(
    ("openmp", "mkl", "wanted"), [(None, None, 1), ("3", None, 3), ("3", "2", 2), (None, "2", 2), ("4", "", 4)]
)
def test_a_step_has_the_threads_that_the_user_asks_for(monkeypatch, openmp, mkl, wanted):
    for name, value in (("OMP_NUM_THREADS", openmp), ("MKL_NUM_THREADS", mkl)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert threads.of_step() == wanted


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_a_process_that_is_bound_to_one_core_has_one():
    core = min(os.sched_getaffinity(0))
    bind = f"import os; os.sched_setaffinity(0, {{{core}}}); "
    found = subprocess.run([sys.executable, "-c", bind + BOUND], capture_output=True, text=True, check=True)
    assert found.stdout.split()[:2] == ["1", "1"]


def test_numpys_products_have_one_thread():
    with threadpool_limits(2, user_api="blas"):
        threads.one()
        assert {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"} == {1}
    threads.one()
