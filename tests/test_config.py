"""Facts about the config: defaults, what each field refuses, and relations between fields."""

import math

import pytest

from configs import ablation, cityscapes, demo, folder, nyud, nyud13, pascal_context
from taskexpert_jax import evaluate, gates, predict, score, train
from taskexpert_jax.config import (
    BACKBONES,
    DATA_SETS,
    FIELDS,
    REQUIRED,
    VARIANTS,
    base,
    check,
    fields_of,
)
from taskexpert_jax.errors import UserError, shown

MODULES = {"nyud": nyud, "nyud13": nyud13, "pascal_context": pascal_context, "cityscapes": cityscapes, "folder": folder}
NAN, INF = math.nan, math.inf
SHARE = (-0.1, 1.1, NAN)  # outside of [0, 1]
NEGATIVE = (-0.1, NAN, INF)
COUNT = (0, -1, 1.0, True)  # not 1, 2, 3, ...
COUNT_OR_0 = (-1, 0.0, False)
NO_SWITCH = (0, 1, "yes")
NO_NAMES = (("",), ("a", "a"), (1,), "a")
NO_SIZE = ((), (96,), (96, 0), (96.0, 128), (96, 128, 3))
NO_TEXT = ("", 1)

# What each field refuses, of the right type where the type alone does not settle it.
REFUSED = {
    "variant": NO_TEXT,
    "seed": (-1, 2**32, 0.0),
    "dtype": ("float16", 32),
    "batch_size": COUNT,
    "num_steps": COUNT,
    "accumulate_steps": COUNT,
    "tasks": (*NO_NAMES, ()),
    "edge_pos_weight": (0.0, 1.0, NAN),
    "dataset.name": NO_TEXT,
    "dataset.fingerprint": (1,),
    "dataset.train_split": NO_TEXT,
    "dataset.eval_split": NO_TEXT,
    "dataset.semseg_classes": (*NO_NAMES, (), ("one",), tuple(map(str, range(256)))),
    "dataset.image_size": NO_SIZE,
    "dataset.depth_max": (0.0, -80.0, NAN, "80"),
    "dataset.downscale": (0.0, 1.5, NAN),
    "dataset.cache": NO_SWITCH,
    "dataset.threads": COUNT_OR_0,
    "dataset.data_dir": NO_TEXT,
    "dataset.local_cache": ("gs://bucket/cache", "s3://x", "~nobody-of-this-name/x", 1, None),
    "dataset.labels": NO_NAMES,
    "dataset.zero_is_void": (*NO_NAMES, ("depth",)),
    "dataset.seed": COUNT_OR_0,
    "dataset.train_scenes": COUNT,
    "dataset.val_scenes": COUNT,
    "dataset.variety": ("wild",),
    "model.backbone": ("", "ViT", "../vit", 1),
    "model.decoder": ("", "TaskExpert", "../taskexpert", 1),
    "model.width": COUNT,
    "model.depth": COUNT,
    "model.heads": COUNT,
    "model.mlp_ratio": COUNT,
    "model.patch_size": COUNT,
    "model.layer_scale": NEGATIVE,
    "model.class_token": NO_SWITCH,
    "model.registers": COUNT_OR_0,
    "model.positions": ("sines",),
    "model.mlp": ("relu",),
    "model.norm_epsilon": (0.0, 1.0, NAN),
    "model.swin.width": COUNT,
    "model.swin.depths": ((2, 2, 6), (2, 2, 5, 2), (2, 2, 0, 2), (2, 2, 2.0, 2), 2),
    "model.swin.heads": ((3, 6, 12), (3, 6, 12, 0), (3, 6, 12, "24"), 3),
    "model.swin.window": (1, 7.0, 0),
    "model.grid_stride": COUNT,
    "model.image_mean": ((0.5, 0.5), ("a", 0.0, 0.0), (0.5, NAN, 1.0)),
    "model.image_std": ((0.5, 0.5), (0.5, 0.5, 0.0), (0.5, NAN, 1.0)),
    "model.pretrained": (1,),
    "model.pretrained_fresh": (1,),
    "model.drop_path": (-0.1, 1.0, NAN),
    "model.attention": ("flash",),
    "model.remat": NO_SWITCH,
    "model.unroll": (True, "maybe"),
    "model.taps": COUNT,
    "model.feature_width": COUNT,
    "model.norm": ("group",),
    "model.experts": COUNT,
    "model.expert_kernel": (0, 2, 3.0),
    "model.gate.input": ("locl",),
    "model.gate.granularity": ("pixel",),
    "model.gate.width": COUNT,
    "model.gate.top_k": (-1, 7, 0.0),
    "model.gate.init": ("zeros",),
    "model.gate.temperature": (0.0, -1.0, NAN, INF),
    "model.gate.noise": NEGATIVE,
    "model.gate.balance": NEGATIVE,
    "model.memory.init": ("random",),
    "model.memory.read": ("conv5x5",),
    "model.memory.write": ("append",),
    "model.mlore.ranks": ((), (0,), (2, -2), (2.5,), 8),
    "model.mlore.task_rank": COUNT,
    "model.mlore.top_k": (-1, 0.0),
    "model.mlore.balance": NEGATIVE,
    "model.mlore.merge": ("sometimes",),
    "model.head_upsample": COUNT,
    "balancing": ("", "PCGrad", "../dwa", 1),
    "uncertainty.learning_rate": NEGATIVE,
    "dwa.window": COUNT,
    "dwa.temperature": (0.0, -1.0, NAN, INF),
    "famo.learning_rate": NEGATIVE,
    "famo.gamma": NEGATIVE,
    "optimizer.algorithm": ("sgd",),
    "optimizer.learning_rate": NEGATIVE,
    "optimizer.schedule": ("linear",),
    "optimizer.schedule_power": NEGATIVE,
    "optimizer.warmup_steps": COUNT_OR_0,
    "optimizer.weight_decay": NEGATIVE,
    "optimizer.clip_norm": NEGATIVE,
    "optimizer.backbone_rate": NEGATIVE,
    "optimizer.layer_decay": SHARE,
    "optimizer.ema_decay": (-0.1, 1.0, NAN),
    "augment.scale_min": (0.0, 3.0, NAN),
    "augment.scale_max": (0.0, 0.4, INF),
    "augment.crop_max_class_share": (0.0, 1.1, NAN),
    "augment.crop_redraws": COUNT_OR_0,
    "augment.flip_probability": SHARE,
    "augment.photometric_probability": SHARE,
    "augment.brightness": (-1.0, 256.0, NAN),
    "augment.contrast_min": (-0.1, 1.6, NAN),
    "augment.contrast_max": (-0.1, 0.4, INF),
    "augment.saturation_min": (-0.1, 1.6, NAN),
    "augment.saturation_max": (-0.1, 0.4, INF),
    "augment.hue": (-1, 181, 1.5),
    "mesh.data": (0, -2, 1.0),
    "mesh.fsdp": (0, -1, -2, 1.0),  # -1: as data has it already
    "mesh.tensor": (0, -1, -2, 1.0),
    "mesh.slices": COUNT_OR_0,
    "mesh.fsdp_slices": COUNT,
    "eval.batch_size": COUNT,
    "eval.every_steps": COUNT_OR_0,
    "eval.max_examples": COUNT_OR_0,
    "eval.flip": NO_SWITCH,
    "eval.scales": ((1.0, 0.0), (-1.0,), (NAN,), (), 1.0),
    "eval.image_size": ((32, 40), (100,), (100.5, 100.0)),
    "eval.overlap": (-0.1, 1.0, NAN),
    "eval.params_dtype": ("int8",),
    "eval.image_means": NO_SWITCH,
    "eval.boundary.odsf": NO_SWITCH,
    "eval.boundary.labels": ("circles",),
    "eval.boundary.quantise": ("floor",),
    "eval.boundary.max_dist": (0.0, 1.0, NAN),
    "checkpoint.every_steps": COUNT_OR_0,
    "checkpoint.best_task": (*NO_TEXT, "sal"),
    "guard.skip_steps": COUNT_OR_0,
    "guard.skip_examples": COUNT_OR_0,
    "guard.spike_factor": NEGATIVE,
    "guard.stall_seconds": NEGATIVE,
    "profile.first_step": (*COUNT_OR_0, 41_000),  # beyond the last step
    "profile.steps": (*COUNT, 1_001),
    "profile.every": COUNT_OR_0,
    "log.every_steps": COUNT_OR_0,
    "log.images": COUNT_OR_0,
    "log.wandb": ("a/b/c", "a project", "50%", 1),
}
# What every field refuses: other types, and what no device holds.
OF_NO_FIELD = (
    *(None, {"a": 1}, [[1]], b"1", NAN, INF, -INF, 1e300, 10**400),
    *(-(10**5000), (NAN,), (1e300,) * 3, (10**400,) * 2, ("a\x1b[31m",)),
)
FIELD_OF_DATA_SET = {name: data_set for data_set, own in DATA_SETS.items() for name in own}


def fitting(data_set="nyud"):
    """A small config of a data set that passes; `folder` with classes."""
    config = demo.get_config("tiny") if data_set == "scenes" else MODULES[data_set].get_config("tiny")
    if data_set == "folder":
        config.dataset.semseg_classes = ("road", "grass")
    if data_set == "scenes":
        config.tasks = ("semseg", "depth")
    return config


def changed(field, value, config):
    """The config as a plain one with another value of a field, of any type."""
    *groups, last = field.split(".")
    copied = config.copy_and_resolve_references()
    group = copied
    for each in groups:
        group = group[each]
    group._fields[last] = value  # as it is: `group[last] = value` casts
    return copied


def refusal(config):
    """The line with which the check refuses a config; None if it passes."""
    try:
        check(config)
    except UserError as error:
        return str(error)
    return None


def test_every_field_has_a_refused_value_here():
    assert REFUSED.keys() == FIELDS.keys() | FIELD_OF_DATA_SET.keys()


@pytest.mark.parametrize("field", REFUSED)
def test_a_value_outside_of_what_a_field_allows_is_refused_with_its_name(field):
    config = fitting(FIELD_OF_DATA_SET.get(field, "nyud"))
    if field in BACKBONES["swin"]:
        config = nyud.get_config("swin_t")
    assert refusal(config) is None
    for value in (*REFUSED[field], *OF_NO_FIELD):
        line = refusal(changed(field, value, config))
        assert line is not None, f"{field}={shown(value)} passes"
        assert "\n" not in line and len(line) < 300, line
        assert f"config.{field}" in line or (field.startswith("mesh.") and line.startswith("config.mesh ")), line


@pytest.mark.parametrize("field", sorted(FIELD_OF_DATA_SET.keys() | FIELDS.keys()))
def test_every_default_is_allowed_and_every_field_has_a_meaning(field):
    declared = FIELDS[field] if field in FIELDS else fields_of({"dataset.name": FIELD_OF_DATA_SET[field]})[field]
    assert declared.meaning
    assert declared.default is REQUIRED or declared.rule.allows(declared.default)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("module", MODULES)
def test_every_config_file_passes_for_every_variant(module, variant):
    config = MODULES[module].get_config(variant)
    if module == "folder":
        config.dataset.semseg_classes = ("road", "grass")
    assert config.variant == variant
    assert refusal(config) is None


@pytest.mark.parametrize("variant", ["demo", "tiny"])
def test_the_demo_passes(variant):
    assert refusal(demo.get_config(variant)) is None


@pytest.mark.parametrize("benchmark", ["nyud,small", "pascal_context,small", "nyud,vit_l16"])
def test_every_rung_of_the_ablation_passes(benchmark):
    for rung in ablation.rungs(ablation.get_config(f"full,{benchmark}")):
        assert refusal(ablation.get_config(f"{rung},{benchmark}")) is None


def test_an_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown variant 'vit_x': choose one of vit_ti16, .*, tiny"):
        base("vit_x", "nyud")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.gate.input": "locl"}, r"^config.model.gate.input='locl': must be one of local, context, both$"),
        ({"optimizer.algorithm": "sgd"}, r"^config.optimizer.algorithm='sgd': must be one of adam, adamw$"),
        ({"model.gate.temperature": 0.0}, r"^config.model.gate.temperature=0.0: must be a number in \[0.001, 1000\]$"),
        ({"optimizer.ema_decay": 1.0}, r"^config.optimizer.ema_decay=1.0: must be a number in \[0, 1\)$"),
        ({"batch_size": 0}, r"^config.batch_size=0: must be a whole number of 1 or more, below 2\*\*31$"),
        ({"seed": -1}, r"^config.seed=-1: must be a whole number from 0 to 4294967295$"),
        ({"dataset.downscale": 1.5}, r"^config.dataset.downscale=1.5: must be a number in \[0.01, 1\]$"),
        ({"model.expert_kernel": 4}, r"^config.model.expert_kernel=4: must be an odd whole number from 1 to 99$"),
        ({"model.taps": 3}, r"^config.model.taps=3 must divide config.model.depth=4$"),
        (
            {"model.heads": 16, "model.positions": "rotary"},
            r"^config.model.positions='rotary': config.model.width=32 over .* must be a multiple of 4$",
        ),
        ({"model.heads": 5}, r"^config.model.heads=5 must divide config.model.width=32$"),
        ({"model.gate.top_k": 7}, r"^config.model.gate.top_k=7: must be at most 6"),
        ({"model.gate.top_k": 6, "model.memory.read": "none"}, r"^config.model.gate.top_k=6: must be at most 5"),
        ({"accumulate_steps": 3}, r"^config.accumulate_steps=3 must divide batch_size=2$"),
        (
            {"profile.first_step": 1, "profile.every": 5},
            r"^config.profile.every=5 must be more than config.profile.steps=5, or 0$",
        ),
        (
            {"profile.first_step": 3},
            r"^config.profile.first_step=3 is after the last step, config.num_steps=2: nothing would be profiled$",
        ),
        (
            {"dataset.image_size": (60, 80)},
            r"^config.dataset.image_size=60x80: .* multiples of config.model.patch",
        ),
        (
            {"eval.image_size": (64, 72)},
            r"^config.eval.image_size=64x72 is smaller than config.dataset.image_size=",
        ),
        (
            {"augment.scale_min": 3.0},
            r"^config.augment.scale_min=3.0 must not be more than config.augment.scale_max=2.0$",
        ),
        ({"mesh.fsdp": -1}, r"^config.mesh \(data=-1, fsdp=-1, tensor=1\): sizes must be .* at most one may be -1$"),
        ({"tasks": ("semseg,depth",)}, r"^config.tasks: 'semseg,depth' holds a comma: "),
        ({"tasks": ("depth",)}, r"^config.checkpoint.best_task='semseg' is not among the tasks \(depth\)$"),
        ({"loss_weights.depth": -1.0}, r"^config.loss_weights.depth=-1.0: must be a number in \[0, 1e\+30\]$"),
        (
            {"balancing": "dwa", "dwa.temperature": 0.0},
            r"^config.dwa.temperature=0.0: must be a number in \[0.001, 1000\]$",
        ),
        ({"famo.gamma": -1.0}, r"^config.famo.gamma=-1.0: must be a number in \[0, 1e\+30\]$"),
        (
            {"balancing": "famo", "loss_weights.depth": 0.0},
            r"^config.loss_weights.depth=0: config.balancing='famo' needs positive weights; leave the task out ",
        ),
        ({"dataset.semseg_classes": ("a", "a")}, r"^config.dataset.semseg_classes=\('a', 'a'\): .* each once$"),
        ({"dataset.semseg_classes": ()}, r"^config.dataset.semseg_classes: 0 class names; .* give 2 to 255$"),
    ],
)
def test_the_line_says_what_is_allowed(fields, message):
    config = fitting()
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message):
        check(config)


def test_a_folders_labels_are_those_of_its_tasks():
    config = changed("dataset.labels", ("depth",), fitting("folder"))
    with pytest.raises(UserError, match=r"config.dataset.labels=\('depth',\): task 'semseg' is not among them"):
        check(config)
    config = changed("dataset.zero_is_void", ("human_parts",), fitting("folder"))
    with pytest.raises(UserError, match=r"config.dataset.zero_is_void: 'human_parts' is not among the tasks"):
        check(config)


def test_a_backbone_without_its_sizes_names_the_variants_that_have_them():
    missing = r"^config.model.swin.width is missing: .*; choose 'swin' by a variant, .*: nyud.py:swin_t, .*, swin_l$"
    with pytest.raises(UserError, match=missing):
        check(changed("model.backbone", "swin", fitting()))


def test_fields_that_are_missing_or_unknown_are_named():
    config = fitting()
    del config.log.images
    with pytest.raises(UserError, match=r"^config.log.images is missing: evaluation examples drawn"):
        check(config)
    for name, near in (("model.gate.top_l", "model.gate.top_k"), ("dataset.data_dirr", "dataset.data_dir")):
        with pytest.raises(UserError, match=rf"^config.{name}: unknown field; did you mean '{near}'\?$"):
            check(changed(name, 1, fitting()))


def test_a_data_set_of_ones_own_may_have_fields_of_its_own():
    assert refusal(changed("dataset.stride", 3, changed("dataset.name", "rooms", fitting()))) is None


def test_a_balancing_method_of_ones_own_may_have_fields_in_a_group_of_its_name():
    config = changed("balancing", "gradnorm", fitting())
    config.gradnorm = {"alpha": 1.5}
    assert refusal(config) is None
    with pytest.raises(UserError, match=r"^config.gradnorm.alpha: unknown field$"):
        check(changed("balancing", "dwa", config))


def programs():
    """The programs that take a config: name -> (config, directory) -> the call."""
    return {
        "train": lambda config, at: train.train(config, at / "run", None, None),
        "evaluate": lambda config, at: evaluate.evaluate(config, at / "run", "best", None),
        "predict": lambda config, at: predict.predict(config, at / "run", "best", at, at / "out"),
        "gates": lambda config, at: gates.inspect(config, at / "run", "best", at, at / "out"),
        "score": lambda config, at: score._run(config, at, (), at / "out"),
    }


@pytest.mark.parametrize("program", programs())
def test_every_program_checks_its_config_before_it_writes(program, tmp_path):
    config = changed("log.every_steps", -1, fitting("scenes"))
    with pytest.raises(UserError, match=r"^config.log.every_steps=-1: "):
        programs()[program](config, tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- a run's own config ---
