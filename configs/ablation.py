"""Ablations of the paper's claims: one config for each part of the model.

  python main.py --config=configs/ablation.py:static --workdir=DIR --config.dataset.data_dir=DATA
  python main.py --config=configs/ablation.py:static,pascal_context,vit_b16 --workdir=DIR --config.dataset.data_dir=DATA

benchmarks/ablation.py trains many of them and writes one table. The part after the colon is RUNG[,BENCHMARK[,VARIANT]]:
a rung is one of the model changes below; the benchmark is nyud, pascal_context or scenes; the variant is one of
`config.VARIANTS` or `small`, the default, a small ViT on 96x128 images that trains in minutes on two CPU cores
(docs/results.md). The scenes have the variants of configs/demo.py, and `small` is the demo itself.
"""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from configs import demo, nyud, pascal_context

BENCHMARKS: Mapping[str, Callable[[str], ConfigDict]] = {
    "nyud": nyud.get_config,
    "pascal_context": pascal_context.get_config,
    "scenes": demo.get_config,
}
SMALL = "small"
_BASES = {"scenes": "demo"}  # what `small` starts from; vit_ti16 for the others

# Sizes of small models without gates and memory reads, or with one task, that have the parameters and the multiply-adds
# of the full model, each within 5 %: benchmark -> ((experts, feature width) of static decoding, width of one task).
_EQUAL: Mapping[str, tuple[tuple[int, int], int]] = {
    "nyud": ((5, 36), 45),
    "pascal_context": ((5, 36), 48),
    "scenes": ((6, 35), 52),
}
# Width of the baseline decoder: the full model's multiply-adds within 5 %, a quarter fewer parameters.
_BASELINE_WIDTH: Mapping[str, int] = {"nyud": 58, "pascal_context": 56, "scenes": 56}
# Width of MLoRE's decoder: the full model's computed multiply-adds within 5 %, up to a sixth fewer parameters.
_MLORE_WIDTH: Mapping[str, int] = {"nyud": 32, "pascal_context": 31, "scenes": 30}
_STATIC_GATES_MEMORY = (6, 34)  # experts and feature width of static gates with memory reads, for each benchmark

# The mean of K experts is one expert of K times the width, so static decoding keeps all experts' parameters.
_NO_MEMORY = {"model.memory.read": "none"}
_STATIC = {"model.gate.granularity": "uniform", **_NO_MEMORY}

# Gates: none, static or dynamic; and the memory as one more expert, or not. Parameters and multiply-adds equal those of
# the full model within 5 %.
LADDER: Mapping[str, Mapping[str, object]] = {
    "static": _STATIC,  # shared features: the same mean of the experts for all tasks and tokens
    "static_gates": {"model.gate.granularity": "static", **_NO_MEMORY},  # a fixed weighted sum of experts for each task
    "dynamic_gates": _NO_MEMORY,  # input-dependent weights; the memory only accumulates the taps' features
    "static_gates_memory": {"model.gate.granularity": "static"},  # the memory is an additional expert
    "full": {},  # both: dynamic gates, and the memory as an expert
}

# The same rungs with the project's first defaults: gates start at random, and memory writes are added.
_PLAIN = {"model.gate.init": "random", "model.memory.write": "residual"}
PLAIN: Mapping[str, Mapping[str, object]] = {
    f"plain_{rung}": {**changes, **_PLAIN} for rung, changes in LADDER.items() if not rung.startswith("static_gates")
}

BASELINE = "baseline"  # the field's multi-task baseline in place of TaskExpert's decoder
MLORE = "mlore"  # MLoRE's decoder, whose ranks keep their published share of the feature width

# Changes of the full model; these also change the number of parameters.
CHANGES: Mapping[str, Mapping[str, object]] = {
    "experts_1": {"model.experts": 1},
    "experts_3": {"model.experts": 3},
    "experts_8": {"model.experts": 8},
    "no_read": _NO_MEMORY,  # written but not read: the heads get what the writes accumulate
    "no_write": {**_NO_MEMORY, "model.memory.write": "replace"},  # no accumulation: only the last tap's features
    "taps_1": {"model.taps": 1},
    "taps_2": {"model.taps": 2},
    "gate_image": {"model.gate.granularity": "image"},
    "gate_local": {"model.gate.input": "local"},
    "gate_context": {"model.gate.input": "context"},
    "gate_random": {"model.gate.init": "random"},
    "gate_top_2": {"model.gate.top_k": 2},
    "gate_noise": {"model.gate.noise": 1.0},
    "gate_balance": {"model.gate.balance": 0.01},
    "gate_cold": {"model.gate.temperature": 0.5},
    "read_conv3x3": {"model.memory.read": "conv3x3"},
    "read_identity": {"model.memory.read": "identity"},
    "write_residual": {"model.memory.write": "residual"},
    "write_replace": {"model.memory.write": "replace"},
    "memory_zeros": {"model.memory.init": "zeros"},
    "layer_norm": {"model.norm": "layer"},
}
TAPS_ALL = "taps_all"  # a tap after every block
SINGLE = "single_"  # single_TASK: static decoding of one task, the baseline of delta-m


def rungs(config: ConfigDict) -> tuple[str, ...]:
    """Names of all rungs for a benchmark's config."""
    return (*LADDER, *PLAIN, BASELINE, MLORE, *CHANGES, TAPS_ALL, *(f"{SINGLE}{task}" for task in config.tasks))


def get_config(variant: str = f"full,nyud,{SMALL}") -> ConfigDict:
    """Builds the config of RUNG[,BENCHMARK[,VARIANT]].

    Raises:
      ValueError: an unknown rung, benchmark or variant; lists the known ones.
    """
    parts = variant.split(",")
    rung, benchmark, size = (*parts, *("nyud", SMALL)[len(parts) - 1 :])[:3]
    if len(parts) > 3 or benchmark not in BENCHMARKS:
        raise ValueError(
            f"unknown variant {variant!r}: give RUNG[,BENCHMARK[,VARIANT]] with BENCHMARK {' or '.join(BENCHMARKS)}"
        )
    config = BENCHMARKS[benchmark](_BASES.get(benchmark, "vit_ti16") if size == SMALL else size)
    if size == SMALL and benchmark not in _BASES:
        _shrink(config)
    if rung not in rungs(config):
        raise ValueError(f"unknown rung {rung!r}: choose one of {', '.join(rungs(config))}")
    if rung.startswith(SINGLE):
        task = rung.removeprefix(SINGLE)
        config.tasks, config.checkpoint.best_task = (task,), task
    elif rung == TAPS_ALL:
        config.model.taps = config.model.depth
    elif rung in (BASELINE, MLORE):
        config.model.decoder = rung
    changes = _STATIC if rung.startswith(SINGLE) else {**LADDER, **PLAIN, **CHANGES}.get(rung, {})
    config.update_from_flattened_dict(dict(changes))
    if size == SMALL:
        static, single = _EQUAL[benchmark]
        if rung in ("static", "static_gates", "plain_static"):
            config.model.experts, config.model.feature_width = static
        elif rung == "static_gates_memory":
            config.model.experts, config.model.feature_width = _STATIC_GATES_MEMORY
        elif rung == BASELINE:
            config.model.feature_width = _BASELINE_WIDTH[benchmark]
        elif rung == MLORE:
            _shrink_ranks(config.model, _MLORE_WIDTH[benchmark])
        elif rung.startswith(SINGLE):
            config.model.feature_width = single
    config.variant = f"{rung},{benchmark},{size}"
    return config


def _shrink_ranks(model: ConfigDict, width: int) -> None:
    """Sets the feature width, and the ranks of MLoRE to their published share of it (of 452)."""
    model.feature_width = width
    model.mlore.ranks = tuple(max(1, round(width * rank / 452)) for rank in model.mlore.ranks)
    model.mlore.task_rank = max(1, round(width * model.mlore.task_rank / 452))


def _shrink(config: ConfigDict) -> None:
    """Shrinks the benchmark's config and its backbone for training in minutes on a CPU."""
    config.dtype = "float32"
    height, width = (96, 128) if config.dataset.name == "nyud" else (128, 128)
    config.dataset.downscale = width / config.dataset.image_size[1]
    config.dataset.image_size = (height, width)
    config.dataset.cache = True
    config.dataset.threads = 1
    config.model.width, config.model.depth, config.model.heads = 128, 4, 4  # as in configs/demo.py
    config.model.patch_size = 8
    config.model.feature_width = config.model.gate.width = 32
    config.model.head_upsample = 2
    config.model.drop_path = 0.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.batch_size = 8
    config.num_steps = 1_000
    config.eval.batch_size = 20
    config.eval.every_steps = config.checkpoint.every_steps = 1_000
    config.log.every_steps = 100
    config.log.images = 0
