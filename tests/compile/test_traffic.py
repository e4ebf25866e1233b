"""Traffic of a compiled program: collectives in loops, by group size, and split into parts."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import pytest

from taskexpert_jax.compile import groups, traffic
from taskexpert_jax.compile.traffic import Traffic
from taskexpert_jax.parallel import sharding

ONE_SLICE = (0,) * 8

PROGRAM = """
HloModule step, entry_computation_layout={(f32[8])->f32[8]}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], f32[256])) -> (s32[], f32[256]) {
  %p = (s32[], f32[256]{0}) parameter(0)
  %step = s32[] constant(2)
  %i = s32[] get-tuple-element(%p), index=0
  %next = s32[] add(%i, %step)
  %x = f32[256]{0:T(256)} get-tuple-element(%p), index=1
  %cps = (f32[256]{0}, f32[256]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=1, \
    source_target_pairs={{0,1},{1,0}}
  %cpd = f32[256]{0:T(256)} collective-permute-done(%cps)
  ROOT %t = (s32[], f32[256]{0}) tuple(%next, %cpd)
}

%inner_condition (p: (s32[], f32[256])) -> pred[] {
  %p = (s32[], f32[256]{0}) parameter(0)
  %limit = s32[] constant(7)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%outer_body (p: (s32[], f32[256])) -> (s32[], f32[256]) {
  %p = (s32[], f32[256]{0}) parameter(0)
  %one = s32[] constant(1)
  %x = f32[256]{0} get-tuple-element(%p), index=1
  %start = (s32[], f32[256]{0}) tuple(%one, %x)
  ROOT %w = (s32[], f32[256]{0}) while(%start), condition=%inner_condition, body=%inner_body
}

%outer_condition (p: (s32[], f32[256])) -> pred[] {
  %p = (s32[], f32[256]{0}) parameter(0)
  ROOT %x = pred[] custom-call(%p), custom_call_target="who knows"
}

%first_piece (q: bf16[8,16]) -> bf16[64,16] {
  %q = bf16[8,16]{1,0} parameter(0)
  ROOT %ag.1 = bf16[64,16]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=5, replica_groups={{0,1,2,3,4,5,6,7}}, \
    dimensions={0}
}

%last_piece (q: bf16[8,16]) -> bf16[64,16] {
  %q = bf16[8,16]{1,0} parameter(0)
  ROOT %ag.2 = bf16[64,16]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=5, replica_groups={{0,1,2,3,4,5,6,7}}, \
    dimensions={0}
}

%all-reduce-scatter.3 (q: f32[64]) -> f32[8] {
  %q = f32[64]{0} parameter(0)
  %ar.s = f32[64]{0} all-reduce(%q), channel_id=6, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %cut = f32[8]{0} slice(%ar.s), slice={[0:8]}
}

%all-reduce-scatter.4 (q: f32[128]) -> f32[16] {
  %q = f32[128]{0} parameter(0)
  %ar.t = f32[128]{0} all-reduce(%q), channel_id=6, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %cut = f32[16]{0} slice(%ar.t), slice={[0:16]}
}

ENTRY %main (x: f32[256], y: bf16[8,16]) -> f32[256] {
  %x = f32[256]{0} parameter(0)
  %y = bf16[8,16]{1,0} parameter(1)
  %f1 = bf16[64,16]{1,0} fusion(%y), kind=kCustom, calls=%first_piece
  %f2 = bf16[64,16]{1,0} fusion(%y), kind=kCustom, calls=%last_piece
  %f3 = f32[8]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
  %f4 = f32[16]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.4
  %ar = (f32[10]{0}, /*index=1*/s32[]) all-reduce(%a, %b), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}, \
    to_apply=%add
  %rs = f32[32]{0} reduce-scatter(%x), channel_id=8, replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, \
    to_apply=%add
  %tuple = (s32[], f32[256]{0}) tuple(%zero, %x)
  %w = (s32[], f32[256]{0}) while(%tuple), condition=%outer_condition, body=%outer_body, \
    backend_config={"known_trip_count":{"n":"5"}}
  ROOT %out = f32[256]{0} get-tuple-element(%w), index=1
}
"""


def test_collectives_of_a_program_are_counted_with_their_loops_and_groups():
    found, _, uncounted_loops = traffic.count(PROGRAM, ONE_SLICE)
    assert found == {
        "all-gather": Traffic(1, 64 * 16 * 2, 64 * 16 * 2 * 7 // 8),  # one channel in two fusions
        "all-reduce": Traffic(1, 44, 66),  # groups of four: 2 * 3/4
        "collective-permute": Traffic(15, 15 * 1024, 15 * 1024),  # 5 iterations of 1, 3, 5 below 7
        # Two fusions, complete though they share a channel, and one plain reduce-scatter.
        "reduce-scatter": Traffic(3, (64 + 128) * 4 + 2 * 32 * 4, (64 + 128) * 4 * 7 // 8 + 32 * 4),
    }
    assert uncounted_loops == 0


def test_a_gather_whose_pieces_stand_in_a_loop_is_counted_where_it_begins():
    """XLA's TPU compiler overlaps a gather with the matmuls of an inner loop this way."""
    pieces = """  %x = f32[256]{0} get-tuple-element(%p), index=1
  %f5 = bf16[64,16]{1,0} fusion(%x), kind=kCustom, calls=%first_piece
"""
    inside = PROGRAM.replace("  %x = f32[256]{0} get-tuple-element(%p), index=1\n", pieces)
    begun = inside.replace("%f1 = ", "%async-collective-start.1 = ").replace("%f2 = ", "%async-collective-done.1 = ")
    of_one = 64 * 16 * 2
    assert traffic.count(inside, ONE_SLICE)[0]["all-gather"] == Traffic(6, 6 * of_one, 6 * of_one * 7 // 8)
    assert traffic.count(begun, ONE_SLICE)[0]["all-gather"] == Traffic(1, of_one, of_one * 7 // 8)


def test_an_instruction_that_is_broken_into_lines_ends_no_computation():
    """XLA writes the call of a Pallas kernel on several lines; instructions after it in the loop body count too."""
    at = "  %x = f32[256]{0:T(256)} get-tuple-element(%p), index=1\n"
    kernel = (
        '  %k = f32[256]{0} custom-call(%x), frontend_attributes={kernel_metadata={\n"profile":"{}"\n}}, metadata={}\n'
    )
    assert at in PROGRAM
    broken = PROGRAM.replace(at, at + kernel)
    assert traffic.count(broken, ONE_SLICE) == traffic.count(PROGRAM, ONE_SLICE)
    found = traffic.parse(broken)[0]["inner_body"]["k"]
    assert found.rest.endswith('"profile":"{}"}}, metadata={}')


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    found, _, uncounted_loops = traffic.count(PROGRAM.replace("known_trip_count", "other"), ONE_SLICE)
    assert found["collective-permute"].count == 3
    assert uncounted_loops == 1


@pytest.mark.multidevice
def test_a_real_sum_over_devices_in_a_scan_is_counted():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def summed(values):
        def turn(carry, _):
            return jax.lax.psum(carry, "x") / 8, None

        return jax.lax.scan(turn, values, length=6)[0]

    split = PartitionSpec("x")
    mapped = jax.shard_map(summed, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    values = jax.ShapeDtypeStruct((80, 3), jnp.float32, sharding=NamedSharding(mesh, split))
    compiled = jax.jit(mapped).lower(values).compile()
    size = 6 * 10 * 3 * 4
    assert traffic.count(compiled.as_text(), ONE_SLICE)[0] == {"all-reduce": Traffic(6, size, size * 7 // 4)}


TWO_SLICES = (0, 0, 0, 0, 1, 1, 1, 1)


def test_a_collective_whose_groups_span_slices_is_counted_apart():
    """The gather and the two reduce-scatters over all eight devices, and the one over pairs; not the groups of four."""
    found = traffic.count(PROGRAM, TWO_SLICES)
    whole = traffic.count(PROGRAM, ONE_SLICE)
    assert found.within == {kind: whole.within[kind] for kind in ("all-reduce", "collective-permute")}
    assert found.between == {kind: whole.within[kind] for kind in ("all-gather", "reduce-scatter")}
    assert whole.between == {}
    alternating = traffic.count(PROGRAM, (0, 1) * 4)
    assert alternating.within == {"reduce-scatter": Traffic(1, 2 * 32 * 4, 32 * 4)}  # pairs 0 and 4, 1 and 5, ...
    assert alternating.between["collective-permute"] == whole.within["collective-permute"]


# Of a program that libtpu compiled for several slices: what a device of one slice hands its host.
SENDS = """
HloModule step, num_partitions=4

%body (p: (s32[], f32[2,8,128])) -> (s32[], f32[2,8,128]) {
  %p = (s32[], f32[2,8,128]{2,1,0}) parameter(0)
  %x = f32[2,8,128]{2,1,0} get-tuple-element(%p), index=1
  %token = token[] after-all()
  %send.1 = (f32[2,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%x, %token), channel_id=1, is_host_transfer=true, \
    frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",\
_xla_megascale_target="{1,2,3,4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (f32[2,8,128]{2,1,0}, u32[], token[]) recv(%token), channel_id=2, is_host_transfer=true, \
    frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",\
_xla_megascale_target="{1,2,3,4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent.1 = token[] send-done(%send.1), channel_id=1, is_host_transfer=true
  ROOT %t = (s32[], f32[2,8,128]{2,1,0}) tuple(%i, %x)
}

%condition (p: (s32[], f32[2,8,128])) -> pred[] {
  %p = (s32[], f32[2,8,128]{2,1,0}) parameter(0)
  ROOT %x = pred[] custom-call(%p), custom_call_target="who knows"
}

ENTRY %main (y: bf16[1,1,512]) -> bf16[1,1,512] {
  %y = bf16[1,1,512]{2,1,0} parameter(0)
  %ar = bf16[1,1,512]{2,1,0} all-reduce(%y), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %send.2 = (bf16[1,1,512]{2,1,0:T(1,128)}, u32[], token[]) send(%y, %token), channel_id=1, is_host_transfer=true, \
    frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target=\
{{100000,200000},{100001,200001},{300000,400000},{300001,400001}},_xla_megascale_transfer_type="ALL_GATHER"}
  %send.3 = (bf16[1,1,512]{2,1,0:T(1,128)}, u32[], token[]) send(%y, %token), channel_id=3, is_host_transfer=true, \
    frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target=\
{{200000->100000},{200001->100001}},_xla_megascale_transfer_type="ONE_TO_ONE"}
  %send.4 = (bf16[1,1,512]{2,1,0:T(1,128)}, u32[], token[]) send(%y, %token), channel_id=4, is_host_transfer=true, \
    frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target=\
{{100000,100001,200000,200001},{300000,300001,400000,400001}},_xla_megascale_transfer_type="ALL_TO_ALL"}
  %send.5 = (bf16[1,1,512]{2,1,0:T(1,128)}, u32[], token[]) send(%y, %token), channel_id=5, is_host_transfer=true
  %w = (s32[], f32[2,8,128]{2,1,0}) while(%tuple), condition=%condition, body=%body, \
    backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = bf16[1,1,512]{2,1,0} copy(%ar)
}
"""


def test_exchanges_of_tpu_slices_are_sends_of_the_program_of_one_slice():
    found = traffic.count(SENDS, (0,) * 4)
    assert found.within == {"all-reduce": Traffic(1, 1024, 1536)}
    assert found.between == {
        "all-gather": Traffic(1, 2048, 1024),  # a shard is sent, two slices have it then
        "all-reduce": Traffic(3, 3 * 8192, 3 * 8192 * 3 // 2),  # four slices: 2 * 3/4
        "all-to-all": Traffic(1, 1024, 512),  # half of it to the device's own slice
        "collective-permute": Traffic(1, 1024, 1024),
    }


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("replica_groups={{0,4},{1,5}}, dimensions={0}", [[0, 4], [1, 5]]),
        ("channel_id=1, source_target_pairs={{0,1},{1,2}}, metadata={}", [[0, 1], [1, 2]]),
        ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("to_apply=%add", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x=y", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['x'=2,'y'=4] {'y'}, a=b", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['x'=2,'y'=2,'z'=2] {'x','z'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['x'=8] {'x':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['x'=8] {'x':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['x'=8] {'x':(1)2,'x':(4)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['x'=2,'y'=2], device_ids=(3,1,0,2) {'y'}", [[3, 1], [0, 2]]),
    ],
)
def test_groups_of_a_collective(attributes, expected):
    assert groups.of(attributes, 8) == expected


@pytest.mark.multidevice
@pytest.mark.parametrize(("axes", "within", "between"), [("data", 0, 1), ("fsdp", 1, 0), (("data", "fsdp"), 0, 1)])
def test_a_real_sum_over_an_axis_is_between_slices_if_the_axis_is(axes, within, between):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1, "slices": 2}, {})
    split = PartitionSpec(("data", "fsdp"))
    mapped = jax.shard_map(lambda x: jax.lax.psum(x, axes), mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    values = jax.ShapeDtypeStruct((80, 3), jnp.float32, sharding=NamedSharding(mesh, split))
    found = traffic.count(jax.jit(mapped).lower(values).compile().as_text(), TWO_SLICES)
    assert (len(found.within), len(found.between)) == (within, between)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[8,16]{1,0:T(8,128)S(1)}", 512),
        ("(bf16[3], /*index=1*/pred[2,2], u32[])", 6 + 4 + 4),
        ("s4[5]", 3),
        ("f8e4m3fn[7]", 7),
    ],
)
def test_bytes_of_a_type(text, size):
    assert traffic.bytes_of(text) == size
