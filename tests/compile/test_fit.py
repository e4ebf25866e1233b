"""`--mode=compile`: its report, its advice, topologies by name, and errors."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import pytest

from configs import nyud
from taskexpert_jax.compile import advice, fit, memory, topologies
from taskexpert_jax.compile import report as compile_report
from taskexpert_jax.compile.report import Program
from taskexpert_jax.compile.steps import abstract_batch
from taskexpert_jax.compile.topologies import GIB
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import budget, layers
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import optimizer, tally
from taskexpert_jax.training import state as train_state

ROOT = pathlib.Path(__file__).resolve().parents[2]


def small_config(*, data: int = -1, fsdp: int = 1):
    """A model with one of each part, and one image per device."""
    config = nyud.get_config("tiny")
    config.tasks = ("depth",)
    config.checkpoint.best_task = "depth"
    config.dataset.image_size = (32, 32)
    config.model.depth = config.model.taps = config.model.experts = 1
    config.mesh.data, config.mesh.fsdp = data, fsdp
    config.batch_size = config.eval.batch_size = 8 if data == -1 else data * fsdp
    return config


@pytest.fixture(scope="module")
def report():
    """Report of both steps on eight devices in two slices, with a copy of the model in each."""
    config = small_config(data=2, fsdp=4)
    config.mesh.slices = 2
    return fit.compile_steps(config)


def bytes_of(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_on_a_device(tree) -> int:
    """Bytes of one device's shards of a tree of abstract arrays."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def abstract_arguments(config):
    mesh = sharding.make_mesh(config.mesh, {})
    tasks = from_config(config)
    model = taskexpert.from_config(config, tasks)
    _, state, _ = train_state.abstract_and_shardings(model, optimizer.build(config, model.backbone), mesh, 0)
    return state, abstract_batch(tasks, config.batch_size, config.dataset.image_size, mesh)


@pytest.mark.multidevice
def test_the_report_tells_the_model_the_machine_and_the_steps(report):
    config = small_config()
    model = taskexpert.from_config(config, from_config(config))
    counted = budget.count(model)
    assert (report.parameters, report.multiply_adds) == (counted.total_parameters, counted.total_multiply_adds)
    assert report.train_flops == 6 * 8 * counted.total_computed
    assert (report.devices, report.mesh, report.topology) == (8, {"data": 2, "fsdp": 4, "tensor": 1}, "local")
    assert list(report.programs) == ["train", "eval"]
    assert report.memory is None and report.programs["train"].fits is None  # a CPU's memory is the host's
    train, evaluation = report.programs["train"], report.programs["eval"]
    assert train.arguments > evaluation.arguments  # the optimiser's state
    assert train.compile_seconds > 0 and train.uncounted_loops == 0
    assert train.needed == max(train.peak, train.reserved)


@pytest.mark.multidevice
def test_arguments_are_the_shards_of_state_and_batch_and_results_take_the_states_place(report):
    config = small_config(data=2, fsdp=4)
    state, batch = abstract_arguments(config)
    kept = jax.eval_shape(lambda: tally.empty(from_config(config)))
    train = report.programs["train"]
    found = bytes_on_a_device(state) + bytes_on_a_device(batch) + bytes_of(kept)
    assert train.arguments == pytest.approx(found, abs=64)
    assert bytes_on_a_device(state) < 0.5 * bytes_of(state)
    addresses = 8 * (len(jax.tree.leaves((state, kept))) + 1)  # pointers to results, on CPUs
    assert 0 <= train.reserved - train.arguments - train.temporaries - bytes_of(kept) <= addresses


@pytest.mark.multidevice
def test_kernels_are_gathered_and_every_gradient_is_reduced(report):
    train = report.programs["train"]
    gathered, reduced = train.collectives["all-gather"], train.between_slices["all-reduce"]
    assert gathered.bytes + reduced.bytes > 4 * report.parameters


@pytest.mark.multidevice
def test_an_abstract_batch_is_what_the_pipeline_makes():
    from input_pipeline import pipeline

    config = nyud.get_config("tiny")
    config.tasks = ("semseg", "depth", "normals", "edge", "human_parts", "sal")
    config.loss_weights = dict.fromkeys(config.tasks, 1.0)
    tasks = from_config(config)
    mesh = sharding.make_mesh(config.mesh, {})
    found = abstract_batch(tasks, 8, (64, 80), mesh)
    expected = pipeline._spec(tasks, (64, 80))
    del expected["id"]  # stays on the host
    assert {key: (leaf.shape, leaf.dtype.name) for key, leaf in found.items()} == {
        key: ((8, *spec.shape), spec.dtype.name) for key, spec in expected.items()
    }
    assert {leaf.sharding for leaf in found.values()} == {sharding.batch_sharding(mesh)}


@pytest.mark.parametrize(("name", "near"), [("v5e-8x8", "did you mean v5e:8x8?"), ("dgx", "v4:2x2x1")])
def test_an_unknown_topology_is_refused_with_the_known_ones(name, near):
    with pytest.raises(UserError, match=rf"^--topology={name}: .*v5e:2x2, 2x4, 4x4.*h200:1, 2, 4, 8") as error:
        topologies.devices(name)
    assert near in str(error.value) and "\n" not in str(error.value)


def test_a_topology_whose_compiler_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'libtpu, not the hardware: pip install "taskexpert-jax\[tpu\]"$'):
        topologies.devices("v5e:2x4")
    with pytest.raises(UserError, match=r'jax_cuda13_plugin, .* "taskexpert-jax\[cuda\]"$'):
        topologies.devices("h200:8")


@pytest.mark.parametrize("name", ["2x v5e:4x4", "2xv5e:4x4", "2 x v5e:4x4", "12x v5p:2x2x1", "v5e:4x4"])
def test_a_topology_of_several_slices_is_asked_for_by_their_number(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "installed")
    described = SimpleNamespace(devices=["a device"])
    asked = {}
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", lambda **of: asked.update(of) or described)
    assert topologies.devices(name) == ["a device"] and topologies.platform_of(name) == "tpu"
    assert asked.pop("platform") == "tpu"
    expected = {"topology_name": "v5e:4x4" if "v5e" in name else "v5p:2x2x1"}
    expected |= {} if name == "v5e:4x4" else {"num_slices": 12 if "12" in name else 2}
    expected |= {"chip_config_name": "megacore"} if "v5p" in name else {}
    assert asked == expected


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "2x v5e:4x5",
            r"^--topology=2x v5e:4x5: did you mean 2x v5e:4x8\? known are .*; several TPU slices: .2x v5e:4x4.$",
        ),
        ("0x v5e:4x4", r"^--topology=0x v5e:4x4: "),
        ("2x h100:8", r"^--topology=2x h100:8: slices are of TPUs; .* the number of all GPUs.* --config.mesh.slices$"),
    ],
)
def test_slices_that_cannot_be_are_refused(name, line):
    with pytest.raises(UserError, match=line):
        topologies.devices(name)


@pytest.mark.multidevice
def test_the_report_tells_traffic_between_slices_apart(report):
    """fsdp lies within a slice, so kernels are gathered there; gradients are reduced over both slices."""
    train = report.programs["train"]
    assert report.slices == 2 and "all-gather" in train.collectives
    assert "all-gather" not in train.between_slices
    assert train.between_slices["all-reduce"].bytes > report.parameters  # at least a quarter of their 4 bytes
    between = f"{sum(of.sent for of in train.between_slices.values()) / 2**20:.1f}"
    lines = compile_report.text(report).splitlines()
    assert lines[0].endswith("8 x cpu in 2 slices, data=2 x fsdp=4 x tensor=1")
    at = lines.index(f"  between slices (DCN): {between} MiB sent per device")
    assert any(line.startswith("  all-gather ") for line in lines[:at])
    assert lines[at + 1].startswith("  all-reduce ")


def test_advised_fsdp_stays_within_a_slice():
    config = small_config()
    config.mesh.slices = 4
    assert "--config.mesh.fsdp=2" in advice.advice(config, sharding.make_mesh(config.mesh, {}))


def test_too_large_a_program_is_a_verdict_with_advice():
    error = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. "
        "Exceeded hbm capacity by 4.75G."
    )
    needed = memory.needed(error)
    assert needed == int(20.5 * 2**30)
    earlier = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.00G) exceeds "
        "available HBM (15.75G). None"
    )
    assert memory.needed(earlier) == 16 * 2**30
    assert memory.needed("INTERNAL: Used 20.50G of 15.75G hbm") is None
    config = small_config()
    config.batch_size = 32
    advised = advice.advice(config, sharding.make_mesh(config.mesh, {}))
    verdict = compile_report.verdict(Program(needed, fits=False), 16 * GIB, advised)
    facts = r"does not fit.* 20\.50 GiB of 16.*--config\.model\.remat=True or --config\.mesh\.fsdp=8 or .*"
    assert re.match(facts + r"--config\.accumulate_steps .*\b4 images", verdict)


@pytest.fixture
def tried(monkeypatch):
    """Configs that are tried; only remat, fsdp=8 and two micro-batches together fit."""
    seen = []

    def compiled(config, topology, step, partitions, memory):
        assert (topology, step, partitions, memory) == ("v5e:2x4", "train", (0,) * 8, 16 * GIB)
        seen.append((config.model.remat, config.mesh.fsdp, config.accumulate_steps))
        fits = seen[-1] == (True, 8, 2)
        needed = GIB if fits else 17 * GIB
        return Program(needed, fits)

    monkeypatch.setattr(fit, "_compile_until_laid_out", compiled)
    return seen


@pytest.mark.multidevice
def test_what_does_not_fit_is_tried_with_changes_until_it_does(tried, report):
    config = small_config()
    config.batch_size = 32
    found = tuple(fit._trials(config, "v5e:2x4", sharding.make_mesh(config.mesh, {}), (0,) * 8, 16 * GIB))
    assert tried == [(True, 1, 1), (False, 8, 1), (True, 8, 1), (True, 8, 2)]  # not with four micro-batches
    assert (config.model.remat, config.mesh.fsdp) == (False, 1)
    program = Program(17 * GIB, fits=False)
    changed = dataclasses.replace(report, memory=16 * GIB, programs={"train": program}, trials=found)
    lines = compile_report.text(changed).splitlines()
    assert lines[3].startswith("train step, global batch 8: does not fit: needs 17.00 GiB of 16; try ")
    assert lines[5:-2] == [
        "  with --config.model.remat=True: 17.00 GiB, does not fit",
        "  with --config.mesh.fsdp=8: 17.00 GiB, does not fit",
        "  with --config.model.remat=True --config.mesh.fsdp=8: 17.00 GiB, does not fit",
        "  with --config.model.remat=True --config.mesh.fsdp=8 --config.accumulate_steps=2: 1.00 GiB, fits",
    ]


@pytest.mark.multidevice
def test_the_cost_of_the_training_is_named_as_an_estimate(report):
    """1e13 FLOPs a step and 40 000 steps, at 40 % of a v5e's 197 TFLOP/s: 4e17 / 7.88e13 / 3600 = 1.41 hours."""
    assert report.steps == small_config().num_steps and report.peak_flops is None  # of a CPU
    assert "hours" not in compile_report.cost(report)
    changed = dataclasses.replace(
        report, train_flops=10**13, steps=40_000, peak_flops=197e12, device_kind="TPU v5 lite"
    )
    assert compile_report.text(changed).splitlines()[-1] == (
        "training, 40000 steps: 4.000e+17 model FLOPs; 1.41 chip-hours if a step reaches 40% of the peak of 197 TFLOP/s"
        ": an estimate, nothing was run"
    )


@pytest.mark.parametrize(
    ("kind", "flops"),
    [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12), ("NVIDIA H200", 989e12), ("cpu", None)],
)
def test_the_peak_of_a_device_is_known_by_its_kind(kind, flops):
    assert topologies.peak_of(SimpleNamespace(device_kind=kind)) == flops


@pytest.mark.multidevice
def test_an_evaluation_that_does_not_fit_is_not_told_to_change_the_training(report):
    program = dataclasses.replace(report.programs["eval"], needed=17 * GIB, fits=False)
    changed = dataclasses.replace(report, memory=16 * GIB, programs={"eval": program})
    assert compile_report.text(changed).splitlines()[3] == (
        "eval step, global batch 8: does not fit: needs 17.00 GiB of 16; try a smaller --config.eval.batch_size or "
        "a larger --config.mesh.fsdp or .tensor"
    )


@pytest.mark.multidevice
@pytest.mark.parametrize(("needed", "advised"), [(100, False), (110, True)])
def test_a_gpu_program_above_xlas_share_of_the_memory_is_told(report, needed, advised):
    program = dataclasses.replace(report.programs["train"], needed=needed * GIB, fits=True)
    changed = {"memory": 141 * GIB, "device_kind": "NVIDIA H200", "programs": {"train": program}}
    text = compile_report.text(dataclasses.replace(report, **changed))
    assert ("XLA_PYTHON_CLIENT_MEM_FRACTION" in text) is advised


@pytest.mark.multidevice
def test_advice_keeps_a_mesh_that_was_given_whole():
    config = small_config(data=8)
    found = advice.advice(config, sharding.make_mesh(config.mesh, {}))
    assert found[1] == "--config.mesh.data=1 --config.mesh.fsdp=8"


@pytest.mark.parametrize("topology", [None, "h200:8"])
def test_quick_is_for_tpus_alone(topology):
    with pytest.raises(UserError, match=r"^--quick needs a --topology of TPUs"):
        fit.compile_steps(small_config(), topology, quick=True)


def test_a_config_is_held_against_the_devices_that_it_is_compiled_for(monkeypatch):
    """A fused GPU kernel can be compiled in a process that has no GPU."""
    config = small_config()
    config.model.attention, config.dtype = "cudnn", "bfloat16"
    tasks = from_config(config)
    gpu, tpu, cpu = (SimpleNamespace(platform=platform) for platform in ("gpu", "tpu", "cpu"))
    model = taskexpert.from_config(config, tasks, gpu)
    assert model.backbone.architecture.attention == "cudnn"
    with pytest.raises(UserError, match=r"attention='cudnn' needs an NVIDIA GPU.* but this is tpu with bfloat16"):
        taskexpert.from_config(config, tasks, tpu)
    config.model.attention, config.model.unroll = "xla", "auto"
    assert taskexpert.from_config(config, tasks, cpu).backbone.unroll
    assert not taskexpert.from_config(config, tasks, tpu).backbone.unroll


ASSIGNMENT = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <5 sum @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 4096, parameter 30, shape |f32[32,32]| at ShapeIndex {}, maybe-live-out:
allocation 2: size 2048, parameter 32, shape |f32[32,16]| at ShapeIndex {}:
allocation 3: size 1024, output shape is |(f32[32,32], f32[])|, maybe-live-out:
allocation 4: size 64, constant:
allocation 5: size 300000, preallocated-temp:
 value: <7 fusion{1} @0> (size=200000,offset=4096): f32[50000]{0}
allocation 6: size 117438464, color 1, preallocated-temp:
"""


def test_the_layout_of_the_main_memory_is_read_from_the_compilers_notes(tmp_path):
    layout = memory.parse(ASSIGNMENT)
    reserved = 6144 + 1024 + 300576  # one of the results takes the place of an argument
    assert layout == memory.Layout(reserved, arguments=6144, outputs=5120, temporaries=512 + 64 + 300000)
    for name, text in {"-buffer-assignment": ASSIGNMENT, "": "HloModule step"}.items():
        (tmp_path / f"module_0003.jit_step.after_optimizations{name}.txt").write_text(text)
    assert not memory.is_written(tmp_path)
    (tmp_path / "module_0003.jit_step.after_optimizations_after_buffer_assignment.txt").touch()
    assert memory.is_written(tmp_path)
    assert memory.read(tmp_path) == (layout, "HloModule step")


@pytest.mark.multidevice
def test_the_gradient_of_a_gathered_kernel_is_in_shards():
    """With the kernel's own sharding it would be all-reduced over all devices before each takes its shard."""
    mesh = sharding.make_mesh(small_config(data=1, fsdp=8).mesh, {})
    split = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    kernel = jax.ShapeDtypeStruct((3, 3, 16, 8), jnp.float32, sharding=split)
    images = jax.ShapeDtypeStruct((8, 4, 4, 16), jnp.float32, sharding=sharding.batch_sharding(mesh))

    def loss(kernel, images):
        dimensions = ("NHWC", "HWIO", "NHWC")
        conv = jax.lax.conv_general_dilated
        return layers.gathered_conv(conv, images, kernel, (1, 1), "SAME", dimension_numbers=dimensions).sum()

    with sharding.use(mesh):
        compiled = jax.jit(jax.grad(loss)).lower(kernel, images).compile()
    assert compiled.output_shardings.is_equivalent_to(split, 4)


def test_verdict_of_a_program_that_fits():
    assert compile_report.verdict(Program(GIB, fits=True), 16 * GIB, ()) == "fits (1.00 of 16 GiB)"
    unknown = compile_report.verdict(Program(GIB, fits=None), None, ())
    assert "1.00 GiB" in unknown and "fit" not in unknown


def test_compiling_asks_for_no_workdir():
    command = [sys.executable, "main.py", "--config=configs/nyud.py:tiny", "--mode=compile", "--topology=v5e:1x3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: --topology=v5e:1x3: did you mean v5e:")


@pytest.mark.multidevice
def test_the_mode_prints_its_report_and_writes_it(report, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fit, "compile_steps", lambda config, topology, quick: report)
    fit.run(None, None, tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    sent = report.programs["train"].collectives["all-reduce"].sent
    assert written["programs"]["train"]["collectives"]["all-reduce"]["sent"] == sent
    printed = capsys.readouterr().out
    assert (
        "8 x cpu in 2 slices, data=2 x fsdp=4 x tensor=1" in printed and "eval step, global batch 8: needs" in printed
    )
    with pytest.raises(UserError, match=r"--report=.*/nowhere/report\.json: .*/nowhere "):
        fit.run(None, None, tmp_path / "nowhere" / "report.json")


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: extra tpu")
def test_a_step_is_compiled_for_a_tpu_that_is_not_there():
    config = small_config(data=1, fsdp=8)
    report = fit.compile_steps(config, "v5e:2x4", steps=("train",))
    program = report.programs["train"]
    assert (report.device_kind, report.memory, program.fits) == ("TPU v5 lite", 16 * 2**30, True)
    state, batch = abstract_arguments(config)
    assert program.arguments >= bytes_on_a_device(state) + bytes_on_a_device(batch)  # tiles of 8 x 128 need more
    assert {"all-gather", "all-reduce"} <= program.collectives.keys()
    assert program.uncounted_loops == 0
    # Without machine code the program is the same, but compile time and peak are unknown.
    quick = fit.compile_steps(config, "v5e:2x4", steps=("train",), quick=True).programs["train"]
    assert quick == dataclasses.replace(program, compile_seconds=None, peak=None, needed=quick.needed)
    assert quick.needed == quick.reserved >= program.peak > quick.arguments


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: extra tpu")
def test_a_step_is_compiled_for_two_tpu_slices_that_are_not_there():
    config = small_config(data=2, fsdp=4)
    report = fit.compile_steps(config, "2x v5e:2x2", steps=("train",), quick=True)
    program = report.programs["train"]
    assert (report.devices, report.slices, report.mesh) == (8, 2, {"data": 2, "fsdp": 4, "tensor": 1})
    assert "all-gather" in program.collectives and program.between_slices.keys() == {"all-reduce"}
    # Each device exchanges its shard of the gradients, of 2 bytes each or more: small arrays are padded.
    assert program.between_slices["all-reduce"].sent > 2 * report.parameters / 4
