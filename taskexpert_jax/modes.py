"""The modes of main.py: their flags, and what each one runs."""

import functools

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from taskexpert_jax import command_line, paths
from taskexpert_jax.config import check, read_run
from taskexpert_jax.parallel import agreement, distributed, processes, sharding
from taskexpert_jax.runs import config as run_config
from taskexpert_jax.runs import workdir as workdirs

_CONFIG = command_line.define_config("Config file: configs/nyud.py:vit_b16; default: the run's.")
_WORKDIR = paths.define("workdir", "The run's directory.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate", "predict", "compile"], "What to do.")
_EXTEND = flags.DEFINE_bool("extend", False, "For train: accept a larger num_steps than the run's.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "For evaluate and predict: best, latest or a step.")
_IMAGES = paths.define("images", "For predict: an image or a folder of images.")
_OUTPUT = paths.define("output", "For evaluate and predict: results; default in WORKDIR.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "For compile: v5e:4x4, h200:8, ...; default: this machine's devices.")
_REPORT = paths.define("report", "For compile: a JSON file to write the report to.")
_QUICK = flags.DEFINE_bool("quick", False, "For compile: memory and traffic only, in seconds; for TPUs.")
_LOADING, _COMPILING = ("checkpoint", "output"), ("topology", "report", "quick")
_OF_MODES = {"train": ("extend",), "evaluate": _LOADING, "predict": (*_LOADING, "images"), "compile": _COMPILING}
_INTERRUPTED = {
    "train": "interrupted; checkpoints are kept: the same command resumes",
    "predict": "interrupted; what was written is kept: the same command predicts all images anew",
}


def _program() -> None:
    command_line.refuse_flags_of_others(_MODE.value, _OF_MODES)
    with distributed.joined(_MODE.value):
        _run()


def _run() -> None:
    check(config := _CONFIG.value)
    if _MODE.value == "compile":
        from taskexpert_jax.compile import fit

        return fit.run(config, _TOPOLOGY.value, _REPORT.value, quick=_QUICK.value)
    workdir = paths.needed(_WORKDIR)
    changed = config_flags.get_override_values(flags.FLAGS["config"])
    if _MODE.value == "predict":
        from taskexpert_jax.predict import predict

        images, output = paths.needed(_IMAGES), _OUTPUT.value or workdir / "predictions"
        config = run_config.of_run(workdir, config, changed)
        return predict(config, workdir, _CHECKPOINT.value, images, output)

    from input_pipeline import pipeline  # hides accelerators from TensorFlow
    from taskexpert_jax.tasks import from_config

    agreement.refuse_other_programs(config, mode=_MODE.value, checkpoint=_CHECKPOINT.value, extend=_EXTEND.value)
    data = config
    if _MODE.value == "evaluate":
        config, data = run_config.for_evaluation(workdir, config, changed)
    else:
        agreement.refuse_unshared(workdir)  # by writing to it: a run that is evaluated may be read-only
    pipeline.record_fingerprint(data)
    agreement.refuse_other_data(data.dataset)
    tasks = from_config(data)

    def own(batch_size: int):  # rows of the global batch that this process reads
        return processes.batch_rows(sharding.make_mesh(config.mesh, {}), batch_size).own

    def eval_batches():
        return pipeline.eval_batches(data, tasks, batch_size=data.eval.batch_size, rows=own(data.eval.batch_size))

    if _MODE.value == "evaluate":
        from taskexpert_jax.evaluate import evaluate

        if data is config and (note := workdirs.note_other_data(workdir, data.dataset.fingerprint)):
            logging.warning(note)
        evaluate(config, workdir, _CHECKPOINT.value, eval_batches, _OUTPUT.value, data=data)
    else:
        from taskexpert_jax.train import train

        for split in (config.dataset.train_split, config.dataset.eval_split):
            pipeline.open_source(config.dataset, tasks, split)  # missing data is said before a workdir is made

        def train_batches(start_step: int):
            return pipeline.train_batches(config, tasks, start_step=start_step, rows=own(config.batch_size))

        train(config, workdir, train_batches, eval_batches, extend=_EXTEND.value)


def _own_config() -> ConfigDict | None:
    """The config of the run in --workdir, for modes that read a run; None for the others."""
    return read_run(paths.needed(_WORKDIR)) if _MODE.value in ("evaluate", "predict") else None


def main() -> None:
    """The program, dispatched on the mode."""
    nothing = "interrupted; nothing was written: the same command starts anew"
    command_line.run(
        _program,
        parse=functools.partial(command_line.parse_flags, own_config=_own_config),
        interrupted=lambda: _INTERRUPTED.get(_MODE.value, nothing),
    )
