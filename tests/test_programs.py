"""What is counted in a compiled program, on a text with known counts."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import programs
from benchmarks.programs import Collective

TEXT = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%fused (p: f32[100]) -> f32[] {
  %p = f32[100]{0} parameter(0)
  ROOT %inside = f32[] reduce(%p), dimensions={0}, to_apply=%add
}

%rescue (q: (f32[100])) -> (f32[]) {
  %q = (f32[100]{0}) parameter(0)
  %g = f32[100]{0} get-tuple-element(%q), index=0
  %dear = f32[] fusion(%g), kind=kLoop, calls=%fused
  ROOT %r = (f32[]) tuple(%dear)
}

%body (s: (s32[])) -> (s32[]) {
  %s = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %next = s32[] add(%i, %i)
  ROOT %t = (s32[]) tuple(%next)
}

%called (c: bf16[10,10]) -> bf16[10,10] {
  %c = bf16[10,10]{1,0} parameter(0)
  ROOT %twice = bf16[10,10]{1,0} add(%c, %c)
}

ENTRY %main (x: f32[100], y: bf16[10,10]) -> (f32[100], bf16[10,10]) {
  %x = f32[100]{0:T(128)} parameter(0)
  %y = bf16[10,10]{1,0} parameter(1)
  %slice-start = ((f32[100]{0:T(128)}), f32[25]{0:T(128)S(1)}, s32[]{:S(2)}) \
slice-start(%x), slice={[0:25]}
  %slice-done = f32[25]{0:T(128)S(1)} slice-done(%slice-start)
  %copy-start = (f32[100]{0:T(128)S(1)}, f32[100]{0:T(128)}, u32[]{:S(2)}) \
copy-start(%x)
  %copy-done = f32[100]{0:T(128)S(1)} copy-done(%copy-start)
  %view = f32[25]{0:T(128)S(1)} custom-call(%slice-done), \
custom_call_target="ConcatBitcast"
  %sums = (f32[3]{0:T(128)}, /*index=1*/f32[]) fusion(%copy-done, %view, \
/*index=2*/%y), kind=kInput, calls=%fused, \
backend_config={"estimated_cycles":"1000","size":"1"}
  %three = f32[3]{0:T(128)} get-tuple-element(%sums), index=0
  %all-reduce-start = f32[3]{0} all-reduce-start(%three), channel_id=1, to_apply=%add
  %all-reduce-done = f32[3]{0} all-reduce-done(%all-reduce-start)
  %in = (f32[100]{0:T(128)}) tuple(%x)
  %one = s32[] constant(1)
  %n = s32[]{:T(128)} parameter(2)
  %next_n = s32[]{:T(128)S(6)} add(%n, %n)
  %branch = (f32[]) conditional(%one, %in, %in), branch_computations={%rescue, %rescue}
  %count = (s32[]) tuple(%one)
  %loop = (s32[]) while(%count), condition=%condition, body=%body
  %doubled = bf16[10,10]{1,0} call(%y), to_apply=%called
  %scaled = f32[100]{0:T(128)} multiply(%copy-done, %all-reduce-done), \
metadata={op_name="jit(f)/mul"}, backend_config={"estimated_cycles":"200"}
  ROOT %out = (f32[100]{0:T(128)}, bf16[10,10]{1,0}) tuple(%scaled, %doubled)
}
"""


@pytest.fixture(scope="module")
def program():
    return programs.parse(TEXT)


def test_reads_count_what_comes_from_hbm(program):
    slice_, copy, sums = 4 * 25, 4 * 100, 2 * 100
    reduced, turn, call, scaled = 4 * 3, 2 * 4, 2 * 200, 4 * 3
    expected = slice_ + copy + sums + reduced + turn + call + scaled
    assert program.read_bytes == expected


def test_writes_count_what_goes_to_hbm(program):
    sums, reduced, turn, call, scaled = 4 * 4, 4 * 3, 4, 200, 400
    assert program.written_bytes == sums + reduced + turn + call + scaled
    assert program.hbm_bytes == program.read_bytes + program.written_bytes


def test_kernels_are_those_of_the_path_that_runs(program):
    # The sums, their all-reduce, a turn of the loop, the call, the product. A TPU's
    # addition of scalars is none.
    assert program.kernels == 5


def test_cycles_are_added(program):
    assert program.cycles == 1200


def test_cycles_are_none_without_an_estimate():
    assert programs.parse(TEXT.replace("estimated_cycles", "x")).cycles is None


def test_control_flow_is_counted(program):
    assert (program.conditionals, program.whiles) == (1, 1)


def test_collectives_carry_how_many_numbers_a_device_contributes(program):
    assert program.collectives == (Collective("all-reduce", 3),)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("float32", 4), ("bfloat16", 2), ("int8", 1), ("bool", 1), ("complex64", 8)],
)
def test_real_programs_are_parsed(dtype, size):
    leaf = jax.ShapeDtypeStruct((1000,), jnp.dtype(dtype))
    text = jax.jit(jnp.flip).lower(leaf).compile().as_text()
    program = programs.parse(text)
    assert program.kernels == 1
    assert program.read_bytes == program.written_bytes == 1000 * size
    assert program.collectives == ()
