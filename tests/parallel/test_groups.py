"""Several processes: which group they join, and the line for one that does not come together."""

import contextlib
import os

import jax
import pytest

from taskexpert_jax.errors import UserError
from taskexpert_jax.parallel import distributed


@pytest.mark.parametrize(
    ("env", "flags", "expected"),
    [
        ({}, (None, None, None), None),
        ({}, ("a:1", 2, 0), ("a:1", 2, 0)),
        (
            {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"},
            (None, None, None),
            ("b:2", 3, 2),
        ),
        ({"JAX_COORDINATOR_ADDRESS": "b:2"}, ("a:1", 2, 1), ("a:1", 2, 1)),
    ],
)
def test_flags_come_before_the_environment(env, flags, expected):
    assert distributed.named_group(env, distributed.Wanted(*flags)) == expected


@pytest.mark.parametrize(
    ("env", "flags", "message"),
    [
        ({}, ("a:1", None, 0), r"--num_processes is missing"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, (None,) * 3, r"JAX_NUM_PROCESSES, JAX_PROCESS_ID is missing"),
        ({}, ("a", 2, 0), r"--coordinator=a\b.*HOST:PORT"),
        ({}, ("a:1", 2, 2), r"--process_id=2\b.*\b1$"),
    ],
)
def test_what_is_incomplete_is_named(env, flags, message):
    with pytest.raises(UserError, match=message):
        distributed.named_group(env, distributed.Wanted(*flags))


def test_srun_is_told_from_the_batch_script_around_it():
    assert distributed.is_slurm_step({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"})
    assert not distributed.is_slurm_step({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"})


@pytest.fixture
def start_with(monkeypatch):
    """Calls `start` with flags and JAX's part replaced by a function."""

    def start(initialize, coordinator=None, count=None, index=None, seconds=7):
        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        monkeypatch.setattr(distributed.connection, "watched", contextlib.nullcontext)
        return distributed.start(distributed.Wanted(coordinator, count, index, seconds))

    return start


@pytest.mark.parametrize(
    ("index", "reason", "line"),
    [
        (0, "std::bad_cast", "not all of 2 processes came to process 0 at 127.0.0.1:9 within --connect_timeout=7 s: "),
        (1, "std::bad_cast", "process 1 did not find process 0 and all others at 127.0.0.1:9 within "),
        (0, "Failed to start RPC server", "process 0 cannot listen at 127.0.0.1:9: another program does already; "),
    ],
)
def test_processes_that_do_not_find_each_other_say_what_to_check(index, reason, line, start_with, monkeypatch, capsys):
    def initialize(*arguments, **options):
        assert options["initialization_timeout"] == 7
        raise RuntimeError(reason)

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="2"):
        start_with(initialize, "127.0.0.1:9", 2, index)
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line}") and err.count("\n") == 1


def test_an_unknown_host_is_named_at_once(start_with):
    with pytest.raises(UserError, match=r"^the host of process 0, 'no\.such\.host\.invalid', is not known here: "):
        start_with(None, "no.such.host.invalid:1", 2, 1)
    with pytest.raises(UserError, match=r"^the host of process 0, 'two\.\.dots', is not known here: this is no name"):
        start_with(None, "two..dots:1", 2, 1)


def test_an_address_of_ipv6_in_brackets_is_known(start_with):
    calls = []
    start_with(lambda **named: calls.append(named), "[::1]:1234", 2, 1)
    assert [named["coordinator_address"] for named in calls] == ["[::1]:1234"]


def test_under_srun_jax_finds_the_group(start_with, monkeypatch):
    calls = []
    for name, value in {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}.items():
        monkeypatch.setenv(name, value)
    start_with(lambda *args, **named: calls.append((args, named)))
    assert calls == [((), {"initialization_timeout": 7})]
    with pytest.raises(UserError, match=r"^--mode=predict runs in one process"):
        distributed.refuse_several("predict", distributed.Wanted())
