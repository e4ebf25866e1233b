"""Fixtures of the tests of folder data sets."""

import pathlib

from ml_collections import ConfigDict
import pytest

from tests.input_pipeline import labelled_folder


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    return labelled_folder.write(tmp_path)


@pytest.fixture
def config(root: pathlib.Path) -> ConfigDict:
    return labelled_folder.config_of(root)
