"""Train: gradients of a mean over the whole minibatch, then one optimizer step.

The loss of a microbatch is a sum and a weight, and so is its gradient. Sums are added
up in float32 over the microbatches and divided once, by the weight of the minibatch:
the same number however the minibatch was cut.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from realjax.core.arrays import Array, PyTree
from realjax.data.packing import Packing
from realjax.functions import optimizer as optimizer_lib
from realjax.functions import packed, routers, streamed
from realjax.functions.function import LANGUAGE_OUTPUTS, Train
from realjax.models import transformer
from realjax.models.parameters import join, split
from realjax.parallel.sharding import parameter_shardings, replicated
from realjax.rl.masking import Mean


class TrainState(NamedTuple):
    """Float32 masters and the optimizer's state, as they lie on the training mesh.

    Beside adapters, what is not trained is among the parameters, in a type of its own.
    """

    parameters: PyTree
    optimizer: PyTree


class StepScalars(NamedTuple):
    """What the update of one element needs to know of the whole minibatch."""

    weight: Array
    norm: Array
    skip: Array


class TrainProgram:
    """The compiled form of one `Train` on one mesh."""

    def __init__(
        self,
        spec: Train,
        program: packed.ModelProgram,
        mesh: jax.sharding.Mesh,
        config: optimizer_lib.OptimizerConfig,
        num_updates: int,
        move: streamed.Move | None = None,
    ):
        """Compiles nothing yet.

        Args:
            spec: loss and what it reads.
            program: the model.
            mesh: of the call.
            config: the optimizer.
            num_updates: optimizer steps in the whole run, for the schedule.
            move: `realloc.offload.moved_in_program`, for an optimizer that offloads.

        Raises:
            ValueError: the optimizer offloads, and there is no `move`.
        """
        self.spec, self.program, self.mesh = spec, program, mesh
        self.schedule = optimizer_lib.learning_rate_schedule(config, num_updates)
        self.optimizer = optimizer_lib.make_optimizer(config, num_updates)
        whole_axes = transformer.abstract_parameters(program.config)
        axes, _ = split(whole_axes, program.config)
        self._whole = replicated(mesh)
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32),
            axes,
            is_leaf=lambda node: hasattr(node, "axes"),
        )
        # Gradients and moments lie as parameters do, and with zero1 are cut further.
        self._cut = parameter_shardings(axes, mesh)
        moments = streamed.on_host(self._cut) if config.offload else self._cut
        self.shardings = TrainState(
            parameter_shardings(whole_axes, mesh, options=program.options),
            optimizer_lib.state_shardings(
                self.optimizer, abstract, moments, self._whole
            ),
        )
        self._step = self._resident_step
        if config.offload:
            if move is None:
                raise ValueError(
                    "The optimizer keeps its moments in host memory (offload=True), and"
                    " nothing was given that moves them. Pass `move=`"
                    "realjax.realloc.offload.moved_in_program."
                )
            self._step = streamed.streamed(
                self._update,
                self.optimizer.init,
                axes,
                move,
                mesh=mesh,
                shardings=self._cut,
                state_shardings=self.shardings.optimizer,
            )
        sums = (self._cut, self._whole)
        self._zeros = jax.jit(self._zero_sums, out_shardings=sums)
        # Without `out_shardings` XLA returns fsdp gradients replicated.
        self._accumulate = jax.jit(
            self._add_gradients, donate_argnums=1, out_shardings=sums
        )
        self._apply = jax.jit(
            self._apply_gradients,
            donate_argnums=0,
            out_shardings=(self.trained(self.shardings), self._whole),
        )
        self._weigh = jax.jit(self._loss_weight, out_shardings=self._whole)
        self._no_measures = jax.jit(self._zero_means, out_shardings=self._whole)
        self._finish = jax.jit(routers.finished, out_shardings=self._whole)
        self._measure = jax.jit(
            self._add_measures, donate_argnums=1, out_shardings=self._whole
        )

    def init_optimizer(self, parameters: PyTree) -> TrainState:
        """Fresh moments beside given masters."""
        init = jax.jit(self.optimizer.init, out_shardings=self.shardings.optimizer)
        return TrainState(parameters, init(self._split(parameters)[0]))

    def trained(self, state: TrainState) -> TrainState:
        """Leave out the parameters that are not trained."""
        return state._replace(parameters=self._split(state.parameters)[0])

    def _split(self, parameters: PyTree) -> tuple[PyTree, PyTree]:
        return split(parameters, self.program.config)

    def __call__(
        self,
        state: TrainState,
        batch: Mapping[str, Array],
        minibatches: Sequence[Sequence[Packing]],
        key: Array | None = None,
    ) -> tuple[TrainState, list[dict[str, Mean]]]:
        """One optimizer step a minibatch.

        Args:
            state: consumed; use what is returned.
            batch: keys of `spec.reads` on this mesh.
            minibatches: microbatches of each minibatch.
            key: of the jitter of routers and the dropout of adapters; None is none.

        Returns:
            The new state, and for each minibatch its means, still on the device: the
            loss under "loss", the metrics of the loss function, "grad_norm" before
            clipping, "learning_rate", "skipped" and "nonfinite" (0 or 1), and of a
            mixture of experts "router/…".
        """
        reports = []
        for index, microbatches in enumerate(minibatches):
            packings = [packed.packing_arrays(packing) for packing in microbatches]
            router = self._router_inputs(batch, microbatches, packings, key, index)
            sums = self._zeros(state.parameters, batch, packings[0])
            for packing in packings:
                sums = self._accumulate(state.parameters, sums, batch, packing, router)
            # What is not trained is given away to nobody: others may read it.
            base = self._split(state.parameters)[1]
            state, report = self._apply(self.trained(state), sums)
            state = state._replace(parameters=join(state.parameters, base))
            reports.append(report)
        return state, reports

    def _router_inputs(
        self, batch, microbatches, packings, key, index
    ) -> routers.RouterInputs | None:
        """What the routers, and the dropout, of a minibatch need to know."""
        config, scale, noise_key = self.program.config, None, None
        if key is not None and config.draws_noise:
            noise_key = jax.random.fold_in(key, index)
        moe = config.moe
        if moe is None and noise_key is None:
            return None
        if moe is not None and (moe.aux_loss_coef or moe.z_loss_coef):
            num_tokens = sum(packing.num_tokens for packing in microbatches)
            weights = [self._weigh(batch, packing) for packing in packings]
            scale = sum(weights) / np.float32(num_tokens)
        return routers.RouterInputs(scale, noise_key)

    def evaluate(
        self,
        parameters: PyTree,
        batch: Mapping[str, Array],
        microbatches: Sequence[Packing],
    ) -> dict[str, Mean]:
        """The loss and its metrics, without a gradient."""
        first = packed.packing_arrays(microbatches[0])
        measures = self._no_measures(parameters, batch, first)
        for packing in microbatches:
            measures = self._measure(
                parameters, measures, batch, packed.packing_arrays(packing)
            )
        return self._finish(measures)

    def _losses(
        self, parameters, batch, packing, router: routers.RouterInputs | None = None
    ) -> tuple[dict[str, Mean], Any]:
        """Means of a microbatch, and what routers add to the sum of its loss."""
        config = self.program.config
        found = packed.forward(
            parameters,
            self.program,
            batch,
            packing,
            output=self.spec.output,
            temperature=self.spec.temperature,
            noise_key=None if router is None else router.noise_key,
        )
        loss, metrics = self._spec_loss(found, batch, packing)
        if "router" not in found:
            return {"loss": loss, **metrics}, 0.0
        added = 0.0
        if router is not None and router.scale is not None:
            added = routers.added_loss(config, found["router"], router.scale)
        metrics = metrics | routers.measures(config, found["router"])
        return {"loss": loss, **metrics}, added

    def _spec_loss(self, found, batch, packing) -> tuple[Mean, dict[str, Mean]]:
        sequences = packed.select_sequences(batch, packing)
        sequences |= {k: found[k] for k in ("entropy", "logprobs") if k in found}
        return self.spec.loss(found[self.spec.output], sequences)

    def _loss_weight(self, batch, packing) -> Array:
        """The weight of a microbatch's loss, which no output of the model changes."""
        output, shape = self.spec.output, packing["places"].shape
        zeros = jnp.zeros(shape[:1] if output == "scores" else shape)
        found = {output: zeros}
        if output in LANGUAGE_OUTPUTS:
            found |= {"logprobs": zeros, "entropy": zeros}
        if output == "top_logprobs":
            found[output] = jnp.zeros((*shape, batch["top_ids"].shape[2]))
        return self._spec_loss(found, batch, packing)[0].weight

    def _zero_sums(self, parameters, batch, packing):
        zeros = jax.tree.map(jnp.zeros_like, self._split(parameters)[0])
        return zeros, self._zero_means(parameters, batch, packing)

    def _zero_means(self, parameters, batch, packing):
        means, _ = jax.eval_shape(self._losses, parameters, batch, packing)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), means)

    def _add_gradients(self, parameters, sums, batch, packing, router=None):
        gradient_sum, mean_sums = sums
        trained, base = self._split(parameters)

        def total(trained):
            whole = join(trained, base)
            means, added = self._losses(whole, batch, packing, router)
            return means["loss"].total + added, means

        gradients, means = jax.grad(total, has_aux=True)(trained)
        gradients = jax.lax.with_sharding_constraint(gradients, self._cut)
        add = lambda a, b: a + b.astype(jnp.float32)
        return (
            jax.tree.map(add, gradient_sum, gradients),
            jax.tree.map(add, mean_sums, means),
        )

    def _add_measures(self, parameters, measures, batch, packing):
        found, _ = self._losses(parameters, batch, packing)
        return jax.tree.map(jnp.add, measures, found)

    def _apply_gradients(self, state: TrainState, sums):
        gradient_sum, means = sums
        means = routers.finished(means)
        weight = means["loss"].weight
        norm = optax.tree.norm(_means(gradient_sum, weight))
        loss = means["loss"].value()
        is_finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        skip = ~is_finite | (weight <= 0)
        if self.spec.skip is not None:
            skip |= self.spec.skip({name: mean.value() for name, mean in means.items()})
        count = optax.tree_utils.tree_get(state.optimizer, "count", filtering=_is_adam)
        # Not to be regrouped with what they were computed from: the update is then the
        # same arithmetic, however much of the parameters it is given.
        scalars = jax.lax.optimization_barrier(StepScalars(weight, norm, skip))
        new = TrainState(
            *self._step(state.parameters, state.optimizer, gradient_sum, scalars)
        )
        return new, means | {
            "grad_norm": _single(norm),
            "learning_rate": _single(self.schedule(count)),
            "skipped": _single(skip),
            "nonfinite": _single(~is_finite),
        }

    def _resident_step(self, parameters, state, gradient_sum, scalars):
        constrain = lambda x: jax.lax.with_sharding_constraint(x, self._cut)
        return self._update(parameters, state, gradient_sum, scalars, constrain)

    def _update(
        self, parameters, state, gradient_sum, scalars: StepScalars, constrain=None
    ):
        """Update parameters, all or some, with the state that is theirs."""
        updates, moments = self.optimizer.update(
            _means(gradient_sum, scalars.weight), state, parameters, norm=scalars.norm
        )
        if constrain is not None:
            updates = constrain(updates)
        new = optax.apply_updates(parameters, updates), moments
        keep = lambda old, new: jnp.where(scalars.skip, old, new)
        return jax.tree.map(keep, (parameters, state), new)


def _means(gradient_sum: PyTree, weight: Array) -> PyTree:
    return jax.tree.map(lambda g: g / jnp.where(weight > 0, weight, 1.0), gradient_sum)


def _is_adam(path: tuple[Any, ...], _: Any) -> bool:
    """Picks Adam's counter; the schedule holds an equal one."""
    return any(getattr(k, "tuple_name", "") == "ScaleByAdamState" for k in path)


def _single(value: Any) -> Mean:
    return Mean(jnp.asarray(value, jnp.float32), jnp.float32(1.0))


def minibatch_order(
    size: int, *, unit: int, epochs: int, generator: Any | None
) -> Iterator[Any]:
    """Row indices of each epoch: as they stand, or shuffled in whole units.

    Args:
        size: rows of the batch, a multiple of `unit`.
        unit: adjacent rows that stay together.
        epochs: how many orders to give.
        generator: a NumPy generator, or None to keep the order.
    """
    rows = np.arange(size).reshape(-1, unit)
    for _ in range(epochs):
        order = rows if generator is None else generator.permutation(rows)
        yield order.reshape(-1)
