"""The partition of a call: what its model is told about the devices."""

from jax.sharding import Mesh

from realjax.models.partition import WHOLE, Partition
from realjax.parallel.experts import experts_for
from realjax.parallel.head import linear_logprob_for, linear_top_for
from realjax.parallel.local import locally_for
from realjax.parallel.pipeline import run_stages
from realjax.parallel.sharding import AXES, constrain_for, num_parts


def partition_for(mesh: Mesh, *, options: frozenset[str] = frozenset()) -> Partition:
    """Return how the work of a forward pass is split over a mesh.

    Args:
        mesh: The mesh of the call.
        options: The options of its allocation.
    """
    if mesh.size == 1:
        return WHOLE
    constrain = constrain_for(mesh, options=options)
    run_layers = WHOLE.run_layers
    if mesh.shape["stage"] > 1:
        run_layers = run_stages(mesh, constrain, num_parts(AXES["batch"], mesh))
    return Partition(
        constrain=constrain,
        num_head_parts=mesh.shape["tensor"],
        run_layers=run_layers,
        experts=experts_for(mesh, options=options),
        locally=locally_for(mesh),
        linear_logprob=linear_logprob_for(mesh, options=options),
        linear_top=linear_top_for(mesh, options=options),
    )
