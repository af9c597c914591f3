import pytest

from benchmarks.__main__ import run


@pytest.fixture(scope="session")
def record():
    """The record of a benchmark's quick run, made once."""
    records = {}

    def of(name):
        if name not in records:
            records[name] = run(name, [], quick=True)
        return records[name]

    return of
