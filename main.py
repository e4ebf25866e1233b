"""TaskExpert-JAX: train, evaluate, predict. See README.md.

python main.py --config=configs/nyud.py:vit_l16 --workdir=DIR                            # train, or resume
python main.py --mode=evaluate --config=configs/nyud.py:vit_l16 --workdir=DIR            # a checkpoint's metrics
python main.py --mode=predict --config=... --workdir=DIR --images=FILE_OR_DIR --output=DIR
python main.py --mode=compile --config=... --topology=v5e:4x4       # memory and traffic, without the hardware
"""

import pathlib

from absl import flags, logging
from ml_collections import config_flags

from taskexpert_jax import command_line
from taskexpert_jax.config import check
from taskexpert_jax.errors import UserError
from taskexpert_jax.parallel import distributed, processes, sharding
from taskexpert_jax.runs import workdir as workdirs

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file and variant: configs/nyud.py:vit_b16.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate", "predict", "compile"], "What to do.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "For evaluate and predict: best, latest or a step.")
_IMAGES = flags.DEFINE_string("images", None, "For predict: an image or a folder of images.")
_OUTPUT = flags.DEFINE_string("output", None, "For evaluate and predict: results; default in WORKDIR.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "For compile: v5e:4x4, h200:8, ...; default: this machine's devices.")
_REPORT = flags.DEFINE_string("report", None, "For compile: a JSON file to write the report to.")
_QUICK = flags.DEFINE_bool("quick", False, "For compile: memory and traffic only, in seconds; for TPUs.")


def main() -> None:
    """The program, dispatched on the mode."""
    with distributed.joined(_MODE.value):
        _run()


def _run() -> None:
    check(config := _CONFIG.value)
    if _MODE.value == "compile":
        from taskexpert_jax.compile import fit

        report = pathlib.Path(_REPORT.value) if _REPORT.value else None
        fit.run(config, _TOPOLOGY.value, report, quick=_QUICK.value)
        return
    if _WORKDIR.value is None:
        raise UserError("flag --workdir=None: Flag --workdir must have a value other than None.")
    workdir = pathlib.Path(_WORKDIR.value)
    if _MODE.value == "predict":
        from taskexpert_jax.predict import predict

        if _IMAGES.value is None:
            raise UserError("--mode=predict needs --images=FILE_OR_FOLDER")
        output = pathlib.Path(_OUTPUT.value) if _OUTPUT.value else workdir / "predictions"
        return predict(config, workdir, _CHECKPOINT.value, pathlib.Path(_IMAGES.value), output)

    from input_pipeline import pipeline  # hides accelerators from TensorFlow
    from taskexpert_jax.tasks import from_config

    distributed.refuse_unshared(workdir)
    pipeline.record_fingerprint(config)
    tasks = from_config(config)

    def own(batch_size: int):  # rows of the global batch that this process reads
        return processes.batch_rows(sharding.make_mesh(config.mesh, {}), batch_size).own

    def eval_batches():
        return pipeline.eval_batches(config, tasks, batch_size=config.eval.batch_size, rows=own(config.eval.batch_size))

    if _MODE.value == "evaluate":
        from taskexpert_jax.evaluate import evaluate

        if note := workdirs.note_other_data(workdir, config.to_dict()):
            logging.warning(note)
        output = pathlib.Path(_OUTPUT.value) if _OUTPUT.value else workdir / "evaluation"
        evaluate(config, workdir, _CHECKPOINT.value, eval_batches, output)
    else:
        from taskexpert_jax.train import train

        for split in (config.dataset.train_split, config.dataset.eval_split):
            pipeline.open_source(config.dataset, tasks, split)  # missing data is said before a workdir is made

        def train_batches(start_step: int):
            return pipeline.train_batches(config, tasks, start_step=start_step, rows=own(config.batch_size))

        train(config, workdir, train_batches, eval_batches)


def _interrupted() -> str:
    kept = {
        "train": "checkpoints are kept: the same command resumes",
        "predict": "what was written is kept: the same command predicts all images anew",
    }
    return f"interrupted; {kept.get(_MODE.value, 'nothing was written: the same command starts anew')}"


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main, interrupted=_interrupted)
