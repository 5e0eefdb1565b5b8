"""The choice of an implementation, and what it says."""

import jax
import pytest

from pallas_kernels import _dispatch
from pallas_kernels._dispatch import Device, Implementation, choose

IMPLEMENTATIONS = (
    Implementation(
        name="fast",
        function=lambda x: ("fast", x),
        unsupported=lambda size: "it is odd" if size % 2 else None,
    ),
    Implementation(
        name="small",
        function=lambda x: ("small", x),
        unwise=lambda size: "it is large" if size > 9 else None,
    ),
    Implementation(name="plain", function=lambda x: ("plain", x)),
)


@pytest.mark.parametrize(("size", "name"), [(2, "fast"), (3, "small"), (11, "plain")])
def test_the_first_that_can_and_would_is_chosen(size, name):
    choice = choose("doubling", IMPLEMENTATIONS, size)
    assert choice.name == name
    assert choice.function(1) == (name, 1)


def test_the_explanation_says_why_the_earlier_ones_were_passed_over():
    assert choose("doubling", IMPLEMENTATIONS, 11).explanation == (
        "doubling runs as 'plain'. Not as 'fast': it is odd. Not as 'small': it is"
        " large."
    )
    assert choose("doubling", IMPLEMENTATIONS, 2).explanation == (
        "doubling runs as 'fast'."
    )


def test_who_asks_by_name_gets_what_is_unwise():
    choice = choose("doubling", IMPLEMENTATIONS, 11, name="small")
    assert choice.name == "small"
    assert choice.explanation == "doubling runs as 'small', as asked."


def test_who_asks_by_name_for_what_cannot_be_is_told_the_reason():
    with pytest.raises(
        ValueError, match=r"doubling cannot run as 'fast': it is odd\. .*None"
    ):
        choose("doubling", IMPLEMENTATIONS, 3, name="fast")


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="'best'; known are 'fast', 'small' and"):
        choose("doubling", IMPLEMENTATIONS, 2, name="best")


def test_where_none_can_all_reasons_are_said():
    with pytest.raises(ValueError, match="Not as 'fast': it is odd"):
        choose("doubling", IMPLEMENTATIONS[:1], 3)


def test_the_device_is_that_of_this_process():
    assert _dispatch.device() == Device(platform="cpu", kind="cpu")


def test_a_described_device_is_another_one_than_that_of_this_process():
    described = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H200", num_cores=132, platform="cuda"
    )
    mesh = jax.sharding.AbstractMesh(
        (1,), ("data",), (jax.sharding.AxisType.Auto,), abstract_device=described
    )
    with jax.sharding.use_abstract_mesh(mesh):
        assert _dispatch.device() == Device(
            platform="gpu", kind="NVIDIA H200", is_present=False
        )
