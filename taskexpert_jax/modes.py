"""The modes of main.py: their flags, and what each one runs.

A mode is a row of `MODES`. What it needs is imported when it runs, so that --help and wrong flags need no JAX.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import pathlib
import sys
from typing import Any, NamedTuple

from absl import flags, logging
from ml_collections import ConfigDict, config_flags
import numpy as np

from taskexpert_jax import command_line, compilation_cache, paths
from taskexpert_jax.config import check, read_run
from taskexpert_jax.tasks import Task

_CONFIG = command_line.define_config("Config file: configs/nyud.py:vit_b16; default: the run's.")
_WORKDIR = paths.define("workdir", "The run's directory; to evaluate or predict also a released model.", hub=True)
_EXTEND = flags.DEFINE_bool("extend", False, "For train: accept a larger num_steps than the run's.")
_PREEMPTED_STATUS = flags.DEFINE_integer(
    "preempted_status",
    0,
    "For train: exit status after SIGTERM; with 143, a launcher can tell a preempted run from a finished one.",
    lower_bound=0,
    upper_bound=255,
)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "For evaluate, predict and export: best, latest or a step.")
_IMAGES = paths.define("images", "For predict: an image or a folder of images.")
_OUTPUT = paths.define(
    "output",
    "For evaluate, predict and export: results; default: in WORKDIR, or in the current folder for a released model.",
)
_FORMAT = flags.DEFINE_enum(
    "format", "jax", ["jax", "saved_model", "onnx"], "For export: only jax; docs/export.md says why."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "For compile: v5e:4x4, '2x v5e:4x4', h200:8, ...; default: this machine's devices."
)
_REPORT = paths.define("report", "For compile: a JSON file to write the report to.")
_QUICK = flags.DEFINE_bool("quick", False, "For compile: memory and traffic only, in seconds; for TPUs.")
_CACHE = flags.DEFINE_string(compilation_cache.FLAG, None, compilation_cache.HELP)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "Several processes: HOST:PORT where process 0 listens.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Several processes: their number.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Several processes: index of this one, from 0.")
_CONNECT_TIMEOUT = flags.DEFINE_integer(
    "connect_timeout", 300, "Several processes: seconds that they wait for each other at the start.", lower_bound=1
)
_OF_SEVERAL = tuple(flag.name for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID, _CONNECT_TIMEOUT))


def _train(config: ConfigDict) -> None:
    from input_pipeline import pipeline  # hides accelerators from TensorFlow
    from taskexpert_jax.models.build import build_model
    from taskexpert_jax.parallel import agreement
    from taskexpert_jax.train import train

    workdir = paths.needed(_WORKDIR)
    compilation_cache.enable(_CACHE.value, workdir)
    _refuse_other_programs(config)
    agreement.refuse_unshared(workdir)  # by writing to it: a run that is evaluated may be read-only
    build_model(config)  # a task, backbone or decoder that does not exist is said before missing data
    tasks = _tasks_on_same_data(config)
    for split in (config.dataset.train_split, config.dataset.eval_split):
        pipeline.open_source(config.dataset, tasks, split)  # missing data is said before a workdir is made

    def train_batches(start_step: int) -> Iterator[Any]:
        return pipeline.train_batches(config, tasks, start_step=start_step, rows=_rows(config, config.batch_size))

    wanted = {"extend": _EXTEND.value, "preempted_status": _PREEMPTED_STATUS.value}
    train(config, workdir, train_batches, _eval_batches(config, tasks), **wanted)


def _evaluate(config: ConfigDict) -> None:
    from taskexpert_jax.evaluate import evaluate
    from taskexpert_jax.runs import config as run_config
    from taskexpert_jax.runs import workdir as workdirs

    workdir = _run_folder()
    compilation_cache.enable(_CACHE.value)
    _refuse_other_programs(config)
    config, data = run_config.for_evaluation(workdir, config, _changed())
    batches = _eval_batches(data, _tasks_on_same_data(data))
    if data is config and (note := workdirs.note_other_data(workdir, data.dataset.fingerprint)):
        logging.warning(note)
    evaluate(config, workdir, _CHECKPOINT.value, batches, _OUTPUT.value, data=data)


def _predict(config: ConfigDict) -> None:
    from taskexpert_jax.predict import predict
    from taskexpert_jax.runs import config as run_config
    from taskexpert_jax.runs import released

    workdir, images = _run_folder(), paths.needed(_IMAGES)
    compilation_cache.enable(_CACHE.value)
    output = released.results_folder(workdir, "predictions", _OUTPUT.value)
    predict(run_config.of_run(workdir, config, _changed()), workdir, _CHECKPOINT.value, images, output)


def _export(config: ConfigDict) -> None:
    from taskexpert_jax.export import export
    from taskexpert_jax.runs import config as run_config
    from taskexpert_jax.runs import released

    workdir = _run_folder()
    compilation_cache.enable(_CACHE.value)
    output = released.results_folder(workdir, "exported", _OUTPUT.value)
    export(run_config.of_run(workdir, config, _changed()), workdir, _CHECKPOINT.value, output, _FORMAT.value)


def _run_folder() -> pathlib.Path:
    """The folder of --workdir, which may be a name or an address of a released model."""
    from taskexpert_jax.runs import hub

    return hub.located(paths.needed(_WORKDIR, hub=True))


def _compile(config: ConfigDict) -> None:
    from taskexpert_jax.compile import fit

    fit.run(config, _TOPOLOGY.value, _REPORT.value, quick=_QUICK.value)


class Mode(NamedTuple):
    """A mode of main.py.

    Attributes:
      run: the program, called with the config.
      flags: those of its flags that not all modes have.
      interrupted: the line for Ctrl-C.
      several: it may run as several processes.
      reads_run: the config is that of the run in --workdir, unless --config is given.
    """

    run: Callable[[ConfigDict], None]
    flags: tuple[str, ...]
    interrupted: str = "interrupted; nothing was written: the same command starts anew"
    several: bool = False
    reads_run: bool = False


MODES = {
    "train": Mode(
        _train,
        ("extend", "preempted_status", compilation_cache.FLAG),
        "interrupted; checkpoints are kept: the same command resumes",
        several=True,
    ),
    "evaluate": Mode(_evaluate, ("checkpoint", "output", compilation_cache.FLAG), several=True, reads_run=True),
    "predict": Mode(
        _predict,
        ("checkpoint", "output", "images", compilation_cache.FLAG),
        "interrupted; what was written is kept: the same command predicts all images anew",
        reads_run=True,
    ),
    "export": Mode(_export, ("checkpoint", "output", "format", compilation_cache.FLAG), reads_run=True),
    "compile": Mode(_compile, ("topology", "report", "quick")),
}
_MODE = flags.DEFINE_enum("mode", "train", list(MODES), "What to do.")


def main() -> None:
    """The program, dispatched on the mode."""
    command_line.run(
        _program,
        doc=None if command_line.by_script() else sys.modules["__main__"].__doc__,
        shown=_shown,
        parse=functools.partial(command_line.parse_flags, own_config=_own_config),
        interrupted=lambda: MODES[_MODE.value].interrupted,
    )


def _shown(flag: str) -> bool:
    """True if --help lists a flag: with a mode before it, those of the mode; `taskexpert MODE` takes the run as RUN."""
    given = [argument.partition("=")[2] for argument in sys.argv if argument.startswith("--mode=")]
    mode = MODES.get(given[-1]) if given else None
    if mode is None:
        return True
    if flag in _OF_SEVERAL:
        return mode.several
    if flag in ("mode", "workdir"):
        return not command_line.by_script()
    return flag in mode.flags or not any(flag in other.flags for other in MODES.values())


def _program() -> None:
    mode = MODES[_MODE.value]
    command_line.refuse_flags_of_others(_MODE.value, {name: other.flags for name, other in MODES.items()})
    from taskexpert_jax.parallel import distributed

    group = distributed.Wanted(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, timeout=_CONNECT_TIMEOUT.value
    )
    if not mode.several:
        distributed.refuse_several(_MODE.value, group)
    with distributed.joined(group) if mode.several else contextlib.nullcontext():
        check(config := _CONFIG.value)
        mode.run(config)


def _own_config() -> ConfigDict | None:
    """The config of the run in --workdir, for modes that read a run; None for the others."""
    return read_run(_run_folder()) if MODES[_MODE.value].reads_run else None


def _changed() -> dict[str, Any]:
    """Values of --config.FIELD=VALUE by field."""
    return config_flags.get_override_values(flags.FLAGS["config"])


def _refuse_other_programs(config: ConfigDict) -> None:
    from taskexpert_jax.parallel import agreement

    given = {"mode": _MODE.value, "checkpoint": _CHECKPOINT.value, "extend": _EXTEND.value}
    agreement.refuse_other_programs(config, _CONNECT_TIMEOUT.value, **given)


def _tasks_on_same_data(config: ConfigDict) -> tuple[Task, ...]:
    """Tasks of a config whose data are the same in all processes; records the data's fingerprint in it."""
    from input_pipeline import pipeline
    from taskexpert_jax.parallel import agreement
    from taskexpert_jax.tasks import from_config

    pipeline.record_fingerprint(config)
    agreement.refuse_other_data(config.dataset, _CONNECT_TIMEOUT.value)
    return from_config(config)


def _eval_batches(config: ConfigDict, tasks: tuple[Task, ...]) -> Callable[[], Iterator[Any]]:
    """Function that opens the evaluation split anew."""
    from input_pipeline import pipeline

    size = config.eval.batch_size
    return lambda: pipeline.eval_batches(config, tasks, batch_size=size, rows=_rows(config, size))


def _rows(config: ConfigDict, batch_size: int) -> np.ndarray:
    """Rows of the global batch that this process reads."""
    from taskexpert_jax.parallel import processes, sharding

    return processes.batch_rows(sharding.make_mesh(config.mesh, {}), batch_size).own
