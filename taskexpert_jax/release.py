"""Releases a trained model: a folder with its parameters, config, model card and checksums, or a repository of the hub.

taskexpert release RUN --output=DIR --license=apache-2.0
taskexpert release RUN --output=hf://OWNER/NAME             # private, unless --public is given
"""

from collections.abc import Sequence
import json
import pathlib
import re
import sys
import tempfile
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from taskexpert_jax import command_line, files, json_file, paths, storage, terminal
from taskexpert_jax.config import flat, read_run
from taskexpert_jax.errors import StoreError, UserError
from taskexpert_jax.parallel import sharding
from taskexpert_jax.report import model_card
from taskexpert_jax.runs import hub, released, sealing, tree
from taskexpert_jax.runs.config import FREE_TO_LOAD
from taskexpert_jax.runs.load import Selected, load
from taskexpert_jax.version import __version__

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# What is read of an evaluation's metrics.json.
_FORM = {
    "step": int,
    "examples": int,
    "date": str,
    "tasks": object,
    "model": dict,
    "eval": dict,
    "dataset": {"name": str, "split": str, "fingerprint": str},
    "metrics": json_file.Each((float, None)),
    "best_constant": json_file.Each((float, None)),
}


class Words(NamedTuple):
    """Statements for the model card that only those who release a model can make.

    Attributes:
      license: identifier of the licence, as on the hub: apache-2.0, cc-by-nc-4.0, ...; "unknown": not stated.
      name: name of the model; "": of the folder or repository.
      note: further text, Markdown.
    """

    license: str = "unknown"
    name: str = ""
    note: str = ""


_UNSAID = Words()


def release(
    workdir: pathlib.Path, output: pathlib.Path, which: str = "best", words: Words = _UNSAID, *, where: str = ""
) -> str:
    """Writes a released folder of a run, completely or not at all.

    Args:
      workdir: the run's directory.
      output: the folder; must not exist, or be empty.
      which: "best", "latest" or a step.
      words: for the card.
      where: what the commands of the card load the model from; default: the folder's name.

    Returns:
      What was released, in a line.

    Raises:
      UserError: no such checkpoint or a damaged one; a folder that is not empty or cannot be written; a licence that is
        no identifier.
    """
    if not _LICENSE.fullmatch(words.license):
        raise UserError(
            f"--license={words.license}: give an identifier of the hub, such as apache-2.0, cc-by-nc-4.0 or other"
        )
    if released.is_released(workdir):
        raise UserError(f"{workdir} is a released model already: copy the folder, or push it with --output=hf://...")
    files.refuse_taken(output)
    config = read_run(workdir)
    config.eval.params_dtype = "float32"  # all that was trained
    mesh = sharding.one_device_mesh()
    with sharding.use(mesh):
        _, variables, selected = load(config, workdir, which, mesh)
    evaluation, reason = evaluation_of(workdir, config, selected)
    shared = portable(read_run(workdir))
    card = model_card.Card(
        name=words.name or output.absolute().name,
        where=where or output.absolute().name,
        config=shared,
        step=selected.step,
        which=selected.which,
        parameters=sum(leaf.size for leaf in tree.arrays(variables["params"]).values()),
        size=sum(leaf.nbytes for leaf in tree.arrays(variables).values()),
        evaluation=evaluation,
        reason=reason,
        license=words.license,
        note=words.note,
    )
    facts = released.Facts(selected.step, tuple(config.tasks), __version__)
    released.write(output, variables, shared, facts, model_card.text(card))
    results = f"not evaluated ({reason})" if evaluation is None else f"evaluated on {evaluation['examples']} examples"
    return (
        f"{workdir} at {selected}: {card.parameters / 1e6:.1f} M parameters, {card.size / 2**20:.1f} MiB; {results}; "
        f"licence: {words.license}{' (state it with --license)' if words.license == 'unknown' else ''}"
    )


def push(workdir: pathlib.Path, address: paths.Address, which: str, words: Words, *, public: bool) -> tuple[str, str]:
    """Releases a run to a repository of the hub in one commit; a released folder is pushed as it is.

    Args:
      workdir: the run's directory, or a released folder.
      address: the repository.
      which: "best", "latest" or a step.
      words: for the card, which a released folder has already.
      public: visibility of a new repository.

    Returns:
      What was released, in a line, and the page of the commit.

    Raises:
      UserError: as `release`, and as `hub.push`.
    """
    if released.is_released(workdir):
        if words != _UNSAID:
            raise UserError(f"{workdir} is a released model: --license, --name and --note are in its {released.CARD}")
        facts = released.facts(workdir)
        message = f"Step {facts.step}, TaskExpert-JAX {facts.version}"
        with storage.local_copy(workdir) as folder:
            return f"{workdir} at step {facts.step}", hub.push(folder, address, public=public, message=message)
    named = words._replace(name=words.name or address.repository.split("/")[1])
    with tempfile.TemporaryDirectory() as folder:
        line = release(workdir, pathlib.Path(folder) / "released", which, named, where=str(address))
        step = released.facts(pathlib.Path(folder) / "released").step
        message = f"Step {step}, TaskExpert-JAX {__version__}"
        return line, hub.push(pathlib.Path(folder) / "released", address, public=public, message=message)


def portable(config: ConfigDict) -> ConfigDict:
    """The config without paths of this machine, which nobody else needs or should see.

    `dataset.data_dir`, `dataset.local_cache` and `log.wandb` get their defaults; of `model.pretrained` and of any other
    absolute path or address of a bucket only the last part stays.
    """
    fields: dict[str, Any] = {}
    for field, value in flat(config):
        if field == "dataset.data_dir":
            fields[field] = "data"
        elif field == "dataset.local_cache":
            fields[field] = "auto"
        elif field == "log.wandb":
            fields[field] = ""
        elif not isinstance(value, str) or paths.is_hub(value):
            continue
        elif field == "model.pretrained" or value.startswith(("/", "~", storage.BUCKET)):
            fields[field] = pathlib.PurePath(value).name
    found = config.copy_and_resolve_references()
    found.update_from_flattened_dict(fields)
    return found


def evaluation_of(workdir: pathlib.Path, config: ConfigDict, selected: Selected) -> tuple[dict[str, Any] | None, str]:
    """The results in WORKDIR/evaluation if they are those of this very checkpoint, else None and the reason."""
    path = workdir / "evaluation" / "metrics.json"
    try:
        found = json_file.read(path, _FORM)
        older = path.stat().st_mtime < sealing.saved_at(workdir / "checkpoints" / str(selected.step))
    except FileNotFoundError:
        return None, "the run had no evaluation/metrics.json"
    except StoreError:
        raise
    except (OSError, json_file.MalformedError):
        return None, "the run's evaluation/metrics.json cannot be read"
    if found["step"] != selected.step:
        return None, f"the run was evaluated at step {found['step']}, not {selected.step}"
    if older:
        return None, "the run's evaluation is older than the checkpoint"
    model = json.loads(config.model.to_json_best_effort())
    fixed = {name: value for name, value in model.items() if f"model.{name}" not in FREE_TO_LOAD}
    other = any(found["model"].get(name, value) != value for name, value in fixed.items())
    if other or found["tasks"] != list(config.tasks) or found["dataset"]["name"] != config.dataset.name:
        return None, "the run's evaluation/metrics.json is of another model or data set"
    return found, ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = command_line.Parser("taskexpert_jax.release", __doc__)
    parser.add_argument("run", type=paths.model_argument, metavar="RUN", help=paths.MODEL_FORM)
    parser.add_argument("--output", type=paths.model_argument, required=True, help=f"a new folder, or {paths.HUB_FORM}")
    parser.add_argument("--checkpoint", default="best", help="best (the default), latest or a step")
    parser.add_argument("--license", default="unknown", help="the model's licence: apache-2.0, cc-by-nc-4.0, ...")
    parser.add_argument("--name", default="", help="name in the model card; default: of the folder or repository")
    parser.add_argument("--note", default="", help="further text of the model card, Markdown")
    parser.add_argument("--public", action="store_true", help="a new repository is public; default: private")
    terminal.guard()
    args = parser.parse_args(arguments)

    def program() -> None:
        workdir, words = hub.located(args.run, "RUN"), Words(args.license, args.name, args.note)
        jax.config.update("jax_platforms", "cpu")  # nothing is computed
        command_line.configure_logging()
        if paths.is_hub(args.output):
            address = paths.address(args.output, "--output")
            line, written = push(workdir, address, args.checkpoint, words, public=args.public)
        elif args.public:
            raise UserError("--public is for --output=hf://OWNER/NAME")
        else:
            line, written = release(workdir, args.output, args.checkpoint, words), args.output
        print(line)
        terminal.print_written(written)

    return command_line.ended(program)


if __name__ == "__main__":
    sys.exit(main())
