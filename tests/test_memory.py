"""Memory that is freed is used again: counted by the pages that a process is given."""

import ctypes

import pytest

from sppnet_jax.run import memory
from tests.processes import run_program

LINUX = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library isn't glibc"
)
PAGES = 64 * 2**20 // 4096  # of one block
BLOCKS = """
import resource
import numpy as np

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1])

def in_turn():  # blocks of 64 MiB, each freed before the next, and a larger one
    np.ones(2**24, np.float32)
    before = faults()
    for size in (2**24, 2**24, 2**24 + 2**20):
        np.ones(size, np.float32)
    return faults() - before
"""
IN_A_PROGRAM = f"""{BLOCKS}
import sppnet_jax
from sppnet_jax.run.memory import give_back, large_blocks_go_back
print(in_turn())
print(sppnet_jax.keep_memory())
print(in_turn())
kept = resident()
give_back()
print(kept - resident())
before = resident()
with large_blocks_go_back():
    np.ones(2**24, np.float32)
    print(resident() - before)
print(in_turn())
"""
IN_A_COMMAND = f"""{BLOCKS}
from sppnet_jax import cli
from sppnet_jax.training.network_settings import NetworkSettings
cli.run(lambda argv: print(in_turn()), NetworkSettings)
"""


def run(program, **environment):
    # NumPy alone asks for huge pages, one fault for 512 pages.
    own = {"SPPNET_JAX_KEEP_MEMORY": "", "NUMPY_MADVISE_HUGEPAGE": "0"}
    return run_program(program, **{**own, **environment}).stdout.splitlines()


@LINUX
def test_a_program_that_keeps_memory_is_given_hardly_a_page_for_what_it_has_freed():
    before, said, after, given_back, left, again = run(IN_A_PROGRAM)
    assert int(before) > 3 * PAGES
    assert said.startswith("freed memory stays with this process")
    assert int(after) < PAGES / 4
    assert int(given_back) > 0.9 * PAGES
    assert int(left) < PAGES / 4
    assert int(again) < PAGES / 4


@LINUX
def test_every_command_keeps_memory_unless_the_environment_says_no():
    (kept,) = run(IN_A_COMMAND)
    (fresh,) = run(IN_A_COMMAND, SPPNET_JAX_KEEP_MEMORY="0")
    assert int(kept) < int(fresh) / 5


def test_it_says_what_turned_it_off(monkeypatch):
    monkeypatch.setenv("SPPNET_JAX_KEEP_MEMORY", "0")
    said = "freed memory goes back to the operating system: SPPNET_JAX_KEEP_MEMORY is 0"
    assert memory.keep_memory() == said


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.delenv("SPPNET_JAX_KEEP_MEMORY", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert memory.keep_memory() == "nothing changed: this C library has no mallopt"
    memory.give_back()
