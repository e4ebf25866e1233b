"""The compilation cache: where the programs keep what they compile, that a second start has it, and its faults."""

import os
import pathlib
import types

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache
import jax.numpy as jnp
import pytest

from configs import demo
import taskexpert_jax
from taskexpert_jax import compilation_cache, modes, serve, storage
from taskexpert_jax.errors import UserError

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_enable_xla_caches")
VARIABLE = "JAX_COMPILATION_CACHE_DIR"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home of its own and no other settings; JAX's are restored."""
    monkeypatch.delenv(VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    kept = {name: getattr(jax.config, name) for name in SETTINGS}
    yield tmp_path / "home"
    for name, value in kept.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


@pytest.fixture
def start(monkeypatch):
    """Compiles a program as a fresh start would, and returns (its result, times it was found, times it was kept)."""
    seen = []
    monkeypatch.setattr(jax._src.monitoring, "_event_listeners", [lambda event, **_: seen.append(event.split("/")[-1])])

    def run():
        seen.clear()
        jax.clear_caches()
        jax_cache.reset_cache()
        return float(jax.jit(lambda x: jnp.sin(x) + 1)(0.0)), seen.count("cache_hits"), seen.count("cache_misses")

    return run


def test_the_flag_comes_before_the_variable_and_that_before_the_default(home, monkeypatch):
    def chosen(flag=None, workdir=None, several=""):
        found = compilation_cache.chosen(flag, workdir, several)
        return None if found is None else str(found)

    assert chosen() == chosen(workdir=pathlib.Path("run")) == f"{home}/.cache/taskexpert_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, by the specification
    assert chosen() == f"{home}/.cache/taskexpert_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/me")
    assert chosen() == "/scratch/me/taskexpert_jax"
    assert chosen(workdir=pathlib.Path("run"), several="tpu") == "run/compilation_cache"
    assert chosen(several="tpu") == "/scratch/me/taskexpert_jax"
    assert chosen(workdir=pathlib.Path("run"), several="cpu") is None  # the first alone would find its programs
    monkeypatch.setenv(VARIABLE, "of_variable")
    assert chosen() == chosen(workdir=pathlib.Path("run"), several="cpu") == "of_variable"
    assert chosen("~/of_flag") == f"{home}/of_flag"
    assert chosen("") is None
    monkeypatch.setenv(VARIABLE, "")
    assert chosen() is None


def test_a_run_that_is_trained_in_a_bucket_keeps_its_programs_there(bucket):
    workdir = storage.path(bucket) / "run"
    assert str(compilation_cache.chosen(None, workdir, "")) == f"{bucket}/run/compilation_cache"
    assert not storage.is_bucket(compilation_cache.chosen(None, None, ""))  # one that is evaluated is not trusted


def test_a_second_start_compiles_nothing(home, start, capsys):
    compilation_cache.enable(None)
    assert [start(), start()] == [(1.0, 0, 1), (1.0, 1, 0)]
    folder = home / ".cache/taskexpert_jax"
    assert list(folder.glob("*-cache"))
    assert folder.stat().st_mode & 0o077 == 0  # who can write there can have anything executed
    line = f"compiled programs are kept in {folder}; --compilation_cache= turns this off\n"
    assert capsys.readouterr().err == line
    compilation_cache.enable(None)
    assert capsys.readouterr().err == ""  # it is there already


def test_a_second_start_compiles_nothing_with_a_cache_in_a_bucket(bucket, start):
    compilation_cache.enable(None, storage.path(bucket))
    assert [start(), start()] == [(1.0, 0, 1), (1.0, 1, 0)]
    (name,) = storage.listed(storage.path(bucket))
    assert name.startswith("compilation_cache/jit__lambda") and name.endswith("-cache")
    assert jax.config.jax_persistent_cache_enable_xla_caches == "none"  # XLA itself opens no gs:// addresses


def test_nothing_is_kept_where_it_is_switched_off(home, start):
    compilation_cache.enable("")
    assert [start(), start()] == [(1.0, 0, 0), (1.0, 0, 0)]
    assert not home.exists()


def test_a_damaged_program_is_compiled_again_with_a_warning(tmp_path, start):
    compilation_cache.enable(str(tmp_path / "cache"))
    start()
    (entry,) = (tmp_path / "cache").glob("*-cache")
    entry.write_bytes(entry.read_bytes()[:100])  # as a killed program leaves it
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        assert start()[:2] == (1.0, 0)


def test_a_folder_that_cannot_be_used_ends_only_what_asked_for_it(home, tmp_path, start, capsys):
    home.write_text("a file")
    compilation_cache.enable(None)
    assert start() == (1.0, 0, 0)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"^--compilation_cache=.*/home/cache cannot be used: Not a directory; give"):
        compilation_cache.enable(str(home / "cache"))
    with pytest.raises(UserError, match=r"^--compilation_cache='s3://bucket': s3:// addresses are not supported"):
        compilation_cache.enable("s3://bucket")


def test_a_bucket_that_cannot_be_used_is_a_warning(store, start, monkeypatch, capsys):
    missing = "gs://no-such-bucket-here/cache"
    monkeypatch.setenv(VARIABLE, missing)
    compilation_cache.enable(None)
    assert start() == (1.0, 0, 0)
    reason = "the bucket does not exist; create it, or check its name"
    assert capsys.readouterr().err == f"warning: compiled programs are not kept in {missing}: {reason}\n"
    with pytest.raises(UserError, match=f"^--compilation_cache={missing} cannot be used: {reason}"):
        compilation_cache.enable(missing)


def test_the_cache_has_a_largest_size(tmp_path):
    for age, name in enumerate(("new", "old", "older", "oldest")):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(bytes(10))
        os.utime(path, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "older-cache", (2e9, 1e9))  # read since
    (tmp_path / "of_others").write_bytes(bytes(100))
    compilation_cache.prune(tmp_path, 25)
    assert {path.name for path in tmp_path.iterdir()} == {"new-cache", "older-cache", "of_others"}


@pytest.mark.parametrize("mode", ["train", "evaluate", "predict", "export"])
def test_the_modes_that_compile_use_the_flag(mode, monkeypatch):
    assert compilation_cache.FLAG in modes.MODES[mode].flags
    monkeypatch.setattr(modes, "_CACHE", types.SimpleNamespace(value="s3://bucket"))
    monkeypatch.setattr(modes, "_run_folder", lambda: pathlib.Path("run"))
    monkeypatch.setattr(modes.paths, "needed", lambda flag: pathlib.Path("run"))
    with pytest.raises(UserError, match=r"^--compilation_cache='s3://bucket'"):
        modes.MODES[mode].run(demo.get_config("tiny"))


def test_other_programs_use_it_too(capsys):
    assert serve.main(["demo", "--compilation_cache=s3://bucket"]) == 2
    assert capsys.readouterr().err.startswith("error: --compilation_cache='s3://bucket'")
    assert compilation_cache.FLAG not in modes.MODES["compile"].flags  # it compiles for devices that are absent


def test_importing_and_loading_change_no_setting_of_jax(home):
    jax.config.update("jax_compilation_cache_dir", None)
    taskexpert_jax.load_run("demo")
    assert jax.config.jax_compilation_cache_dir is None
    assert not home.exists()
