"""Layouts without devices are those of the shardings on devices."""

import jax
import pytest

from realjax.models.parameters import abstract_parameters
from realjax.parallel import Allocation, make_mesh, parameter_shardings
from realjax.realloc.layouts import Layout, layouts_for, leaf_classes
from realjax.testing import tiny_model


@pytest.mark.parametrize("text", ["d1", "d2f2t2", "t4@2-5", "s2t2@7,6,5,4", "f4+zero1"])
def test_layouts_need_no_devices(text):
    allocation = Allocation.parse(text)
    tree = abstract_parameters(tiny_model())
    shardings = parameter_shardings(
        tree, make_mesh(allocation), options=allocation.options
    )
    # The ids of the tests' devices are their indices.
    assert layouts_for(tree, allocation) == jax.tree.map(Layout.of, shardings)


def test_leaves_of_one_shape_and_layouts_are_one_class():
    tree = abstract_parameters(tiny_model(num_kv_heads=4, tie_embeddings=True))
    found = leaf_classes(tree, Allocation.parse("f2t2"), Allocation.parse("t4"))
    by_name = {name: leaf for leaf in found for name in leaf.names}
    attention = "layers.attention"
    assert by_name[f"{attention}.key.kernel"].names == (
        f"{attention}.key.kernel",
        f"{attention}.query.kernel",
        f"{attention}.value.kernel",
    )
    # The number of layers changes no class.
    deeper = leaf_classes(
        abstract_parameters(
            tiny_model(num_kv_heads=4, tie_embeddings=True, num_layers=7)
        ),
        Allocation.parse("f2t2"),
        Allocation.parse("t4"),
    )
    assert [leaf.names for leaf in deeper] == [leaf.names for leaf in found]
    assert len(by_name) == len(
        jax.tree.leaves(tree, is_leaf=lambda node: hasattr(node, "axes"))
    )
