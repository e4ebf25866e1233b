"""A run's directory belongs to one config."""

from collections.abc import Iterator, Mapping
import json
import pathlib
from typing import Any

from taskexpert_jax.errors import UserError

# What may change when a run is resumed: where and how fast it runs and what it reports, not what it computes.
FREE = ("mesh.", "eval.", "log.", "checkpoint.", "dataset.cache", "dataset.threads", "dataset.data_dir")


def claim(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Makes the directory and writes config.json, or checks that the one there is the same.

    Args:
      workdir: the run's directory.
      config: plain dict form of the config.

    Raises:
      UserError: the directory belongs to a run with another config; the message lists the fields. Nothing is written.
    """
    path = workdir / "config.json"
    wanted = json.loads(json.dumps(config))
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".json.partial")
        partial.write_text(json.dumps(wanted, indent=2) + "\n")
        partial.rename(path)
        return
    differences = list(_differences(json.loads(path.read_text()), wanted))
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise UserError(
            f"{workdir} holds a run of another config: {'; '.join(differences[:5])}{more}; "
            "use another --workdir, or the config that the run started with"
        )


def note_other_data(workdir: pathlib.Path, config: Mapping[str, Any]) -> str:
    """A line if the data of `config` are not those that the run in the workdir was trained on, else empty."""
    path = workdir / "config.json"
    if not path.exists():
        return ""
    trained, given = (of["dataset"].get("fingerprint", "") for of in (json.loads(path.read_text()), config))
    if trained == given:
        return ""
    return f"other data than those of training: fingerprint {given or 'unknown'}, in training {trained or 'unknown'}"


def _differences(saved: Any, wanted: Any, prefix: str = "") -> Iterator[str]:
    if prefix and (prefix + ".").startswith(FREE):
        return
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in sorted(saved.keys() | wanted.keys()):
            name = f"{prefix}.{key}" if prefix else key
            yield from _differences(saved.get(key, "absent"), wanted.get(key, "absent"), name)
    elif saved != wanted:
        yield f"{prefix} was {saved!r}, is {wanted!r}"
