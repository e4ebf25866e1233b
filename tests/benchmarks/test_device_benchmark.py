"""The accelerator benchmark: its plan, its arithmetic, its parts, and one run of it on the CPU."""

import dataclasses
import json
import math

import jax
import pytest

from benchmarks import device, random_batch
from benchmarks.accelerator import measure, parts, timing
from benchmarks.accelerator.variants import Variant, full_plan, plan_of
from benchmarks.program import traced_step
from configs import nyud, pascal_context
from taskexpert_jax.models import budget, products
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import optimizer
from taskexpert_jax.training import state as train_state

SMALL = (
    "--device=cpu",
    "--benchmark=nyud",
    "--size=tiny",
    "--image=64x80",
    "--batch=2",
    "--dtype=float32",
    "--unroll=no",
    "--quick",
)


def test_plan_starts_with_what_matters_and_names_everything_once():
    plan = full_plan()
    names = [variant.name for variant in plan]
    assert len(set(names)) == len(names)
    assert names[:3] == [
        "ceilings of the device",
        "ours vit_l16, 512x512, batch 8, bfloat16",
        "torch vit_l16, 512x512, batch 8, bfloat16, eager",
    ]
    ours = [variant for variant in plan if variant.kind == "ours"]
    for size in ("vit_l16", "vit_b16"):
        of_size = [variant for variant in ours if variant.size == size]
        assert {variant.image for variant in of_size} == {(512, 512), (448, 576)}
        for field in ("batch", "remat", "unroll", "attention", "dtype", "evaluated", "inference"):
            assert len({getattr(variant, field) for variant in of_size}) > 1, (size, field)


def test_every_torch_variant_has_one_of_ours_to_be_compared_with():
    for plan in (full_plan(), plan_of(Variant("ours", size="vit_ti16", image=(224, 288), batch=2, dtype="float32"))):
        ours = {variant.workload for variant in plan if variant.kind == "ours"}
        assert {variant.workload for variant in plan if variant.kind == "torch"} <= ours


def test_rates_follow_from_times_and_model_flops():
    record = {"batch": 4, "training": {"median_s": 0.5, "model_flops": 200}, "parts": {"a": {"median_s": -0.1}}}
    device.add_rates(record, {"matmul_bfloat16": 1000.0})
    assert record["training"] | {"mfu": 0.4, "images_per_s": 8.0, "model_flops_per_s": 400.0} == record["training"]
    assert "mfu" not in record["parts"]["a"]  # lost in the noise: no rate


def test_comparison_takes_the_same_work_alone():
    def record(rate, **fields):
        variant = dataclasses.asdict(Variant("ours", **fields))
        return variant | {"name": str(fields), "training": {"images_per_s": rate}}

    torch = record(10.0) | {"kind": "torch", "name": "torch"}
    results = [
        record(5.0),
        torch,
        record(20.0, attention="xla"),
        record(99.0, inference=True),
        record(99.0, batch=16),
        record(99.0, size="vit_b16"),
    ]
    (pair,) = device.compare_with_torch(results)
    assert (pair["ratio"], pair["best_ratio"]) == (0.5, 2.0)


def test_median_of_rounds_leaves_out_the_first_calls(monkeypatch):
    clock = [0.0]
    durations = iter([9.0, 9.0, 9.0, 1.0] + 5 * [1.0] + 100 * [2.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def run():
        clock[0] += next(durations)

    times = timing.steady(run, lambda result: result, seconds=7.5)
    assert times["calls_a_round"] == 1
    assert (times["median_s"], times["max_s"], times["rounds"]) == (1.0, 2.0, 7)


@pytest.fixture(scope="module")
def tiny():
    config = pascal_context.get_config("tiny")
    config.tasks = ("semseg", "edge")
    config.model.depth = config.model.taps = 2
    config.dtype = "bfloat16"
    tasks = from_config(config)
    model = taskexpert.from_config(config, tasks)
    tx = optimizer.build(config, model.backbone)
    mesh = sharding.make_mesh(config.mesh, {}, devices=jax.devices()[:1])
    _, state, _ = train_state.abstract_and_shardings(model, tx, mesh, 0)
    batch = random_batch.make(config, tasks, config.batch_size, seed=0)
    return model, mesh, state, batch, config.batch_size


def test_each_program_adds_the_products_of_its_part(tiny):
    """The parts are times of programs that leave later parts out: here their products, which must be the budget's."""
    model, mesh, state, batch, images = tiny
    counted = budget.count(model).computed
    before, added = 0, {}
    for rung in parts.RUNGS:
        with sharding.use(mesh):
            jaxpr = parts.program(rung, model).trace(state, batch).jaxpr.jaxpr
        found = [p for p in products.products(jaxpr) if "upsampling" not in traced_step.part_of(p.path)]
        total = sum(product.flops for product in found)
        added[rung], before = total - before, total
    patches = (
        3 * 16**2 * model.backbone.architecture.width * math.prod(model.backbone.grid)
    )  # the image needs no gradient
    assert added["backbone"] == images * (6 * counted["backbone"] - 2 * patches)
    experts_and_gates = counted["experts"] + counted["gates"] + counted["memory"] / 11
    assert added["experts and gates"] == pytest.approx(images * 6 * experts_and_gates, rel=0.05)
    assert added["memory writes"] == pytest.approx(images * 6 * counted["memory"] * 10 / 11, rel=0.01)
    assert added["heads"] == images * 6 * counted["heads"]
    assert added["upsampling and losses"] == 0


def test_parts_are_differences_and_their_flops_add_up(tiny):
    model, *_, images = tiny
    programs = {name: {"median_s": 1.0 + index} for index, name in enumerate((*parts.RUNGS, "optimiser"))}
    found = parts.differences(programs, model, images)
    assert {part["median_s"] for part in found.values()} == {1.0}
    total = sum(part["model_flops"] for part in found.values())
    assert total == images * 6 * budget.count(model).total_computed


def test_smoke_run_writes_the_ceilings(tmp_path, capsys):
    output = tmp_path / "device.json"
    device.main([*SMALL, f"--output={output}", "--only=^ceilings"])
    report = json.loads(output.read_text())
    assert report["platform"] == "cpu" and report["versions"]["jax"] == jax.__version__ and report["commit"]
    assert report["ceilings"]["matmul_bfloat16"] > 0 and report["not_measured"] == []
    assert "TFLOP/s" in capsys.readouterr().out


@pytest.mark.slow
def test_a_variant_has_every_figure_of_both_steps(monkeypatch):
    config = nyud.get_config("tiny")
    config.tasks, config.model.depth, config.model.taps = ("depth",), 1, 1
    config.dataset.image_size, config.batch_size, config.eval.batch_size = (64, 80), 2, 2
    monkeypatch.setattr(measure, "config_of", lambda _: config)
    variant = Variant("ours", "nyud", "tiny", (64, 80), 2, "float32", evaluated=True)
    record = {"batch": 2, **measure.attempt(variant, 0.0)}
    assert record["status"] == "measured", record
    device.add_rates(record, {"matmul_bfloat16": 1e9})
    counted = budget.count(taskexpert.from_config(config, from_config(config))).total_computed
    for key, factor in (("training", 6), ("evaluation", 2)):
        step = record[key]
        assert step["model_flops"] == factor * 2 * counted
        assert step["mfu"] == pytest.approx(step["model_flops"] / step["median_s"] / 1e9)
        assert step["images_per_s"] == pytest.approx(2 / step["median_s"])
        assert step["compile_s"] > 0 and step["planned_memory_bytes"] > 0
    assert record["training"]["loss_is_finite"]
    assert "MFU" in device.line({**record, "name": variant.name})


def test_what_the_time_does_not_suffice_for_is_listed(tmp_path, capsys):
    output = tmp_path / "device.json"
    device.main([*SMALL, f"--output={output}", "--minutes=0"])
    assert "ceilings of the device; ours tiny" in capsys.readouterr().out
    assert len(json.loads(output.read_text())["not_measured"]) > 5


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path, capsys):
    first = tmp_path / "first.json"
    names = [variant.name for variant in full_plan()]
    statuses = ["measured", "does not fit", "refused", "failed", "stopped"]
    results = [{"name": name, "status": status} for name, status in zip(names[1:], statuses, strict=False)]
    first.write_text(json.dumps({"results": results}))
    device.main(["--list", f"--after={first}"])
    assert capsys.readouterr().out.splitlines() == [names[0], *names[4:]]


def test_inference_is_compared_with_inference():
    def record(kind, seconds, **fields):
        variant = dataclasses.asdict(Variant(kind, **fields)) | {"name": kind}
        return variant | {"latency": {"median_s": seconds, "model_flops": 1}}

    results = [record("torch", 0.02, inference=True), record("ours", 0.01, inference=True)]
    for of in results:
        device.add_rates(of, {})
    (pair,) = device.compare_with_torch(results)
    assert pair["ratio"] == 2.0


def test_a_variant_that_breaks_is_a_result():
    record = measure.attempt(Variant("ours", size="tiny", image=(64, 80), batch=2, attention="cudnn"), 0.0)
    assert record["status"] == "refused" and "needs an NVIDIA GPU" in record["reason"]


def test_a_variant_that_takes_too_long_is_stopped_and_one_that_dies_says_why():
    slow = Variant("ours", size="tiny", image=(64, 80), batch=2)
    assert device.measure(slow, 0.0, 0.2, "cpu")["status"] == "stopped"
    record = device.measure(slow, 0.0, 60.0, "no_such_platform")
    assert record["status"] == "failed" and "no_such_platform" in record["reason"]
