"""Validates a config: each field by its own rule, then relations between fields."""

from collections.abc import Iterator, Mapping
import difflib
from typing import Any

from ml_collections import ConfigDict

from taskexpert_jax.config.balancing_fields import BALANCING
from taskexpert_jax.config.field import REQUIRED
from taskexpert_jax.config.fields import FIELDS, LOSS_WEIGHT, fields_of, further_fields
from taskexpert_jax.config.model_fields import BACKBONE, BACKBONES, MODEL, VARIANTS
from taskexpert_jax.errors import UserError, shown

_LONGEST_NAME = 100  # characters of an unknown field in a message
_NAMED = 4  # variants in a message
_LABELS_IN_UINT8 = 255  # classes; 255 itself is unlabelled


def check(config: ConfigDict) -> None:
    """Validates all fields, before anything is compiled or written.

    Raises:
      UserError: a missing or unknown field, a value of the wrong type or out of range, or values that are inconsistent
        with each other. The line names the first such field, its value and what is allowed.
    """
    for error in _errors(config):
        raise UserError(error)


def flat(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a config as (full name, value) pairs: ("model.gate.width", 8)."""
    for name, value in config.items():
        if isinstance(value, ConfigDict | dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _errors(config: ConfigDict) -> Iterator[str]:
    values = dict(flat(config))
    fields = fields_of(values)
    # Backbones, decoders, balancing methods and data sets of one's own have their own fields.
    unknown = [field for field, further in further_fields(values).items() if further is None]
    method = values.get(BALANCING)
    groups = {field: field.partition(".")[0] for field in unknown}
    groups[BALANCING] = method if isinstance(method, str) else ""
    own = tuple(f"{groups[field]}." for field in unknown)
    for name, field in fields.items():
        if name not in values:
            yield f"config.{name} is missing: {field.meaning}{_variants_with(name, values)}"
        elif not field.rule.allows(values[name]):
            yield f"config.{name}={shown(values[name])}: {field.rule.words}"
    for name in sorted(values.keys() - fields.keys()):
        if name.startswith("loss_weights."):
            if not LOSS_WEIGHT.rule.allows(values[name]):
                yield f"config.{name}={shown(values[name])}: {LOSS_WEIGHT.rule.words}"
        elif name in FIELDS:  # of a backbone, a decoder or a method that is not chosen
            if not FIELDS[name].rule.allows(values[name]):
                yield f"config.{name}={shown(values[name])}: {FIELDS[name].rule.words}"
        elif not name.startswith(own):
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.85)
            printed = name if name.isprintable() and len(name) < _LONGEST_NAME else shown(name)
            yield f"config.{printed}: unknown field{f'; did you mean {near[0]!r}?' if near else ''}"
    yield from _inconsistencies(config)


def _variants_with(name: str, values: Mapping[str, Any]) -> str:
    """Words that name variants of the chosen backbone, if the missing field is one of its sizes; otherwise ""."""
    backbone = values.get(BACKBONE)
    fields = BACKBONES.get(backbone, {}) if isinstance(backbone, str) else {}
    if name not in fields or fields[name].default is not REQUIRED:
        return ""
    usual = MODEL[BACKBONE].default
    variants = [variant for variant, sizes in VARIANTS.items() if sizes.get("backbone", usual) == backbone]
    more = ", ..." if len(variants) > _NAMED else ""
    return f"; choose {backbone!r} by a variant, which has its sizes: nyud.py:{', '.join(variants[:_NAMED])}{more}"


def _inconsistencies(config: ConfigDict) -> Iterator[str]:
    """Relations between fields that do not hold, one line each; each field is valid by itself."""
    yield from _task_inconsistencies(config)
    yield from _size_inconsistencies(config)
    yield from {"vit": _vit_inconsistencies, "swin": _swin_inconsistencies}.get(config.model.backbone, _none)(config)
    yield from {"taskexpert": _taskexpert_inconsistencies}.get(config.model.decoder, _none)(config)
    if config.batch_size % config.accumulate_steps:
        yield f"config.accumulate_steps={config.accumulate_steps} must divide batch_size={config.batch_size}"
    for name in ("scale", "contrast", "saturation"):
        low, high = config.augment[f"{name}_min"], config.augment[f"{name}_max"]
        if low > high:
            yield f"config.augment.{name}_min={low} must not be more than config.augment.{name}_max={high}"
    profile = config.profile
    if profile.first_step and 0 < profile.every <= profile.steps:
        yield f"config.profile.every={profile.every} must be more than config.profile.steps={profile.steps}, or 0"
    if profile.first_step > config.num_steps:
        yield (
            f"config.profile.first_step={profile.first_step} is after the last step, config.num_steps="
            f"{config.num_steps}: nothing would be profiled"
        )
    mesh = config.mesh
    sizes = (mesh.data, mesh.fsdp, mesh.tensor)
    if 0 in sizes or sizes.count(-1) > 1:
        given = ", ".join(f"{axis}={mesh[axis]}" for axis in ("data", "fsdp", "tensor"))
        yield f"config.mesh ({given}): sizes must be positive, and at most one may be -1"
    smallest, frame = tuple(config.dataset.image_size), tuple(config.eval.image_size)
    if frame and (frame[0] < smallest[0] or frame[1] < smallest[1]):
        yield (
            f"config.eval.image_size={frame[0]}x{frame[1]} is smaller than config.dataset.image_size="
            f"{smallest[0]}x{smallest[1]}, the size that the model was trained for; give at least that, or ()"
        )


def _task_inconsistencies(config: ConfigDict) -> Iterator[str]:
    tasks, dataset = config.tasks, config.dataset
    for task in tasks:
        if "," in task:
            yield f"config.tasks: {shown(task)} holds a comma: write the names one by one, as \"('semseg','depth')\""
    best = config.checkpoint.best_task
    if best not in tasks:
        yield f"config.checkpoint.best_task={shown(best)} is not among the tasks ({', '.join(tasks)})"
    for task in tasks:
        if config.balancing != "fixed" and config.loss_weights.get(task) == 0:
            yield (
                f"config.loss_weights.{task}=0: config.balancing={config.balancing!r} needs positive weights; leave "
                "the task out of config.tasks, or train with balancing='fixed'"
            )
    classes = len(dataset.semseg_classes)
    if "semseg" in tasks and not 2 <= classes <= _LABELS_IN_UINT8:
        yield (
            f"config.dataset.semseg_classes: {classes} class names; labels are uint8 with 255 ignored, so give 2 to 255"
        )
    if dataset.name == "folder":
        for task in tasks:
            if task not in dataset.labels:
                yield f"config.dataset.labels={dataset.labels!r}: task {task!r} is not among them"
        for task in dataset.zero_is_void:
            if task not in tasks:
                yield f"config.dataset.zero_is_void: {task!r} is not among the tasks ({', '.join(tasks)})"


def _size_inconsistencies(config: ConfigDict) -> Iterator[str]:
    height, width = config.dataset.image_size
    if height % config.model.patch_size or width % config.model.patch_size:
        yield (
            f"config.dataset.image_size={height}x{width}: sides must be multiples of "
            f"config.model.patch_size={config.model.patch_size}"
        )


def _vit_inconsistencies(config: ConfigDict) -> Iterator[str]:
    model = config.model
    if model.depth % model.taps:
        yield f"config.model.taps={model.taps} must divide config.model.depth={model.depth}"
    if model.width % model.heads:
        yield f"config.model.heads={model.heads} must divide config.model.width={model.width}"
    elif model.positions == "rotary" and model.width // model.heads % 4:
        yield (
            f"config.model.positions='rotary': config.model.width={model.width} over config.model.heads={model.heads} "
            "must be a multiple of 4"
        )


def _swin_inconsistencies(config: ConfigDict) -> Iterator[str]:
    swin = config.model.swin
    for stage, heads in enumerate(swin.heads):
        if swin.width * 2**stage % heads:
            yield (
                f"config.model.swin.heads={tuple(swin.heads)}: {heads} must divide {swin.width * 2**stage}, the "
                f"channels of stage {stage + 1}"
            )


def _taskexpert_inconsistencies(config: ConfigDict) -> Iterator[str]:
    model = config.model
    slots = model.experts + (model.memory.read != "none")
    if model.gate.top_k > slots:
        yield f"config.model.gate.top_k={model.gate.top_k}: must be at most {slots} (experts and, if read, memory)"


def _none(config: ConfigDict) -> Iterator[str]:
    """The relations of a backbone or a decoder of one's own, which are checked where it is built."""
    del config
    yield from ()
