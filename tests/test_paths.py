"""Paths that users give."""

import argparse
import pathlib

import pytest

from configs import nyud
from taskexpert_jax import paths
from taskexpert_jax.config import check
from taskexpert_jax.errors import UserError

REFUSED = ["gs://bucket/run", "s3://bucket", "gs:/bucket/run", "file:///tmp/x", "~no-such-user/run", "", "  ", "a\0b"]


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_local_path_is_refused_everywhere(text):
    with pytest.raises(UserError, match=r"^config\.x="):
        paths.local(text, "config.x")
    with pytest.raises(argparse.ArgumentTypeError):
        paths.argument(text)
    with pytest.raises(ValueError, match=r"."):
        paths._PathParser().parse(text)
    for field in ("dataset.data_dir", "model.pretrained"):
        config = nyud.get_config("tiny")
        config.update_from_flattened_dict({field: text})
        if field == "model.pretrained" and text == "":
            check(config)  # no weights
        else:
            with pytest.raises(UserError, match=rf"^config\.{field}="):
                check(config)


@pytest.mark.parametrize("text", ["run", "a:b/c", "./~run", "x://y"[:2], "...png", "C:x"])
def test_odd_names_are_paths(text):
    assert paths.local(text, "x") == paths.argument(text) == pathlib.Path(text)


def test_the_home_directory_is_filled_in(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert paths.local("~/run", "x") == paths.argument("~/run") == pathlib.Path("/home/me/run")
