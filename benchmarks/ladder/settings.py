"""Settings of a ladder's runs, the same for all rungs, and the config that they make of a rung. Imports no JAX."""

import argparse
from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from benchmarks import changes
from configs import ablation
from taskexpert_jax.errors import UserError

# The most informative first: the two ends of the claim, its two parts, then the first defaults.
RUNGS = ("static", "full", "static_gates_memory", "dynamic_gates", "plain_static", "plain_full")


class Flag(NamedTuple):
    """A field of `Settings` on the command line: its name and the arguments of `add_argument`."""

    name: str
    argument: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of every run; the metadata are the flags' help."""

    variant: str = dataclasses.field(default="vit_s16", metadata={"help": "of configs/ablation.py"})
    epochs: float = dataclasses.field(default=100.0, metadata={"help": "passes over the training frames"})
    batch_size: int = dataclasses.field(default=32, metadata={"help": "in training and evaluation"})
    learning_rate: float = dataclasses.field(default=3e-4, metadata={"help": "peak, AdamW"})
    warmup_epochs: float = dataclasses.field(default=5.0, metadata={"help": "linear rise of the rate"})
    weight_decay: float = dataclasses.field(default=0.05, metadata={"help": "of kernels"})
    evaluations: int = dataclasses.field(default=4, metadata={"help": "points of the curve of metrics in a run"})
    pretrained: str = dataclasses.field(default="", metadata={"help": "backbone weights, as config.model.pretrained"})
    odsf: bool = dataclasses.field(default=False, metadata={"help": "boundary benchmark at the end of a run"})
    fields: tuple[str, ...] = dataclasses.field(
        default=(), metadata={"help": "further config fields, as model.drop_path=0.1"}
    )

    @classmethod
    def flags(cls) -> list[Flag]:
        """Flags of all fields."""
        found = []
        for field in dataclasses.fields(cls):
            argument: dict[str, Any] = {"default": field.default, "help": f"{field.metadata['help']}; %(default)s"}
            if field.type is bool:
                argument["action"] = "store_true"
            elif field.name == "fields":
                argument |= {"nargs": "+", "metavar": "FIELD=VALUE"}
            else:
                argument["type"] = field.type
            found.append(Flag(field.name, argument))
        return found

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Settings":
        """Settings of a parsed command line."""
        given = {field.name: getattr(args, field.name) for field in dataclasses.fields(cls)}
        return cls(**{**given, "fields": tuple(given["fields"])})

    def config(self, rung: str, facts: Mapping[str, Any]) -> ConfigDict:
        """The config of a rung, without a seed; facts: of the packed frames.

        Raises:
          UserError: an unknown rung or variant, or a wrong setting or field.
        """
        for name, most in {"epochs": 1e6, "batch_size": 1e6, "evaluations": 1e6, "learning_rate": 1e3}.items():
            if not 0 < (value := getattr(self, name)) <= most:
                raise UserError(f"--{name}={value}: give a number above 0, up to {most:g}")
        if not 0 <= self.warmup_epochs < float("inf"):
            raise UserError(f"--warmup_epochs={self.warmup_epochs}: give 0 or more")
        try:
            config = ablation.get_config(f"{rung},nyud,{self.variant}")
        except ValueError as error:
            raise UserError(str(error)) from None
        steps = len(facts["splits"]["train"]) / self.batch_size
        config.update_from_flattened_dict(
            {
                "dataset.image_size": tuple(facts["frame_size"]),
                "dataset.downscale": facts["downscale"],
                "dataset.fingerprint": facts["fingerprint"],
                "batch_size": self.batch_size,
                "eval.batch_size": self.batch_size,
                "eval.boundary.odsf": self.odsf,
                "num_steps": max(1, round(self.epochs * steps)),
                "optimizer.algorithm": "adamw",
                "optimizer.learning_rate": self.learning_rate,
                "optimizer.warmup_steps": round(self.warmup_epochs * steps),
                "optimizer.weight_decay": self.weight_decay,
                "model.pretrained": self.pretrained,
            }
        )
        changes.apply(config, self.fields, "--fields ")
        return config
