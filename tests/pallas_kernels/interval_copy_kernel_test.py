"""The kernel that packs and unpacks, interpreted: equal bits, no races, its plans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _dispatch
from pallas_kernels.interval_copy import (
    Aligned,
    Block,
    bench,
    copy,
    explain_pack,
    explain_unpack,
    mosaic,
    pack,
    plan_copy,
    plans,
    reference,
    unpack,
)
from pallas_kernels.testing.interpret import interpreted

SHAPES = ((3, 4, 256), (8, 128), (2, 2, 3, 2, 128), (640,))
BLOCKS = (
    # In the middle of each dimension; at an array's end; of one element beside the run;
    # whole arrays; four dimensions that do not join; nothing.
    Block(input=0, size=(2, 2, 128), start=(1, 1, 128)),
    Block(input=1, size=(3, 128), start=(5, 0)),
    Block(input=0, size=(1, 1, 128), start=(0, 0, 0)),
    Block(input=3, size=(640,)),
    Block(input=2, size=(2, 1, 2, 1, 128), start=(0, 1, 1, 1, 0)),
    Block(input=1, size=(0, 128), start=(8, 0)),
)


def numbers(shape, dtype=np.float32, seed=0):
    """Normal numbers of many magnitudes, so that every rounding matters."""
    rng = np.random.default_rng(seed)
    spread = np.exp2(rng.integers(-20, 20, shape))
    return (rng.standard_normal(shape) * spread).astype(dtype)


def bits(array):
    array = np.asarray(array)
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def run(function, *arrays):
    """Interpret a function's kernels; return what it gives, and how many there were."""
    with interpreted() as checks:
        out = jax.block_until_ready(jax.jit(function)(*arrays))
    assert not checks.has_races
    return out, checks.num_kernels


def share(monkeypatch, programs, granules=2):
    """Let few programs do all the work, and read some granules at once."""
    layout = mosaic.Blocks(elements=1024, granules=granules, programs=programs)
    monkeypatch.setattr(mosaic, "default_blocks", lambda request: layout)


@pytest.mark.parametrize(
    ("source", "target", "programs"),
    [
        ("float32", "bfloat16", 3),
        ("bfloat16", "bfloat16", 100),
        pytest.param("bfloat16", "float32", 1, marks=pytest.mark.slow),
        pytest.param("float32", "float32", 7, marks=pytest.mark.slow),
    ],
)
def test_packing_is_exact(source, target, programs, monkeypatch):
    share(monkeypatch, programs)
    arrays = [numbers(shape, jnp.dtype(source)) for shape in SHAPES]
    packed, num_kernels = run(
        lambda *arrays: pack(arrays, BLOCKS, dtype=target, implementation="mosaic"),
        *arrays,
    )
    assert num_kernels == 1
    expected = reference.pack(arrays, BLOCKS, target)
    np.testing.assert_array_equal(bits(packed), bits(expected))


def unpacking(eta, implementation):
    """Four places in an array of blocks of a buffer, an array and a whole one."""
    blocks = (
        Block(input=0, size=(2, 2, 128), offset=256),
        Block(input=1, size=(1, 4, 256), start=(2, 0, 0)),
        Block(input=2, size=(1, 1, 128)),
        Block(input=0, size=(1, 1, 256), offset=1024),
    )

    def function(buffer, array, block, into, starts):
        places = [
            (1, Aligned(starts[0], 2), Aligned(starts[1], 128)),
            (0, 0, 0),
            (1, 0, 0),
            (2, 5, 0),
        ]
        return unpack(
            [buffer, array, block],
            blocks,
            places,
            shape=into.shape,
            dtype=into.dtype,
            into=into,
            eta=eta,
            implementation=implementation,
        )

    return function


@pytest.mark.parametrize(
    ("eta", "source", "target", "programs"),
    [
        (None, "bfloat16", "float32", 2),
        (0.3, "bfloat16", "float32", 100),
        (0.3, "float32", "bfloat16", 3),
        pytest.param(None, "float32", "bfloat16", 1, marks=pytest.mark.slow),
        pytest.param(1.0, "float32", "float32", 4, marks=pytest.mark.slow),
        pytest.param(0.0, "bfloat16", "bfloat16", 5, marks=pytest.mark.slow),
    ],
)
def test_unpacking_has_the_bits_of_slices_at_starts_known_only_when_it_runs(
    eta, source, target, programs, monkeypatch
):
    share(monkeypatch, programs)
    shapes = ((1280,), (3, 4, 256), (1, 1, 128))
    inputs = [numbers(shape, jnp.dtype(source), seed=1) for shape in shapes]
    into = numbers((3, 6, 256), jnp.dtype(target))
    for start in ((0, 128), (2, 0))[: 2 if eta else 1]:
        starts = np.array(start, np.int32)
        got, _ = run(unpacking(eta, "mosaic"), *inputs, into, starts)
        wanted = jax.jit(unpacking(eta, "slices"))(*inputs, into, starts)
        np.testing.assert_array_equal(bits(got), bits(wanted))
        # Outside of the blocks everything stays.
        assert (bits(got) == bits(into)).any()


def test_an_average_of_what_is_no_number_is_none():
    into, new = np.ones((2, 128), np.float32), np.ones((1, 128), np.float32)
    into[1, 3], new[0, 5], new[0, 7] = np.inf, np.nan, -np.inf
    blocks, places = [Block(input=0, size=(1, 128))], [(1, 0)]

    def mix(implementation):
        return lambda new, into: unpack(
            [new],
            blocks,
            places,
            shape=into.shape,
            dtype=into.dtype,
            into=into,
            eta=0.5,
            implementation=implementation,
        )

    got, _ = run(mix("mosaic"), new, into)
    np.testing.assert_array_equal(got, jax.jit(mix("slices"))(new, into))
    assert np.isinf(got[1, 3]) and np.isnan(got[1, 5]) and np.isneginf(got[1, 7])


def test_many_arrays_take_several_launches(monkeypatch):
    monkeypatch.setattr(plans, "MOST_PAIRS", 2)
    arrays = [numbers((128,), seed=seed) for seed in range(3)]
    blocks = [Block(input=number, size=(128,)) for number in (2, 0, 1)]
    packed, num_kernels = run(
        lambda *arrays: pack(arrays, blocks, implementation="mosaic"), *arrays
    )
    assert num_kernels == 2
    np.testing.assert_array_equal(packed, np.concatenate([arrays[2], *arrays[:2]]))


def test_one_program_serves_every_plan_of_its_size():
    sources, targets = [numbers((8, 256))], [np.zeros((4, 384)), np.zeros((512,))]
    targets = [target.astype(jnp.bfloat16) for target in targets]

    def plan(*pairs):
        return plan_copy(sources, targets, pairs, granule=128, num_rows=3)

    cases = (
        plan(
            (
                Block(input=0, size=(2, 128), start=(6, 128)),
                Block(input=0, size=(2, 128), start=(2, 256)),
            ),
            (
                Block(input=0, size=(1, 256), start=(0, 0)),
                Block(input=1, size=(1, 256), offset=256),
            ),
        ),
        plan(
            (
                Block(input=0, size=(4, 128), start=(4, 0)),
                Block(input=0, size=(4, 128), start=(0, 0)),
            ),
            (
                Block(input=0, size=(3, 128), start=(0, 128)),
                Block(input=1, size=(3, 128), offset=128),
            ),
            (
                Block(input=0, size=(1, 256), start=(7, 0)),
                Block(input=0, size=(1, 256), start=(3, 128)),
            ),
        ),
    )
    num_traces = 0

    @jax.jit
    def copy_all(sources, targets, plan):
        nonlocal num_traces
        num_traces += 1
        return copy(sources, targets, plan)

    wide = sources[0].astype(jnp.bfloat16)
    with interpreted() as checks:
        first = jax.block_until_ready(copy_all(sources, targets, cases[0]))
        second = jax.block_until_ready(copy_all(sources, targets, cases[1]))
    assert num_traces == 1 and not checks.has_races
    expected = [target.copy() for target in targets]
    expected[0][2:4, 256:] = wide[6:8, 128:]
    expected[1][256:] = wide[0]
    for got, wanted in zip(first, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    expected = [target.copy() for target in targets]
    expected[0][:4, :128] = wide[4:8, :128]
    expected[0][3, 128:] = wide[7]
    expected[1][128:] = wide[:3, 128:].reshape(-1)
    for got, wanted in zip(second, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_blocks_that_overlap_where_they_are_written_are_a_race():
    # There is no barrier to leave out: programs are kept apart by the plan alone.
    source, target = numbers((4, 128)), np.zeros((2, 128), np.float32)
    places = (Block(input=0, size=(1, 128), start=(1, 0)),) * 2
    pairs = [
        (Block(input=0, size=(1, 128), start=(row, 0)), place)
        for row, place in enumerate(places)
    ]
    plan = plan_copy([source], [target], pairs)
    with interpreted() as checks:
        jax.block_until_ready(jax.jit(copy)([source], [target], plan))
    assert checks.has_races


def random_boxes(rng, shape):
    """Cut an array into boxes, first along one dimension and then along another."""
    boxes = [tuple((0, size) for size in shape)]
    for _ in range(2):
        cut = []
        for box in boxes:
            axis = rng.integers(len(shape))
            unit = 128 if axis == len(shape) - 1 else 1
            low, high = box[axis]
            middle = low + rng.integers((high - low) // unit + 1) * unit
            for part in ((low, middle), (middle, high)):
                cut.append((*box[:axis], part, *box[axis + 1 :]))
        boxes = cut
    return [boxes[place] for place in rng.permutation(len(boxes))]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_any_boxes_go_to_a_buffer_and_back(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    share(monkeypatch, programs=int(rng.integers(1, 9)), granules=1 + seed % 4)
    shapes = [
        (*rng.integers(1, 4, rng.integers(0, 3)), 128 * rng.integers(1, 4))
        for _ in range(3)
    ]
    arrays = [numbers(shape, seed=seed) for shape in shapes]
    blocks = [
        Block(
            input=number,
            size=tuple(int(high - low) for low, high in box),
            start=tuple(int(low) for low, _ in box),
        )
        for number, shape in enumerate(shapes)
        for box in random_boxes(rng, shape)
    ]

    def there_and_back(*arrays):
        buffer = pack(arrays, blocks, implementation="mosaic")
        offsets = np.cumsum([0, *(block.num_elements for block in blocks)])
        made = []
        for number, array in enumerate(arrays):
            own = [place for place, b in enumerate(blocks) if b.input == number]
            back = [
                Block(input=0, size=blocks[place].size, offset=int(offsets[place]))
                for place in own
            ]
            places = [blocks[place].start for place in own]
            made.append(
                unpack(
                    [buffer],
                    back,
                    places,
                    shape=array.shape,
                    dtype=array.dtype,
                    implementation="mosaic",
                )
            )
        return buffer, made

    (buffer, made), _ = run(there_and_back, *arrays)
    np.testing.assert_array_equal(buffer, reference.pack(arrays, blocks, np.float32))
    for got, array in zip(made, arrays, strict=True):
        np.testing.assert_array_equal(got, array)


def test_dimensions_that_lie_together_become_one():
    # Rows 1 and 2 of (4, 6, 128) to a buffer: 2 x 6 x 128 elements in one piece.
    source = Block(input=0, size=(2, 6, 128), start=(1, 0, 0))
    target = Block(input=0, size=(2, 6, 128), offset=0)
    (row,) = plans.rows_of([(source, target)], [(4, 6, 128)], [(1536,)])
    assert (row.run, row.sizes) == (1536, ())
    # Of 4 of the 6, each 512 lie together, and the next 768 further on.
    source, target = (
        Block(input=0, size=(2, 4, 128), start=(1, 2, 0)),
        Block(input=0, size=(2, 4, 128), offset=256),
    )
    (row,) = plans.rows_of([(source, target)], [(4, 6, 128)], [(1536,)])
    assert (row.run, row.sizes) == (512, (2,))
    assert (row.source.strides, row.target.strides) == ((768,), (512,))
    assert (row.source.base, row.target.base, row.divisor) == (1024, 256, 256)


def test_a_plan_counts_granules():
    source = Block(input=0, size=(2, 4, 128), start=(1, 2, 0))
    target = Block(input=0, size=(2, 4, 128), offset=256)
    shapes = [(4, 6, 128)], [(1536,)]
    rows = plans.rows_of([(source, target)], *shapes)
    (table,) = plans.plan_of(rows, 128, num_rows=2).tables
    row = [0, 0, 8, 2, 4, 2, 1, 6, 0, 0, 4, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(table[0], row)
    # What is not filled, and the end, come behind the 2 x 4 granules.
    assert (table[1:, plans.FIRST] == 8).all()


H200 = _dispatch.H200
LONG = [Block(input=0, size=(1, 256), start=(row, 0)) for row in range(8)]


def said(blocks, array=((8, 512), "float32"), **options):
    struct = jax.ShapeDtypeStruct(*array)
    return explain_pack([struct], blocks, **{"device": H200, **options})


def test_what_the_kernel_cannot_copy_is_said():
    few = "1 block between 1 pair of arrays, which XLA copies in 1 fusion"
    assert few in said(LONG[:1])
    assert "packs" not in said(LONG, implementation="mosaic")
    ragged = [Block(input=0, size=(2, 96), start=(0, 32))]
    assert "multiples of 32 only" in said(ragged)
    assert "float32 and bfloat16, not int8" in said(LONG, ((8, 512), "int8"))
    cpu = _dispatch.Device(platform="cpu")
    assert "it needs an NVIDIA GPU" in said(LONG, device=cpu)
    old = _dispatch.Device(platform="gpu", kind="V100", compute_capability=(7, 0))
    assert "needs compute capability 8.0, and V100 has 7.0" in said(LONG, device=old)
    empty = [Block(input=0, size=(0, 512), start=(0, 0))]
    assert "nothing to copy" in said(empty)
    deep = [Block(input=0, size=(1, 2, 1, 2, 1, 2, 1, 2, 128), start=(0,) * 9)]
    shape = (2,) * 8 + (256,)
    assert "4 dimensions beside" in said(deep, (shape, "float32"))
    with pytest.raises(ValueError, match="cannot run as 'mosaic': it moves 128"):
        said(ragged, implementation="mosaic")


def test_the_kernel_is_chosen_for_many_blocks():
    def explained(num_blocks, **options):
        blocks = [
            Block(input=0, size=(1, 128), offset=128 * row) for row in range(num_blocks)
        ]
        places = [(row, row % 2 * 128) for row in range(num_blocks)]
        buffer = jax.ShapeDtypeStruct((128 * num_blocks,), "bfloat16")
        return explain_unpack(
            [buffer],
            blocks,
            places,
            shape=(num_blocks, 256),
            dtype="float32",
            device=H200,
            **options,
        )

    # XLA writes each of them by itself, but where it joins them.
    assert explained(4, is_whole=False) == "unpack runs as 'mosaic'."
    assert "3 blocks" in explained(3, is_whole=False)
    many = [Block(input=0, size=(1, 256), start=(r % 8, 0)) for r in range(128)]
    assert said(many) == "pack runs as 'mosaic'."
    assert said(many[:127]).startswith("pack runs as 'slices'. Not as 'mosaic'")


def test_starts_that_may_be_anywhere_are_not_for_the_kernel():
    def explained(start):
        block = Block(input=0, size=(1, 128), start=(0, start))
        return said([block], implementation="mosaic")

    def trace(start):
        assert "as asked" in explained(Aligned(start, 128))
        with pytest.raises(ValueError, match="multiples of 1 only"):
            explained(start)
        with pytest.raises(ValueError, match="multiples of 64 only"):
            explained(Aligned(start, 256) + 64)
        return start

    jax.eval_shape(trace, jax.ShapeDtypeStruct((), jnp.int32))


def test_a_plan_that_does_not_fit_is_refused():
    array = jax.ShapeDtypeStruct((4, 256), np.float32)
    whole = Block(input=0, size=(4, 256))
    for granule in (64, 384):
        with pytest.raises(ValueError, match=f"granule of {granule} elements is none"):
            plan_copy([array], [array], [(whole, whole)], granule=granule)
    with pytest.raises(ValueError, match="2 blocks do not fit in a table of 1 row"):
        plan_copy([array], [array], [(whole, whole)] * 2, num_rows=1)
    other = Block(input=0, size=(2, 256), start=(0, 0))
    with pytest.raises(ValueError, match="cannot go to one of"):
        plan_copy([array], [array], [(whole, other)])
    with pytest.raises(ValueError, match="multiples of 32 only"):
        short = Block(input=0, size=(1, 96), start=(0, 0))
        plan_copy([array], [array], [(short, short)])
    plan = plan_copy([array], [array], [(whole, whole)])
    assert plan.granules == ((1024,),)
    with pytest.raises(ValueError, match="copy cannot run as 'mosaic': it needs"):
        zeros = jnp.zeros((4, 256))
        copy([zeros], [zeros], plan)


TINY = [case for case in bench.cases() if case.is_tiny]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] if place % 2 else [])
        for place, case in enumerate(TINY)
    ],
)
def test_cases_of_the_benchmark_are_exact(case):
    inputs = case.inputs(jax.random.key(0))
    out, num_kernels = run(case.implementations["mosaic"], *inputs)
    assert num_kernels == 1
    expected = case.reference(*inputs)
    others = jax.jit(case.implementations["slices"])(*inputs)
    for got, other, wanted in zip(
        *map(jax.tree.leaves, (out, others, expected)), strict=True
    ):
        np.testing.assert_array_equal(bits(got), bits(wanted))
        np.testing.assert_array_equal(bits(other), bits(wanted))
