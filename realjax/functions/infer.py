"""Infer: a forward pass over the batch, microbatch by microbatch."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from realjax.core.arrays import Array, PyTree
from realjax.data.packing import Packing
from realjax.functions import packed
from realjax.functions.function import Infer
from realjax.parallel.sharding import rows_sharding


class InferProgram:
    """The compiled form of one `Infer` on one mesh."""

    def __init__(
        self, spec: Infer, program: packed.ModelProgram, mesh: jax.sharding.Mesh
    ):
        """Compiles nothing yet: programs are made at the first call of each shape."""
        self.spec, self.program, self.mesh = spec, program, mesh
        self._fill = jax.jit(self._fill_outputs, donate_argnums=1)

    def described(self, size: int, width: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, types and shardings of what a call gives.

        Args:
            size: B, sequences of the batch.
            width: T, tokens of a sequence.
        """
        rows = rows_sharding(self.mesh, size)
        return {
            name: jax.ShapeDtypeStruct(
                shape, jnp.int32 if name == "top_ids" else jnp.float32, sharding=rows
            )
            for name, shape in self.spec.shapes(size, width).items()
        }

    def __call__(
        self,
        parameters: PyTree,
        batch: Mapping[str, Array],
        packings: Sequence[Packing],
    ) -> dict[str, Array]:
        """What the spec asks for, for every sequence of the batch.

        Args:
            parameters: on this mesh.
            batch: keys of `spec.reads` on this mesh; tokens [B, T].
            packings: microbatches that together hold every sequence once.

        Returns:
            The arrays of `INFERRED[spec.output]`.
        """
        outputs = {
            name: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
            for name, leaf in self.described(*batch["tokens"].shape).items()
        }
        for packing in packings:
            outputs = self._fill(
                parameters, outputs, batch, packed.packing_arrays(packing)
            )
        return outputs

    def _fill_outputs(self, parameters, outputs, batch, packing):
        found = packed.forward(
            parameters,
            self.program,
            batch,
            packing,
            output=self.spec.output,
            temperature=self.spec.temperature,
            num_top=self.spec.num_top,
        )
        return {
            name: jax.lax.with_sharding_constraint(
                value.at[packing["sequences"]].set(found[name], mode="drop"),
                rows_sharding(self.mesh, value.shape[0]),
            )
            for name, value in outputs.items()
        }
