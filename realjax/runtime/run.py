"""A run before its first step: config, data, roles, plan and parameters, all checked.

Everything that can be wrong with a config or a file is found here, before anything
compiles.
"""

import contextlib
import dataclasses
import importlib
import pkgutil
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from realjax.core.config import suggest, to_dataclass
from realjax.data.datasets import Dataset, load_dataset
from realjax.data.tokenizer import Tokenizer
from realjax.dataflow.graph import DataflowGraph, ModelFunctionCall
from realjax.dataflow.plan import ExecutionPlan
from realjax.dataflow.schedule import home_places, resting_on_host
from realjax.functions.function import (
    LANGUAGE_OUTPUTS,
    Follow,
    Generate,
    Infer,
    Score,
    Train,
)
from realjax.functions.role import Role
from realjax.functions.score import RewardWorkers
from realjax.models import hf
from realjax.models.config import ModelConfig
from realjax.planner.cluster import Cluster
from realjax.planner.memory import Work, streamed_roles
from realjax.planner.stored import bases_kept
from realjax.runtime.device_memory import device_bytes
from realjax.runtime.given_plans import given_plan
from realjax.runtime.parameters import ParameterStore
from realjax.runtime.plan_choice import (
    Chosen,
    Setting,
    choose_plan,
    lengths_of,
    padded_roles,
)
from realjax.runtime.run_config import RunConfig
from realjax.runtime.trial_plans import (
    Trial,
    extra_homes,
    resting_alone,
    trial_graphs,
    trial_roles,
    with_trials,
)
from realjax.runtime.weights import check_lora, has_score, lasting, load_weights
from realjax.runtime.widths import sequence_width


def load_algorithm(name: str) -> types.ModuleType:
    """The module of an algorithm.

    Args:
        name: a file of `realjax.algorithms`, or a dotted name of one's own.

    Raises:
        ValueError: there is no such module, or it is not an algorithm.
    """
    path = name if "." in name else f"realjax.algorithms.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        package = importlib.import_module("realjax.algorithms")
        known = [info.name for info in pkgutil.iter_modules(package.__path__)]
        raise ValueError(
            f"There is no algorithm {name!r}. {suggest(name, known)} One's own is "
            "given by its dotted module name."
        ) from None
    for needed in ("graph", "HYPERPARAMETERS"):
        if not hasattr(module, needed):
            raise ValueError(
                f"Module {path!r} has no `{needed}`; an algorithm has a function "
                "`graph(hp)` and a dataclass `HYPERPARAMETERS`."
            )
    return module


def make_graph(config: RunConfig, algorithm: Any = None) -> DataflowGraph:
    """The graph of a run's algorithm with the run's hyperparameters."""
    module = algorithm or load_algorithm(config.algorithm)
    return module.graph(_hyperparameters(config, module))


def stored_calls(config: RunConfig, algorithm: Any = None) -> tuple[str, ...]:
    """Names of the calls that run once for the whole data set, before all steps."""
    module = algorithm or load_algorithm(config.algorithm)
    stored = _stored_graph(module, _hyperparameters(config, module))
    return () if stored is None else tuple(stored.calls)


def _stored_graph(module: Any, hp: Any) -> DataflowGraph | None:
    """What an algorithm has computed once, if it has a `stored_graph(hp)`."""
    return module.stored_graph(hp) if hasattr(module, "stored_graph") else None


def _hyperparameters(config: RunConfig, module: Any) -> Any:
    return to_dataclass(module.HYPERPARAMETERS, config.hp, path="config.hp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A checked run.

    Attributes:
        chosen: the plan, and what is expected of it.
        plan: the same, its pools as large as there is room for.
        stored_graph: calls of which `runtime.stored` keeps what they make of the whole
            data set; None, or what the algorithm's function of this name gives.
        stored_config: what the config says of these calls.
        roles: of the steps, then those of trials alone.
        trials: of evaluation, by the role that completes.
    """

    config: RunConfig
    hp: Any
    graph: DataflowGraph
    chosen: Chosen
    plan: ExecutionPlan
    tokenizer: Tokenizer
    roles: Mapping[str, Role]
    train_data: Dataset
    valid_data: Dataset | None
    width: int
    steps: int
    stored_graph: DataflowGraph | None = None
    stored_config: RunConfig | None = None
    trials: Mapping[str, Trial] = dataclasses.field(default_factory=dict)

    @property
    def optimizer_steps(self) -> dict[str, int]:
        """Updates in the whole run, by training call."""
        return {
            name: self.steps * node.function.minibatches * node.function.epochs
            for name, node in self.graph.calls.items()
            if isinstance(node.function, Train)
        }

    def fingerprint(self) -> dict[str, Any]:
        """What two runs in one folder must share."""
        return {
            "algorithm": self.config.algorithm,
            "data": self.train_data.fingerprint(),
            "models": {n: lasting(self.roles[n].model) for n in self.graph.roles},
            "hp": _plain(dataclasses.asdict(self.hp)),
            "seed": self.config.seed,
        }


def prepare(
    config: RunConfig,
    algorithm: Any = None,
    *,
    kept: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Run:
    """Reads and checks everything a run needs, and plans it; loads no weights.

    Args:
        config: of the run.
        algorithm: module or object with `graph` and `HYPERPARAMETERS`.
        kept: plan of an earlier run in the same folder; see `choose_plan`.
        tell: is told of a search for a plan.

    Raises:
        ValueError, TypeError, FileNotFoundError: each naming what was found, what was
            needed and what to do.
    """
    module = algorithm or load_algorithm(config.algorithm)
    hp = _hyperparameters(config, module)
    graph, stored = module.graph(hp), _stored_graph(module, hp)
    once = stored.calls if stored is not None else {}
    stored_config = config.without_calls(graph.calls.keys() - once.keys())
    config = config.without_calls(once.keys() - graph.calls.keys())
    tried = trial_graphs(config, graph)
    others = (stored, *tried.values()) if stored is not None else tried.values()
    all_roles = (*graph.roles, *(role for other in others for role in other.roles))
    for role in all_roles:
        if role not in config.roles:
            is_tried = any(role in one.roles for one in tried.values())
            user = "config.evaluation" if is_tried else "The graph"
            raise ValueError(
                f"{user} uses the role {role!r}, and config.roles has "
                f"{', '.join(config.roles) or 'none'}. Add config.roles.{role}."
            )
    # What is wrong with the plan, before the rest.
    given_plan(config, graph, Cluster.detect())
    tokenizer = _one_tokenizer(config, all_roles)
    roles = make_roles(config, graph, tokenizer)
    make_role = lambda name, graph: _make_role(name, config, graph, tokenizer)
    with_tried = trial_roles(config, tried, roles, make_role)
    train_data = load_dataset(config.data, tokenizer, split="train", seed=config.seed)
    valid_data = None
    if config.data.valid_path or config.data.held_out:
        valid_data = load_dataset(
            config.data, tokenizer, split="valid", seed=config.seed
        )
    made = (key for node in once.values() for key in node.writes)
    stored_keys = (name for key in made for name in train_data.stored_keys(key))
    with _about(f"config.data.kind is {config.data.kind!r}"):
        graph.require((*train_data.batch([0]).arrays, *stored_keys))
    _check_minibatches(graph, config.data.batch_size, train_data.rows_per_record)
    _check_rewards(config, graph)
    data = (train_data, valid_data)
    run = assemble(config, hp, graph, roles, tokenizer, data, kept=kept, tell=tell)
    if tried:
        run = with_trials(run, tried, with_tried)
    if stored is None:
        return run
    return dataclasses.replace(run, stored_graph=stored, stored_config=stored_config)


def assemble(
    config: RunConfig,
    hp: Any,
    graph: DataflowGraph,
    roles: Mapping[str, Role],
    tokenizer: Tokenizer,
    data: tuple[Dataset, Dataset | None],
    *,
    kept: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Run:
    """Plans the calls of a graph, for data that is read and roles that are known.

    Args:
        config: of the run.
        hp: hyperparameters.
        graph: that is run.
        roles: of the graph.
        tokenizer: of all roles.
        data: to train on, and held out if any is.
        kept: as in `prepare`.
        tell: likewise.

    Raises:
        ValueError: no plan is possible, or sequences are too long for a role.
    """
    (train_data, valid_data), batch_size = data, config.data.batch_size
    datasets = [dataset for dataset in data if dataset is not None]
    width = sequence_width(graph, roles, datasets)
    work = work_of(config, datasets, width)
    setting = Setting(
        graph=graph,
        roles=roles,
        work=work,
        lengths=lengths_of(config, graph, train_data.mean_length, work),
        cluster=Cluster.detect(),
        limit_bytes=device_bytes(config),
    )
    chosen = choose_plan(config, setting, kept=kept, tell=tell)
    steps = config.steps or -(-len(train_data) * config.epochs // batch_size)
    return Run(
        config=config,
        hp=hp,
        graph=graph,
        chosen=chosen,
        plan=chosen.plan,
        tokenizer=tokenizer,
        roles=padded_roles(roles, graph, chosen.plan),
        train_data=train_data,
        valid_data=valid_data,
        width=width,
        steps=steps,
    )


def work_of(config: RunConfig, data: Sequence[Dataset], width: int) -> Work:
    """The shapes of a run's steps.

    Args:
        config: of the run.
        data: its data sets, that of training first.
        width: T, tokens of a sequence.
    """
    return Work(
        num_rows=config.data.batch_size * data[0].rows_per_record,
        width=width,
        prompt_width=max(dataset.prompt_width for dataset in data),
        device_kind=jax.local_devices()[0].device_kind,
    )


@contextlib.contextmanager
def _about(what: str) -> Iterator[None]:
    """Puts what an error is about before its text."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{what}: {error}") from error


def _plain(value: Any) -> Any:
    """As JSON can hold it; a function by its name, which no process changes."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{getattr(value, '__module__', '')}:{name}"


def _check_minibatches(graph: DataflowGraph, batch_size: int, rows: int) -> None:
    """Refuses more minibatches than a batch has rows, or pairs of rows."""
    for node in graph.calls.values():
        if isinstance(node.function, Generate):
            rows *= node.function.completions_per_prompt
    for name, node in graph.calls.items():
        if isinstance(node.function, Train):
            size, wanted = batch_size * rows // node.function.unit, node.function
            if size < wanted.minibatches:
                raise ValueError(
                    f"Call {name!r} makes {wanted.minibatches} minibatches of "
                    f"{size} sequences or pairs (config.data.batch_size is "
                    f"{batch_size}). Raise the batch size or lower "
                    "config.hp.minibatches."
                )


def _check_rewards(config: RunConfig, graph: DataflowGraph) -> None:
    """Imports reward functions once, in a process that ends at once.

    Raises:
        ValueError: functions of evaluation have the same name.
        RewardError: one cannot be imported.
    """
    scores = [c.function for c in graph.calls.values() if isinstance(c.function, Score)]
    evaluating = config.evaluation.functions
    _check_names(config, graph)
    for rewards in (*(score.rewards for score in scores), evaluating):
        if rewards:
            RewardWorkers(rewards).close()


def _check_names(config: RunConfig, graph: DataflowGraph) -> None:
    """Refuses functions of evaluation whose metrics would have the same names."""
    evaluation = config.evaluation
    taken = {"scores", "win_rate", *(f"judge/{role}" for role in config.roles)}
    for function in evaluation.functions:
        if function.name in taken:
            raise ValueError(
                f"config.evaluation has a function named {function.name!r}, and"
                f" 'eval/{function.name}_mean' is the name of another metric. Give"
                " each of its rewards, and the verifier, its own `name`; one function"
                " may be both if all its fields are equal."
            )
        taken.add(function.name)


def load_parameters(run: Run) -> ParameterStore:
    """Weights of every role, each straight to where it stays."""
    dtypes = {name: role.dtype for name, role in run.roles.items()}
    homes = home_places(run.graph, run.plan, dtypes)
    models = {name: role.model for name, role in run.roles.items()}
    resting = resting_on_host(run.graph, run.plan, streamed_roles(run.roles))
    extra = extra_homes(run.trials.values(), run.graph, dtypes)
    resting |= resting_alone(extra)
    homes |= extra
    store = ParameterStore(
        models,
        homes,
        resting,
        basing=bases_kept(run.graph, run.plan, models),
        verifies=run.config.check_moves,
    )
    for index, (name, role) in enumerate(run.roles.items()):
        shardings = store.shardings(name, homes[name])
        key = jax.random.fold_in(jax.random.key(run.config.seed), index)
        store.set_initial(name, load_weights(role, key, shardings))
    return store


def _one_tokenizer(config: RunConfig, names: Iterable[str]) -> Tokenizer:
    """The tokenizer that all roles share."""
    found: dict[str, Tokenizer] = {}
    for name in dict.fromkeys(names):
        role = config.roles[name]
        folder = role.tokenizer or role.path
        if folder:
            with _about(f"Role {name!r}"):
                found[name] = Tokenizer.load(folder)
        else:
            raise ValueError(
                f"Role {name!r} has neither a path nor a tokenizer. Set "
                f"config.roles.{name}.path to a checkpoint's folder, or "
                f"config.roles.{name}.tokenizer and .model for a new model."
            )
    (first, tokenizer), *others = found.items()
    for name, other in others:
        if other.fingerprint() != tokenizer.fingerprint():
            raise ValueError(
                f"Roles {first!r} and {name!r} have different tokenizers "
                f"({config.roles[first].tokenizer or config.roles[first].path} and "
                f"{config.roles[name].tokenizer or config.roles[name].path}). Ids of "
                "tokens pass between roles as they are, so all need one tokenizer."
            )
    return tokenizer


def make_roles(
    config: RunConfig, graph: DataflowGraph, tokenizer: Tokenizer
) -> dict[str, Role]:
    """The roles of a graph, by name; reads and checks their models' configs."""
    return {name: _make_role(name, config, graph, tokenizer) for name in graph.roles}


def _make_role(
    name: str, config: RunConfig, graph: DataflowGraph, tokenizer: Tokenizer
) -> Role:
    role = config.roles[name]
    head, is_trained = _needed_head(name, graph), name in graph.trained_roles
    if role.path:
        with _about(f"Role {name!r}"):
            family = role.family or None
            model = hf.read_config(role.path, family=family, label=role.label)
            is_drawn = model.head == "language" and head == "scalar"
            if is_drawn and not is_trained and not has_score(role, model):
                raise ValueError(
                    f"{role.path} holds a language model, and no call trains this "
                    "role: its scores would be those of a random head. Give the folder "
                    "of a reward model."
                )
            model = dataclasses.replace(model, head=head)
            hf.check(role.path, config=model, label=role.label)
    else:
        sizes = {"vocab_size": tokenizer.vocab_size, "eos_ids": tokenizer.eos_ids}
        path = f"config.roles.{name}.model"
        model = to_dataclass(
            ModelConfig, sizes | role.model | {"head": head}, path=path
        )
    check_lora(name, role, graph)
    on_gpu = jax.default_backend() == "gpu"
    dtype = role.dtype or ("bfloat16" if on_gpu else "float32")
    with _about(f"Role {name!r}"):
        model = role.lora.applied(role.router.applied(model), dtype)
        if model.moe is not None and model.moe.capacity_factor:
            _refuse_dropping(graph.of(name))
    if model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"Role {name!r} has a vocabulary of {model.vocab_size} and its tokenizer "
            f"one of {tokenizer.vocab_size}. They do not belong together: give the "
            "model's own tokenizer."
        )
    return Role(
        name=name,
        config=role,
        model=model,
        eos_ids=tokenizer.eos_ids,
        dtype=dtype,
        is_trained=is_trained,
    )


def _refuse_dropping(calls: Iterable[ModelFunctionCall]) -> None:
    """Refuses to drop tokens in training that the sampler never drops."""
    if any(isinstance(call.function, Generate) for call in calls):
        raise ValueError(
            "it generates, token by token, where no expert is ever full. With a "
            "capacity_factor the trainer would drop tokens, and its log-probabilities "
            "differ from the sampler's. Set router.capacity_factor to 0."
        )


def _needed_head(role: str, graph: DataflowGraph) -> Any:
    heads = set()
    for node in graph.of(role):
        match node.function:
            case Generate():
                heads.add("language")
            case Infer(output=output) | Train(output=output):
                heads.add("language" if output in LANGUAGE_OUTPUTS else "scalar")
    if not heads:  # It follows another role, and that is all.
        (source,) = {
            node.function.source
            for node in graph.of(role)
            if isinstance(node.function, Follow)
        }
        return _needed_head(source, graph)
    if len(heads) != 1:
        raise ValueError(
            f"The calls of role {role!r} read both a language and a scalar head; a "
            "role has one. Use two roles."
        )
    return heads.pop()
