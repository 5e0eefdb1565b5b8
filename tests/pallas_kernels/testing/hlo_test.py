"""Tests of `pallas_kernels/testing/hlo.py`."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.testing.hlo import collectives, largest_arrays

# Five turns of a loop, of which each sums once, around an asynchronous gather; a
# fusion's inside and a reduction's function do not count.
PROGRAM = """HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: f32[8,8]) -> f32[512,512] {
  %large = f32[512,512]{1,0} broadcast(%p)
  ROOT %larger = f32[1024,1024]{1,0} all-gather(%large)
}

%async (p: f32[4]) -> f32[32] {
  ROOT %gathered = f32[32]{0} all-gather(%p), dimensions={0}, metadata={op_name="g"}
}

%body (s: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %x = f32[8,8]{1,0} get-tuple-element(%s), index=1
  %r = f32[8,8]{1,0} all-reduce(%x), to_apply=%add, metadata={op_name="layer/sum"}
  ROOT %t = (s32[], f32[8,8]{1,0}) tuple(%i, %r)
}

%condition (s: (s32[], f32[8,8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n)
}

ENTRY %main (p: f32[4]) -> f32[32] {
  %w = (s32[], f32[8,8]{1,0}) while(%init), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0"}}
  %f = bf16[16,16]{1,0} fusion(%w), kind=kLoop, calls=%fused
  %start = ((f32[4]{0}), f32[32]{0}) async-start(%p), calls=%async
  ROOT %done = f32[32]{0} async-done(%start)
}
"""


def test_collectives_are_counted_where_they_run_and_as_often():
    gather, reduce = sorted(collectives(PROGRAM), key=lambda c: c.kind)
    assert (gather.kind, gather.times, gather.is_looped) == ("all-gather", 1, False)
    assert (gather.shape, gather.num_bytes, gather.source) == ("f32[32]", 128, "g")
    assert (reduce.kind, reduce.times, reduce.is_looped) == ("all-reduce", 5, True)
    assert (reduce.num_bytes, reduce.source) == (256, "layer/sum")


def test_a_started_collective_gives_its_results_and_not_its_inputs():
    line = "  %s = ({}) all-gather-start(%a, %b), dimensions={{0}}"
    flat = line.format("f32[4]{0}, f32[32]{0}")
    nested = line.format("(f32[4]{0}, s32[2]{0}), (f32[32]{0}, s32[16]{0})")
    for text, shape in ((flat, "f32[32]"), (nested, "f32[32] + s32[16]")):
        program = f"ENTRY %main (p: f32[4]) -> f32[32] {{\n{text}\n}}\n"
        assert [c.shape for c in collectives(program)] == [shape]


def test_largest_arrays_leave_out_what_a_fusion_never_writes():
    found = largest_arrays(PROGRAM, 2)
    assert [(a.shape, a.num_bytes) for a in found] == [
        ("bf16[16,16]", 512),
        ("f32[8,8]", 256),
    ]
    assert found[1].is_looped


def test_a_compiled_loop_over_layers_gathers_each_layers_weights():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    shape = lambda size, *spec: jax.ShapeDtypeStruct(
        size, jnp.float32, sharding=NamedSharding(mesh, P(*spec))
    )

    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    text = (
        jax.jit(run)
        .lower(shape((16, 32), "fsdp"), shape((3, 32, 32), None, "fsdp"))
        .compile()
        .as_text()
    )
    (gather,) = collectives(text)
    assert (gather.kind, gather.times, gather.is_looped) == ("all-gather", 3, True)
    assert gather.num_bytes == 32 * 32 * 4
