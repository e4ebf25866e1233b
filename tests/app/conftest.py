"""A tiny run with random parameters, and one whose depth has diverged."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import demo
import taskexpert_jax
from tests import random_runs


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "tiny"
    random_runs.save(demo.get_config("tiny"), workdir)
    return taskexpert_jax.load_run(workdir)


@pytest.fixture(scope="session")
def diverged(run):
    def broken(path, leaf):
        return leaf * np.nan if "depth" in jax.tree_util.keystr(path) else leaf

    params = jax.tree_util.tree_map_with_path(broken, run.variables["params"])
    return dataclasses.replace(run, variables={**run.variables, "params": params})
