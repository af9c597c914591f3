"""A finished run of each method, trained once; it is only read."""

import json

import pytest
from tests.lab.tiny_runs import tiny_settings

from lamella.lab.runs.run import train


@pytest.fixture(scope="session")
def finished_run(bert, questions, tmp_path_factory):
    made = {}

    def make(method):
        key = json.dumps(method)
        if key not in made:
            made[key] = train(tiny_settings(bert, questions, method), tmp_path_factory.mktemp("finished") / "run")
        return made[key]

    return make
