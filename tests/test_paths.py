"""Paths that users give."""

import argparse
import pathlib
import re
import sys

from absl import flags
import pytest

from configs import nyud
from taskexpert_jax import paths
from taskexpert_jax.config import check
from taskexpert_jax.errors import UserError

REFUSED = [
    "s3://bucket",
    "gs://",
    "gs://B/run",
    "gs://bucket/a//b",
    "gs://bucket/../b",
    "gs:/bucket/run",
    "gs:bucket/run",
    " gs://bucket/run",
    "gs://bucket/run?1",
    "gs://bucket/run#1/x",
    "gs://bucket/a\tb",
    "gs://bucket/a\x1bb",
    "gs://bucket/a\udc80b",
    f"gs://bucket/{'ä' * 400}",
    "file:///tmp/x",
    "hf://o/n",
    "~no-such-user/run",
    "",
    "  ",
    "a\0b",
]


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_path_is_refused_everywhere(text):
    with pytest.raises(UserError, match=r"^config\.x="):
        paths.local(text, "config.x")
    with pytest.raises(argparse.ArgumentTypeError):
        paths.argument(text)
    with pytest.raises(ValueError, match=r"."):
        paths._PathParser().parse(text)
    for field in ("dataset.data_dir", "model.pretrained"):
        if field == "model.pretrained" and text == "hf://o/n":
            continue  # see below
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


@pytest.mark.parametrize("text", ["gs://bucket", "gs://bucket/run", "gs://my.bucket-1/a b/c.py/", "gs://abc/ä"])
def test_addresses_in_buckets_are_paths(text):
    for found in (paths.local(text, "x"), paths.argument(text), paths._PathParser().parse(text)):
        assert isinstance(found, pathlib.Path) and str(found) == text.rstrip("/")
        assert str(found / "x") == f"{text.rstrip('/')}/x"


def test_without_googles_package_the_line_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("taskexpert_jax.storage.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "google.cloud", None)
    with pytest.raises(argparse.ArgumentTypeError, match=r'pip install "taskexpert-jax\[gcs\]"'):
        paths.argument("gs://bucket/run")


def test_the_home_directory_is_filled_in(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert paths.local("~/run", "x") == paths.argument("~/run") == pathlib.Path("/home/me/run")


MODELS = {
    "hf://o/n": ("o/n", "", ""),
    "hf:/o/n": ("o/n", "", ""),  # as a Path writes it
    "hf://o/n.x-1@v1.0": ("o/n.x-1", "v1.0", ""),
    "hf://o/n/a/b/": ("o/n", "", "a/b"),
    "hf://o/n@refs%2Fpr%2F1/a": ("o/n", "refs/pr/1", "a"),
}


@pytest.mark.parametrize(("text", "parts"), MODELS.items())
def test_a_model_on_the_hub_has_an_address_where_models_are_read(text, parts):
    assert paths.refusal(text, hub=True) is None and paths.is_hub(text)
    assert paths.model_argument(text) == paths._PathParser(hub=True).parse(text) == pathlib.Path(text)
    address = paths.address(pathlib.Path(text), "--x")
    assert address == parts and paths.address(str(address), "--x") == address
    config = nyud.get_config("tiny")
    config.model.pretrained = text
    check(config)


@pytest.mark.parametrize(
    "text", ["hf://o", "hf://o/..", "hf://o/n/../../x", "hf://o/n@", "hf://o/n@../x", "hf://o/n/*"]
)
def test_an_address_of_another_form_is_one_line(text):
    reason = r"is no address of a model on the hub; give hf://OWNER/NAME\[@REVISION\]\[/SUBFOLDER\]$"
    with pytest.raises(UserError, match=rf"^--x={re.escape(text)}: {reason}"):
        paths.address(text, "--x")
    with pytest.raises(argparse.ArgumentTypeError, match=reason):
        paths.model_argument(text)
    config = nyud.get_config("tiny")
    config.model.pretrained = text
    with pytest.raises(UserError, match=r"or hf://OWNER/NAME"):
        check(config)


def test_a_flag_takes_an_address_only_where_a_model_is_read():
    flag = paths.define("model_of_this_test", "A model.", hub=True)
    try:
        flags.FLAGS(["program", "--model_of_this_test=hf://o/n@v"])
        assert paths.needed(flag, hub=True) == pathlib.Path("hf:/o/n@v")
        with pytest.raises(UserError, match=r"^--model_of_this_test=hf://o/n@v: hf:// addresses are for a trained"):
            paths.needed(flag)
    finally:
        delattr(flags.FLAGS, "model_of_this_test")
