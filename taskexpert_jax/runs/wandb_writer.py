"""Weights & Biases (`config.log.wandb`): the scalars and images that TensorBoard gets, under one W&B run per workdir.

W&B never ends or blocks a run: without a login or a server it records in WORKDIR/wandb, and after an error no more.
"""

from collections.abc import Callable, Mapping
import importlib
import json
import pathlib
import secrets
import sys
from typing import Any

from absl import logging
import numpy as np

from taskexpert_jax import files, json_file, storage
from taskexpert_jax.errors import StoreError, UserError

_SECONDS_TO_START = 30  # to reach the server, else the run is recorded offline
_SECONDS_TO_FINISH = 30  # to upload what is left; the rest is in WORKDIR/wandb
_STEP = "step"  # W&B's own step can only increase, and a resumed run repeats steps


def installed() -> Any:
    """The package `wandb`.

    Raises:
      UserError: it cannot be imported.
    """
    try:
        wandb = importlib.import_module("wandb")
        _ = wandb.init  # a folder `wandb` in the working directory is importable too, and empty
    except (ImportError, AttributeError) as error:
        raise UserError(
            'config.log.wandb needs the package wandb: pip install "taskexpert-jax[wandb]"; or leave the field empty'
        ) from error
    return wandb


class WandbWriter:
    """Sends scalars and images to a W&B run, in the form of `clu.metric_writers.MetricWriter`.

    Args:
      project: PROJECT or ENTITY/PROJECT.
      workdir: the run's directory. wandb.json keeps the id of the W&B run, and wandb/ what W&B records; of a run in a
        bucket, that is in the current folder.
      config: uploaded.
      resumed: continues the W&B run of wandb.json, if it is of the same project; otherwise a new one begins.
    """

    def __init__(self, project: str, workdir: pathlib.Path, config: Mapping[str, Any], *, resumed: bool):
        self._wandb = installed()
        self._folder = pathlib.Path("wandb") if storage.is_bucket(workdir) else workdir / "wandb"
        record = workdir / "wandb.json"
        known = _known_id(record, project) if resumed else None
        run_id = known or secrets.token_hex(4)
        if known is None:
            files.write({record: json.dumps({"project": project, "id": run_id}) + "\n"})
        entity, _, name = project.rpartition("/")
        self._run: Any = self._start(
            project=name,
            entity=entity or None,
            id=run_id,
            name=None if known else workdir.resolve().name,
            resume="allow",  # not "must": what was recorded offline may not be on the server yet
            reinit="create_new",
            dir=str(self._folder.parent),
            config=dict(config),
        )
        self._try(self._define_step)

    def _start(self, **options: Any) -> Any:
        """The W&B run: online, or offline without a login or a server; None if there can be none."""
        wandb = self._wandb
        settings = wandb.Settings(
            init_timeout=_SECONDS_TO_START,
            finish_timeout=_SECONDS_TO_FINISH,
            finish_timeout_raises=True,
            console="off",  # stdout and stderr stay as they are
            silent=True,
        )
        try:
            mode = wandb.setup(settings).settings.mode  # WANDB_MODE
            # `init` would ask for a key on a terminal, and wait for a server that cannot be reached.
            if mode == "online" and wandb.run is None and not wandb.login(prompt=False):
                raise RuntimeError("not logged in, see `wandb login`")
            run = wandb.init(**options, settings=settings)
            where = {"online": run.url, "offline": f"offline, `wandb sync {self._folder}` uploads it"}
            logging.info(f"W&B: {where.get(mode, mode)}")
            return run
        except Exception as error:
            logging.warning(f"W&B: {_reason(error)}; recorded offline, `wandb sync {self._folder}` uploads it")
        try:
            if wandb.run is None:
                wandb.teardown()  # the run that could not start still has its id
            return wandb.init(**options, mode="offline", settings=settings)
        except Exception as error:
            logging.warning(f"W&B: {_reason(error)}; the run goes on without it")
            return None

    def _define_step(self) -> None:
        self._run.define_metric(_STEP, hidden=True)
        self._run.define_metric("*", step_metric=_STEP, step_sync=True)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs scalars of a step."""
        self._try(lambda: self._run.log({_STEP: step, **scalars}))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Logs (H, W, 3) uint8 images of a step."""
        self._try(lambda: self._run.log({_STEP: step, **{n: self._wandb.Image(image) for n, image in images.items()}}))

    def flush(self) -> None:
        """Does nothing: W&B's own process uploads."""

    def close(self) -> None:
        """Uploads what is left, for half a minute at most; marks the run as failed if an exception is being handled."""
        later = f"not everything was uploaded: `wandb sync --include-online {self._folder}` uploads it"
        self._try(lambda: self._run.finish(exit_code=int(sys.exc_info()[0] is not None)), later)

    def _try(self, call: Callable[[], object], then: str = "the run goes on without it") -> None:
        """Calls a function of the W&B run; after an exception, nothing more is sent."""
        if self._run is None:
            return
        try:
            call()
        except Exception as error:
            self._run = None
            logging.warning(f"W&B: {_reason(error)}; {then}")


def _known_id(record: pathlib.Path, project: str) -> str | None:
    """Id of the W&B run that the workdir has in this project, None if it has none."""
    try:
        known = json_file.read(record, {"project": str, "id": str})
    except FileNotFoundError:
        return None
    except StoreError:
        raise
    except (OSError, json_file.MalformedError) as error:
        logging.warning(f"{record}: {error}; a new W&B run begins")
        return None
    return known["id"] if known["project"] == project else None


def _reason(error: Exception) -> str:
    """The first line of an error, of W&B or of its server."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
