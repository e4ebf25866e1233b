"""benchmarks/compiled_program.py: what it reads of compiled programs, and that one compiled here is read right."""

import jax
from jax.experimental.compilation_cache import compilation_cache
import jax.numpy as jnp
import pytest

from benchmarks import compiled_buffers, compiled_program, compiled_text
from benchmarks.compiled_text import Program

GPU = """\
HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {1}: (1, {}, may-alias) }

%fused_select (param_0: f32[64,32], param_1: f32[64,32]) -> (f32[64,32], f32[64,32]) {
  %param_0 = f32[64,32]{1,0} parameter(0)
  %param_1 = f32[64,32]{1,0} parameter(1)
  %add.1 = f32[64,32]{1,0} add(%param_0, %param_1)
  ROOT %tuple.1 = (f32[64,32]{1,0}, f32[64,32]{1,0}) tuple(%add.1, %add.1)
}

%fused_fill () -> bf16[4,512,1024] {
  %constant.1 = bf16[] constant(0)
  ROOT %broadcast.1 = bf16[4,512,1024]{2,1,0} broadcast(%constant.1), dimensions={}
}

%fused_transpose (param_0.1: bf16[512,1024]) -> bf16[1024,512] {
  %param_0.1 = bf16[512,1024]{1,0} parameter(0)
  ROOT %transpose.1 = bf16[1024,512]{1,0} transpose(%param_0.1), dimensions={1,0}
}

%fused_both (param_0.2: bf16[512,1024]) -> f32[1024,512] {
  %param_0.2 = bf16[512,1024]{1,0} parameter(0)
  %transpose.2 = bf16[1024,512]{1,0} transpose(%param_0.2), dimensions={1,0}
  ROOT %convert.1 = f32[1024,512]{1,0} convert(%transpose.2)
}

%fused_keep (param_0.3: bf16[4,512,1024], param_1.3: bf16[512,1024], param_2.3: s32[]) -> bf16[4,512,1024] {
  %param_0.3 = bf16[4,512,1024]{2,1,0} parameter(0)
  %param_1.3 = bf16[512,1024]{1,0} parameter(1)
  %param_2.3 = s32[] parameter(2)
  %constant.3 = s32[] constant(0)
  %add.3 = s32[] add(%param_2.3, %constant.3)
  %bitcast.3 = bf16[1,512,1024]{2,1,0} bitcast(%param_1.3)
  ROOT %dynamic-update-slice.3 = bf16[4,512,1024]{2,1,0} \
dynamic-update-slice(%param_0.3, %bitcast.3, %add.3, %constant.3, %constant.3)
}

%body (turn: (s32[], bf16[512,1024], bf16[4,512,1024])) -> (s32[], bf16[512,1024], bf16[4,512,1024]) {
  %turn = (s32[], bf16[512,1024]{1,0}, bf16[4,512,1024]{2,1,0}) parameter(0)
  %count = s32[] get-tuple-element(%turn), index=0
  %tokens = bf16[512,1024]{1,0} get-tuple-element(%turn), index=1
  %kept = bf16[4,512,1024]{2,1,0} get-tuple-element(%turn), index=2
  %product = (bf16[512,1024]{1,0}, s8[4]{0}) custom-call(%tokens, %tokens), custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(step)/jvp(TaskExpert)/while/body/blocks/mlp/expand/dot_general"}
  %attention = (bf16[512,1024]{1,0}, f32[512]{0}) custom-call(%tokens, %tokens, %tokens), \
custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(step)/jvp(TaskExpert)/while/body/blocks/attend/x"}
  %turned = bf16[1024,512]{1,0} fusion(%tokens), kind=kInput, calls=%fused_transpose, \
metadata={op_name="jit(step)/jvp(TaskExpert)/while/body/blocks/mlp/transpose"}
  %both = f32[1024,512]{1,0} fusion(%tokens), kind=kInput, calls=%fused_both, \
metadata={op_name="jit(step)/jvp(TaskExpert)/while/body/blocks/mlp/transpose"}
  %keep = bf16[4,512,1024]{2,1,0} fusion(%kept, %tokens, %count), kind=kLoop, calls=%fused_keep, \
metadata={op_name="jit(step)/jvp(TaskExpert)/while/body/dynamic_update_slice"}
  ROOT %next = (s32[], bf16[512,1024]{1,0}, bf16[4,512,1024]{2,1,0}) tuple(%count, %tokens, %keep)
}

%condition (turn.1: (s32[], bf16[512,1024], bf16[4,512,1024])) -> pred[] {
  %turn.1 = (s32[], bf16[512,1024]{1,0}, bf16[4,512,1024]{2,1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (weights: f32[64,32], moment: f32[64,32], maps: bf16[8,32,32,64]) -> (f32[64,32], f32[64,32]) {
  %weights = f32[64,32]{1,0} parameter(0)
  %moment = f32[64,32]{1,0} parameter(1)
  %maps = bf16[8,32,32,64]{3,2,1,0} parameter(2)
  %kernel = bf16[64,3,3,64]{3,2,1,0} constant({...})
  %first = (bf16[8,32,32,64]{3,2,1,0}, u8[0]{0}) custom-call(%maps, %kernel), dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convForward", metadata={op_name="jit(step)/jvp(TaskExpert)/head_semseg/mix/conv"}
  %other = bf16[8,64,32,32]{3,2,1,0} constant({...})
  %second = (bf16[8,64,32,32]{3,2,1,0}, u8[0]{0}) custom-call(%other, %kernel), dim_labels=bf01_oi01->bf01, \
custom_call_target="__cudnn$convForward", metadata={op_name="jit(step)/jvp(TaskExpert)/head_semseg/mix/conv"}
  %resized = (f32[64,32]{1,0}, s8[4]{0}) custom-call(%weights, %moment), custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(step)/jvp(TaskExpert)/jit(_resize)/dot_general"}
  %fill = bf16[4,512,1024]{2,1,0} fusion(), kind=kLoop, calls=%fused_fill
  %zero = s32[] constant(0)
  %start = bf16[512,1024]{1,0} constant({...})
  %carry = (s32[], bf16[512,1024]{1,0}, bf16[4,512,1024]{2,1,0}) tuple(%zero, %start, %fill)
  %loop = (s32[], bf16[512,1024]{1,0}, bf16[4,512,1024]{2,1,0}) while(%carry), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"4"}}
  %update = (f32[64,32]{1,0}, f32[64,32]{1,0}) fusion(%weights, %moment), kind=kLoop, calls=%fused_select, \
metadata={op_name="jit(step)/jit(_where)/select_n"}
  %new_weights = f32[64,32]{1,0} get-tuple-element(%update), index=0
  %new_moment = f32[64,32]{1,0} get-tuple-element(%update), index=1
  %placed = f32[64,32]{1,0} copy(%new_moment)
  ROOT %out = (f32[64,32]{1,0}, f32[64,32]{1,0}) tuple(%new_weights, %placed)
}
"""

# Gathers: one with a product between its start and its end, one with nothing, one whose pieces the TPU compiler has
# put into fusions (two turns of a loop for one gather), and a slice that is asynchronous and no collective.
COLLECTIVES = """\
HloModule jit_step, is_scheduled=true

%piece (param_0: bf16[8,64]) -> bf16[64,64] {
  %param_0 = bf16[8,64]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[64,64]{1,0} all-gather(%param_0), channel_id=3
}

%async_collective_fusion.1 (param_0.1: bf16[8,64]) -> bf16[64,64] {
  %param_0.1 = bf16[8,64]{1,0} parameter(0)
  %all-gather.2 = bf16[64,64]{1,0} all-gather(%param_0.1), channel_id=3
  ROOT %convolution.1 = bf16[64,64]{1,0} convolution(%all-gather.2, %all-gather.2), dim_labels=bf_io->bf
}

%slice_computation (param_0.2: bf16[8,64]) -> bf16[8,8] {
  %param_0.2 = bf16[8,64]{1,0} parameter(0)
  ROOT %slice.1 = bf16[8,8]{1,0} slice(%param_0.2), slice={[0:8], [0:8]}
}

%turn (state: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %state = (s32[], bf16[8,64]{1,0}) parameter(0)
  %shard.1 = bf16[8,64]{1,0} get-tuple-element(%state), index=1
  %fused = bf16[64,64]{1,0} fusion(%shard.1), kind=kOutput, calls=%async_collective_fusion.1
  %number = s32[] get-tuple-element(%state), index=0
  ROOT %after = (s32[], bf16[8,64]{1,0}) tuple(%number, %shard.1)
}

%test (state.1: (s32[], bf16[8,64])) -> pred[] {
  %state.1 = (s32[], bf16[8,64]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (shard: bf16[8,64]) -> bf16[64,64] {
  %shard = bf16[8,64]{1,0} parameter(0)
  %gather = (bf16[8,64]{1,0}, bf16[64,64]{1,0}) all-gather-start(%shard), channel_id=1
  %dot.1 = bf16[8,8]{1,0} dot(%shard, %shard), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %gathered = bf16[64,64]{1,0} all-gather-done(%gather)
  %again = (bf16[8,64]{1,0}, bf16[64,64]{1,0}) all-gather-start(%shard), channel_id=2
  %bitcast.9 = bf16[64,8]{0,1} bitcast(%shard)
  %waited = bf16[64,64]{1,0} all-gather-done(%again)
  %sliced = ((bf16[8,64]{1,0}), bf16[8,8]{1,0}, s32[]) async-start(%shard), calls=%slice_computation
  %summed = bf16[16,16]{1,0} all-reduce(%dot.1), channel_id=9, to_apply=%test
  %dot.2 = bf16[8,8]{1,0} dot(%shard, %shard), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %slice-done = bf16[8,8]{1,0} async-done(%sliced)
  %async-collective-start.1 = bf16[64,64]{1,0} fusion(%shard), kind=kCustom, calls=%piece
  %zero = s32[] constant(0)
  %carry = (s32[], bf16[8,64]{1,0}) tuple(%zero, %shard)
  %loop = (s32[], bf16[8,64]{1,0}) while(%carry), condition=%test, body=%turn, \
backend_config={"known_trip_count":{"n":"2"}}
  ROOT %result = bf16[64,64]{1,0} copy(%gathered)
}
"""

# Two images of 2x2 pixels. Step 3 makes the peak: 256 bytes of arguments, maps in places 0 to 32 and 32 to 128, and a
# loop's array that shares the place of what it was made of.
ASSIGNMENT = """\
BufferAssignment:
allocation 0: size 256, parameter 0, shape |f32[64]| at ShapeIndex {}:
 value: <1 weights @0> (size=256,offset=0): f32[64]{0}
allocation 1: size 8, thread-local:
 value: <2 scalar @0> (size=8,offset=0): f32[2]{0}
allocation 2: size 192, preallocated-temp:
 value: <3 depth_map @0> (size=32,offset=0): f32[2,2,2]{2,1,0}
 value: <4 semseg_map{0} @0> (size=96,offset=32): f32[4,2,3]{2,1,0}
 value: <5 kept @0> (size=64,offset=128): f32[16]{0}
 value: <6 loop{1} (phi) @0> (size=64,offset=128): f32[16]{0}
"""
RANGES = """\
HloLiveRange (max 9):
  BufferLiveRange:
    weights{}:0-9
    depth_map{}:1-3
    semseg_map{0}:3-4
    kept{}:2-3
    loop{1}:3-9
"""
MAPS = """\
HloModule jit_step

ENTRY %main (weights: f32[64]) -> f32[16] {
  %weights = f32[64]{0} parameter(0)
  %depth_map = f32[2,2,2]{2,1,0} negate(%weights), \
metadata={op_name="jit(step)/jvp(TaskExpert)/jit(_resize)/dot_general"}
  %semseg_map = f32[4,2,3]{2,1,0} negate(%weights), metadata={op_name="jit(step)/transpose(jvp())/mul"}
  %kept = f32[16]{0} negate(%weights), metadata={op_name="jit(step)/mul"}
  ROOT %loop = f32[16]{0} negate(%kept), metadata={op_name="jit(step)/jvp(TaskExpert)/blocks/add"}
}
"""


@pytest.fixture(scope="module")
def gpu():
    return Program(GPU)


def kinds(program):
    return {step.instruction.name: step.kind for step in program.steps if step.kind}


def test_calls_and_fusions_of_a_gpu_are_told_apart(gpu):
    assert kinds(gpu) == {
        "first": "cuDNN convolutions",
        "second": "cuDNN convolutions",
        "resized": "cuBLAS products",
        "fill": "fills",
        "product": "cuBLAS products",
        "attention": "cuDNN attention",
        "turned": "copies",
        "both": "other kernels",
        "keep": "slices",
        "update": "other kernels",
        "placed": "copies",
    }


def test_products_are_counted_for_each_turn_with_their_operands(gpu):
    found = [(of.step.part, of.kind, of.step.times, of.float32) for of in gpu.products]
    assert found == [
        ("heads", "__cudnn$convForward", 1, False),
        ("heads", "__cudnn$convForward", 1, False),
        ("upsampling to image size", "__cublas$lt$matmul", 1, True),
        ("backbone, the rest", "__cublas$lt$matmul", 4, False),
        ("attention of tokens", "__cudnn$fmhaSoftmax", 4, False),
    ]


def test_a_convolution_with_the_channels_before_the_places_is_not_channels_last(gpu):
    assert [of.channels_last for of in gpu.products if "conv" in of.kind] == [True, False]
    assert "cuDNN convolutions: 2, of them bfloat16 with channels last: 1" in compiled_program.product_lines(gpu)


def test_a_kernel_that_updates_several_arrays_counts_once(gpu):
    assert compiled_program.donation_lines(gpu) == [
        "2 results are written in the place of arguments, 1 of them by a copy",
        "  2 are computed by 1 other kernels",
    ]


def test_moves_are_those_alone_and_those_beside_other_work(gpu):
    lines = compiled_program.move_lines(gpu)
    assert [line for line in lines if not line.startswith(" ")] == [
        "copies and transpositions over 1 MiB: 4 MiB in all",
        "kernels over 1 MiB that transpose beside other work: 8 MiB in all",
        "slices written to the arrays of a loop's turns, or taken out of them: 4 MiB",
        "arrays filled with one value: 4 MiB",
    ]


def test_kernels_are_summed_by_part(gpu):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in compiled_program.kernel_lines(gpu)[1:]]
    table = {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}
    assert table["backbone, the rest"] == {**dict.fromkeys(rows[0][1:], ""), "cuBLAS products": "4", "copies": "4"} | {
        "other kernels": "4",
        "all": "12",
    }
    assert table["all"]["all"] == "26"


def test_a_collective_is_told_by_what_runs_beside_it():
    """The gather in pieces counts once, and what is asynchronous but no collective is nobody's start."""
    found = [(of.kind, of.times, of.bytes, of.beside) for of in compiled_text.sent(Program(COLLECTIVES))]
    assert found == [
        ("all-gather", 1, 8192, "a product"),
        ("all-gather", 1, 8192, "nothing"),
        ("all-reduce", 1, 512, "nothing"),
        ("all-gather", 1, 8192, "a product"),
    ]


def test_the_peak_counts_each_place_once_and_names_the_maps_of_image_size():
    always, arrays = compiled_buffers.parse(ASSIGNMENT, RANGES)
    assert always == 256
    found = list(compiled_buffers.moments(always, arrays, Program(MAPS), pixels=8, channels=4))
    assert [(of.step, of.bytes, of.full_size) for of in found] == [
        (1, 256 + 32, 32),
        (2, 256 + 32 + 64, 32),
        (3, 256 + 192, 128),
    ]
    peak = found[-1]
    assert [compiled_buffers.channels_of(of, 8) for of in peak.maps] == [1, 3]


def test_channels_of_several_tasks_in_one_map_are_those_of_the_fewest_tasks():
    channels = {"semseg": 21, "human_parts": 7, "sal": 2, "edge": 1, "normals": 3}
    assert compiled_buffers.tasks_of(13, channels) == "human_parts + sal + edge + normals"
    assert compiled_buffers.tasks_of(3, channels) == "normals"
    assert compiled_buffers.tasks_of(35, channels) == "no sum of tasks"


@pytest.fixture
def uncached():
    """A kept program would leave no notes."""
    kept = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]: made at run time
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # what JAX has once decided holds
    yield
    jax.config.update("jax_enable_compilation_cache", kept)
    compilation_cache.reset_cache()


def test_a_kernel_reads_what_it_uses_and_writes_its_result(gpu):
    moved = {name: gpu.moved(gpu.step_of[name]) for name in ("product", "turned", "both", "keep", "fill")}
    counter = 4
    mib = compiled_text.MIB
    assert moved == {
        "product": 3 * mib,  # without the library's scratch memory
        "turned": 2 * mib,
        "both": 3 * mib,
        "keep": 2 * mib + counter,  # what it writes in its place, not the array of all turns
        "fill": 4 * mib,
    }


def test_a_slice_is_read_alone():
    text = """\
HloModule step, is_scheduled=true

%fused_slice (param_0: f32[8,1024], param_1: s32[]) -> f32[1024] {
  %param_0 = f32[8,1024]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %bitcast.1 = f32[8,1024]{1,0} bitcast(%param_0)
  %dynamic-slice.1 = f32[1,1024]{1,0} dynamic-slice(%bitcast.1, %param_1, %param_1), dynamic_slice_sizes={1,1024}
  ROOT %reshape.1 = f32[1024]{0} reshape(%dynamic-slice.1)
}

ENTRY %main (all: f32[8,1024], place: s32[]) -> f32[1024] {
  %all = f32[8,1024]{1,0} parameter(0)
  %place = s32[] parameter(1)
  ROOT %one = f32[1024]{0} fusion(%all, %place), kind=kLoop, calls=%fused_slice
}
"""
    program = Program(text)
    assert program.moved(program.step_of["one"]) == 2 * 4096 + 4


@pytest.mark.usefixtures("uncached")
def test_a_program_compiled_here_is_read_as_the_compiler_describes_it(tmp_path):
    def step(state, images):
        mixed, _ = jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ state["weights"]), None), images, length=3)
        return {"weights": state["weights"] + mixed.T @ images, "unused": state["unused"] * 2}, mixed.sum()

    state = {"weights": jnp.ones((64, 64)), "unused": jnp.ones((8,))}
    lowered = jax.jit(step, donate_argnums=0).lower(state, jnp.ones((128, 64)))
    compiled = lowered.compile(compiler_options={"xla_dump_to": str(tmp_path)})
    program = Program(compiled.as_text() or "")
    assert sorted(program.aliased) == [0, 1]
    assert sum(of.step.times for of in program.products) == 4
    assert all(of.float32 for of in program.products)
    sizes = compiled.memory_analysis()
    assert sizes is not None
    always, arrays = compiled_buffers.read(tmp_path)
    peak = max(of.bytes for of in compiled_buffers.moments(always, arrays, program, pixels=1, channels=0))
    beside = always - (sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes)
    assert 0 <= beside < 64  # constants
    assert always < peak <= always + sizes.temp_size_in_bytes


@pytest.mark.parametrize(("flags", "devices"), [([], 4), (["--topology=v5e:2x4"], 8), (["--topology=h200:1"], 1)])
def test_all_devices_of_the_topology_are_meant(monkeypatch, flags, devices):
    monkeypatch.setattr("sys.argv", ["compiled_program.py", *flags])
    assert compiled_program.devices_of(compiled_program.parse()) == devices
