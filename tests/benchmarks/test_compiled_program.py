"""benchmarks/compiled_program.py: kinds, parts and bytes of the kernels of compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import compiled_program
from benchmarks.program.text import MIB, Program

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
metadata={op_name="jit(step)/jvp(MultiTaskModel)/while/body/blocks/mlp/expand/dot_general"}
  %attention = (bf16[512,1024]{1,0}, f32[512]{0}) custom-call(%tokens, %tokens, %tokens), \
custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(step)/jvp(MultiTaskModel)/while/body/blocks/attend/x"}
  %turned = bf16[1024,512]{1,0} fusion(%tokens), kind=kInput, calls=%fused_transpose, \
metadata={op_name="jit(step)/jvp(MultiTaskModel)/while/body/blocks/mlp/transpose"}
  %both = f32[1024,512]{1,0} fusion(%tokens), kind=kInput, calls=%fused_both, \
metadata={op_name="jit(step)/jvp(MultiTaskModel)/while/body/blocks/mlp/transpose"}
  %keep = bf16[4,512,1024]{2,1,0} fusion(%kept, %tokens, %count), kind=kLoop, calls=%fused_keep, \
metadata={op_name="jit(step)/jvp(MultiTaskModel)/while/body/dynamic_update_slice"}
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
custom_call_target="__cudnn$convForward", metadata={op_name="jit(step)/jvp(MultiTaskModel)/head_semseg/mix/conv"}
  %other = bf16[8,64,32,32]{3,2,1,0} constant({...})
  %second = (bf16[8,64,32,32]{3,2,1,0}, u8[0]{0}) custom-call(%other, %kernel), dim_labels=bf01_oi01->bf01, \
custom_call_target="__cudnn$convForward", metadata={op_name="jit(step)/jvp(MultiTaskModel)/head_semseg/mix/conv"}
  %resized = (f32[64,32]{1,0}, s8[4]{0}) custom-call(%weights, %moment), custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(step)/jvp(MultiTaskModel)/jit(_resize)/dot_general"}
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


def test_moves_are_those_alone_and_those_beside_other_work(gpu):
    lines = compiled_program.move_lines(gpu)
    assert [line for line in lines if not line.startswith(" ")] == [
        "copies and transpositions over 1 MiB: 4 MiB in all",
        "kernels over 1 MiB that transpose and do other work: 8 MiB in all",
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


def test_a_kernel_reads_what_it_uses_and_writes_its_result(gpu):
    names = ("product", "turned", "both", "keep", "fill")
    counter = 4
    assert {step.instruction.name: gpu.moved(step) for step in gpu.steps if step.instruction.name in names} == {
        "product": 3 * MIB,  # without the library's scratch memory
        "turned": 2 * MIB,
        "both": 3 * MIB,
        "keep": 2 * MIB + counter,  # what it writes in its place, not the array of all turns
        "fill": 4 * MIB,
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
    (step,) = [step for step in program.steps if step.instruction.name == "one"]
    assert program.moved(step) == 2 * 4096 + 4


def test_a_program_compiled_here_is_read_with_its_loop():
    def step(weights, images):
        mixed, _ = jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ weights), None), images, length=3)
        return weights + mixed.T @ images

    compiled = jax.jit(step).lower(jnp.ones((64, 64)), jnp.ones((128, 64))).compile()
    dots = [of for of in Program(compiled.as_text() or "").steps if of.path.endswith("dot_general") and of.kind]
    assert sum(of.times for of in dots) == 4
