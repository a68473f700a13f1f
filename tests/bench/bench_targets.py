"""What the measuring process is told to run by the tests of `coterie.bench.memory`; it imports this file by name."""

from collections.abc import Callable

MIB = 2**20


def held_and_freed(held: int, freed: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A call that takes `freed` MiB, gives them back and returns `held` MiB: outside torch, as a C++ kernel would."""

    def call() -> object:
        scratch = bytearray(b"\1" * (freed * MIB))
        del scratch
        return bytearray(b"\1" * (held * MIB))

    return lambda: None, call


def broken() -> tuple[Callable[[], object], Callable[[], object]]:
    """A job that cannot be set up."""
    raise RuntimeError("no such kernel")


def endless() -> tuple[Callable[[], object], Callable[[], object]]:
    """A job that never ends."""
    while True:
        pass
