"""A tiny PPO on any allocations, and an observer of what it moves and compiles."""

import collections
import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np

from realjax.algorithms import ppo
from realjax.core.batch import Batch
from realjax.dataflow.plan import make_plan
from realjax.dataflow.schedule import home_places, resting_on_host
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import Role, RoleConfig
from realjax.models.transformer import abstract_parameters
from realjax.parallel.sharding import padded_for
from realjax.realloc import live_bytes
from realjax.realloc.transfer import move_array
from realjax.rl import Mean, Sampling, ScoreShaping
from realjax.runtime.executor import Executor
from realjax.runtime.measures import to_numbers
from realjax.runtime.parameters import ParameterStore
from realjax.testing import tiny_model, tiny_tokenizer

SIZE, PROMPT_WIDTHS, NEW_TOKENS, WIDTH = 16, (4, 8), 16, 24
EOS_IDS = (1, 2, 3, 4)
COMPARED_STEPS, STEPS = 3, 6

# Six calls on six allocations of 8 devices. The policy is trained cut by its width and
# generates cut by its heads; reward and reference share no device.
PLAN = {
    "rollout": "t4@0-3",
    "reward": "t2@6-7",
    "reference": "d2@4-5",
    "value": "f2t2@0-3",
    "advantages": "d4@1-4",
    "train_policy": "d2f4@0-7",
    "train_critic": "f2t2@4-7",
}
SEEDS = {"policy": 0, "reference": 0, "reward": 1, "critic": 2}
MODEL = tiny_model(num_heads=8, num_kv_heads=4, head_dim=4)
NUM_LEAVES = 12

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def hyperparameters(sampling=None, **changes):
    draws = sampling or {"temperature": 0.7, "top_k": 20, "top_p": 0.9}
    changes = {"score": ScoreShaping(truncated="keep")} | changes
    return ppo.PPO(sampling=Sampling(max_new_tokens=NEW_TOKENS, **draws), **changes)


def roles_of(graph, plan, offload, model, dtype="float32"):
    roles = {}
    for name in graph.roles:
        calls = [plan.calls[n] for n, c in graph.calls.items() if c.role == name]
        padded = padded_for(model, [call.allocation for call in calls])
        head = "language" if name in ("policy", "reference") else "scalar"
        roles[name] = Role(
            name=name,
            config=RoleConfig(
                optimizer=OptimizerConfig(learning_rate=2e-3, epsilon=1e-5),
                offload=name in offload,
            ),
            model=dataclasses.replace(padded, head=head),
            eos_ids=EOS_IDS,
            dtype=dtype,
            is_trained=name in graph.trained_roles,
        )
    return roles


def parameters_of(config, seed):
    """Weights drawn without compiling anything; predictions are far from uniform."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        deviation = 0.25 if path[0].key in ("head", "score") else 0.02
        drawn = np.ones(leaf.real_shape, np.float32)
        if path[-1].key != "scale":
            drawn = deviation * rng.standard_normal(leaf.real_shape, np.float32)
        sizes = zip(leaf.real_shape, leaf.shape, strict=True)
        return jnp.pad(drawn, [(0, padded - size) for size, padded in sizes])

    return jax.tree_util.tree_map_with_path(
        draw, abstract_parameters(config), is_leaf=lambda leaf: hasattr(leaf, "axes")
    )


def placed(drawn, sharding):
    """Put what every process drew on the devices of them all."""
    whole = np.array(drawn)  # Not a view, which would keep what was drawn alive.
    return jax.make_array_from_callback(
        whole.shape, sharding, lambda index: whole[index], dtype=whole.dtype
    )


def make_executor(
    hp,
    allocations,
    *,
    rows=None,
    offload=(),
    model=MODEL,
    num_devices=8,
    fits=None,
    dtype="float32",
    basing=(),
    **of_plan,
):
    graph = ppo.graph(hp)
    plan = make_plan(
        graph,
        num_devices=num_devices,
        allocations=allocations,
        rows=rows,
        microbatch_tokens=2 * WIDTH,
        offloaded=offload,
        **of_plan,
    )
    roles = roles_of(graph, plan, offload, model, dtype)
    models = {name: role.model for name, role in roles.items()}
    homes = home_places(graph, plan, dict.fromkeys(roles, dtype))
    executor = Executor(
        graph,
        plan,
        roles,
        ParameterStore(models, homes, resting_on_host(graph, plan), basing=basing),
        tokenizer=tiny_tokenizer(),
        optimizer_steps=dict.fromkeys(graph.calls, 40),
        seed=0,
        width=WIDTH,
        fits=fits,
    )
    store = executor.store
    for name, config in models.items():
        drawn = parameters_of(config, SEEDS[name])
        store.set_initial(
            name, jax.tree.map(placed, drawn, store.shardings(name, homes[name]))
        )
    for role in graph.trained_roles:
        program = executor.programs.train_program(role)
        store.set_train_state(role, program.init_optimizer(store.at_home(role)))
    store.rest()
    return executor


def prompts_of(step, width=8, size=SIZE):
    """Prompts of 1 to `width` tokens, others in every step."""
    rng = np.random.default_rng(step)
    lengths = rng.integers(1, width + 1, size).astype(np.int32)
    tokens = rng.integers(5, MODEL.vocab_size, (size, width)).astype(np.int32)
    tokens[np.arange(width) >= lengths[:, None]] = 0
    return Batch.create({"prompts": tokens}, lengths=lengths, ids=range(size))


@dataclasses.dataclass
class Step:
    """What one pass through the graph gave."""

    numbers: dict[str, float]
    updates: dict[str, np.ndarray]  # The same metrics, by optimizer step.
    made: dict[str, np.ndarray]
    traffic: dict[str, int]
    batch_traffic: dict[str, int]
    sends: dict[tuple, int]
    num_compiled: int


def run_step(executor, step, *, width=8, training=True, size=SIZE):
    compiled = []
    listener = lambda event, _, **__: compiled.append(event)
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        batch = prompts_of(step, width, size)
        metrics, buffer = executor.run(batch, step=step, training=training)
        executor.watch.wait()
        numbers = to_numbers(metrics)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    value = lambda x: x.value() if isinstance(x, Mean) else x
    return Step(
        numbers=numbers,
        updates={k: np.array([value(x) for x in v]) for k, v in metrics.items()},
        made={key: buffer.host(key) for key in buffer._made},
        traffic=executor.traffic.as_dict(""),
        batch_traffic=executor.batch_traffic.as_dict(""),
        sends=dict(buffer.sends),
        num_compiled=compiled.count(COMPILE_EVENT),
    )


def run_measured_step(executor, step):
    """Also returns the bytes on devices after each call, more than there were."""
    added = {}

    def measure(name):
        gc.collect()
        added[name] = live_bytes() - before

    gc.collect()
    gc.freeze()  # What there is now need not be looked at after every call.
    before, executor.after_call = live_bytes(), measure
    found = run_step(executor, step)
    executor.after_call = None
    gc.unfreeze()
    return found, added


class Observer:
    """Guards every move of an executor, and notes what moved and what was compiled."""

    def __init__(self, executor):
        self.executor = executor
        self.uploads: list[str] = []
        self.moved_bytes: collections.Counter = collections.Counter()
        self.copies: dict[tuple, dict] = {}
        self.arguments: dict[tuple, tuple] = {}
        self._move = executor.store.move
        executor.store.move = self.move_parameters
        rollout = executor.programs.get("rollout", SIZE)
        self._record(rollout.engine.programs, "decode", "rollout")
        for name, attribute in {
            "reward": "_fill",
            "value": "_fill",
            "train_policy": "_accumulate",
            "train_critic": "_accumulate",
        }.items():
            self._record(executor.programs.get(name), attribute, name)

    def move_parameters(self, role, place, traffic, **options):
        source = self.executor.store.at_home(role)
        with jax.transfer_guard_host_to_device("disallow_explicit"):
            copy = self._move(role, place, traffic, **options)
        least = jax.tree.map(
            lambda old, new: least_bytes(old, new.sharding), source, copy
        )
        self.moved_bytes["parameters"] += sum(jax.tree.leaves(least))
        self.copies[role, place.allocation.strategy] = shard_shapes(copy)
        return copy

    def move_array(self, array, sharding, **options):
        if isinstance(array, np.ndarray):
            self.uploads.append(array)
            return move_array(array, sharding, **options)
        self.moved_bytes["batch"] += least_bytes(array, sharding)
        with jax.transfer_guard_host_to_device("disallow_explicit"):
            return move_array(array, sharding, **options)

    def _record(self, program, attribute, name):
        function = getattr(program, attribute)

        def recorded(*arguments):
            shapes = jax.tree.map(abstract, arguments)
            self.arguments.setdefault(name, (function, shapes))
            return function(*arguments)

        setattr(program, attribute, recorded)

    def compiled(self, name):
        """What the compiler made of a call's program."""
        function, arguments = self.arguments[name]
        return function.lower(*arguments).compile()


def abstract(x):
    if not isinstance(x, jax.Array):
        return x
    sharding = x.sharding if x.committed else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def shard_shapes(tree):
    """The shape of every leaf's shards, by path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(
            leaf.addressable_shards[0].data.shape
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def least_bytes(array, destination):
    """What the destination's devices need and do not hold, worked out by JAX's maps."""
    source = array.sharding.devices_indices_map(array.shape)
    elements = 0
    for device, wanted in destination.devices_indices_map(array.shape).items():
        need, have = np.zeros(array.shape, bool), np.zeros(array.shape, bool)
        need[wanted] = True
        if device in source:
            have[source[device]] = True
        elements += int((need & ~have).sum())
    return elements * array.dtype.itemsize


def masters(executor):
    return {
        role: jax.device_get(executor.store.train_state(role).parameters)
        for role in executor.graph.trained_roles
    }


def share_programs(executor, other, names):
    """Spares a second tracing: programs depend on call and allocation alone."""
    shared = {k: v for k, v in other.programs.made.items() if k[0] in names}
    executor.programs.made.update(shared)
