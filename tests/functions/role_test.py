"""Roles: what a run's config says of a model, and what it may not say."""

import dataclasses

import pytest

from realjax.core.config import config_dict, to_dataclass
from realjax.functions.role import Role, RoleConfig, RouterConfig
from realjax.testing import tiny_model
from tests.tiny_families import FAMILIES


def test_a_run_changes_routers_where_it_says_so_and_nowhere_else():
    model = FAMILIES["mixtral"]
    config = config_dict(RoleConfig())
    config.router.capacity_factor = 1.25
    config.router.drop_policy = "position"
    changed = to_dataclass(RoleConfig, config).router.applied(model)
    wanted = dataclasses.replace(
        model.moe, capacity_factor=1.25, drop_policy="position"
    )
    assert changed == dataclasses.replace(model, moe=wanted)
    assert RouterConfig().applied(model) is model


def test_routers_of_a_model_without_experts_are_refused():
    with pytest.raises(ValueError, match=r"'jitter': 0.1.*'llama'\) has no experts"):
        RouterConfig(jitter=0.1).applied(tiny_model())


def test_a_router_s_settings_are_checked():
    with pytest.raises(ValueError, match=r"drop_policy.*'random'"):
        RouterConfig(drop_policy="random").applied(FAMILIES["mixtral"])


@pytest.mark.parametrize("is_trained", [False, True])
def test_float16_is_for_roles_that_no_call_trains(is_trained):
    fields = {
        "name": "reference",
        "config": RoleConfig(dtype="float16"),
        "model": tiny_model(),
        "eos_ids": (1,),
        "dtype": "float16",
        "is_trained": is_trained,
    }
    if not is_trained:
        assert Role(**fields).dtype == "float16"
        return
    with pytest.raises(ValueError, match=r"trained in float16.*Use bfloat16"):
        Role(**fields)
