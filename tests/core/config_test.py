import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from realjax.core.config import check_choice, config_dict, suggest, to_dataclass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    temperature: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    data: int = 1

    @classmethod
    def parse(cls, text: str) -> "Allocation":
        return cls(data=int(text.removeprefix("d")))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A stand-in for an algorithm's hyperparameters."""

    kl_coef: float = 0.1
    epochs: int = 1
    whiten: bool = True
    norm: str = "exp"
    kind: Literal["mse", "huber"] = "mse"
    sampling: Sampling = Sampling(top_k=200)
    sizes: tuple[int, ...] = (8, 16)
    pair: tuple[int, str] = (1, "a")
    target: float | None = None
    truncated: str | float = "zero"
    fn: str | Callable | None = None
    others: tuple[Sampling, ...] = ()
    allocation: Allocation | None = None
    per_call: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_choice("norm", self.norm, ("exp", "ma", ""))


def test_round_trip_keeps_every_field():
    method = Method(
        kl_coef=0.5,
        sampling=Sampling(temperature=0.7, top_k=3),
        others=(Sampling(top_k=1), Sampling(top_k=2)),
        target=2.0,
        per_call={"rollout": 2.0},
        allocation=Allocation(data=4),
    )
    assert to_dataclass(Method, config_dict(method)) == method


def test_defaults_stand_once():
    assert to_dataclass(Method, config_dict(Method)) == Method()
    assert to_dataclass(Method, {}) == Method()
    assert config_dict(Method).keys() == ConfigDict(dataclasses.asdict(Method())).keys()


def test_changes_apply_to_a_class_and_to_an_instance():
    assert config_dict(Method, epochs=3).epochs == 3
    changed = config_dict(Method(kl_coef=0.2), epochs=3)
    assert (changed.kl_coef, changed.epochs) == (0.2, 3)


def test_tuples_stay_tuples_and_nested_dataclasses_nest():
    config = config_dict(Method(others=(Sampling(top_k=1),)))
    assert config.sizes == (8, 16)
    assert config.sampling.top_k == 200
    assert config.others == ({"temperature": 1.0, "top_k": 1},)


def test_a_partial_nested_config_keeps_the_outer_defaults():
    # Method's sampling has top_k=200; Sampling's own default is 0.
    method = to_dataclass(Method, {"sampling": {"temperature": 0.5}})
    assert method.sampling == Sampling(temperature=0.5, top_k=200)


def test_a_string_stands_for_a_dataclass_that_parses():
    assert to_dataclass(Method, {"allocation": "d4"}).allocation == Allocation(data=4)


def test_ints_become_floats_and_lists_tuples():
    method = to_dataclass(Method, {"kl_coef": 1, "sizes": [1, 2], "target": 3})
    assert (method.kl_coef, method.sizes, method.target) == (1.0, (1, 2), 3.0)
    assert isinstance(method.kl_coef, float) and isinstance(method.target, float)


def test_a_union_keeps_the_type_of_the_value():
    assert to_dataclass(Method, {"truncated": -1.0}).truncated == -1.0
    assert to_dataclass(Method, {"truncated": "keep"}).truncated == "keep"
    assert to_dataclass(Method, {"fn": len}).fn is len
    assert to_dataclass(Method, {"fn": "module:function"}).fn == "module:function"


@pytest.mark.parametrize(
    "config, error, message",
    [
        (
            {"kl_coeff": 1.0},
            ValueError,
            r"config\.kl_coeff: Method has no .* Did you mean 'kl_coef'\?",
        ),
        (
            {"sampling": {"topk": 1}},
            ValueError,
            r"config\.sampling\.topk.*Did you mean 'top_k'",
        ),
        (
            {"zzz": 1},
            ValueError,
            r"Known: allocation, epochs,",
        ),
        ({"epochs": 1.5}, TypeError, r"config\.epochs is 1\.5, of type float; .* int"),
        ({"epochs": True}, TypeError, r"config\.epochs is True"),
        ({"whiten": 1}, TypeError, r"config\.whiten is 1, of type int; it needs bool"),
        ({"kl_coef": "0.1"}, TypeError, r"config\.kl_coef is '0\.1'"),
        ({"sizes": (1, "b")}, TypeError, r"config\.sizes\[1\] is 'b'"),
        ({"sizes": 3}, TypeError, r"config\.sizes is 3"),
        ({"pair": (1,)}, TypeError, r"config\.pair .* with 1 items; it needs 2"),
        ({"target": "x"}, TypeError, r"config\.target is 'x'"),
        ({"sampling": 3}, TypeError, r"config\.sampling is 3; it needs the fields of"),
        ({"kind": "hubr"}, ValueError, r"config\.kind='hubr'.*Did you mean 'huber'"),
        ({"norm": "expp"}, ValueError, r"config: norm='expp'.*Did you mean 'exp'"),
        (
            {"sampling": {"temperature": -1.0}},
            ValueError,
            r"config\.sampling: temperature is -1\.0",
        ),
        ({"per_call": {"a": "b"}}, TypeError, r"config\.per_call\.a is 'b'"),
        (
            {"others": ({"top_k": "x"},)},
            TypeError,
            r"config\.others\[0\]\.top_k is 'x'",
        ),
        ({"allocation": "dx"}, ValueError, r"config\.allocation: .*'x'"),
    ],
)
def test_a_bad_config_names_the_field(config, error, message):
    with pytest.raises(error, match=message):
        to_dataclass(Method, config)


def test_path_is_the_start_of_every_name():
    with pytest.raises(ValueError, match=r"config\.hp\.epoch:"):
        to_dataclass(Method, {"epoch": 1}, path="config.hp")


def test_flags_override_fields_of_every_type(monkeypatch):
    argv = [
        "program",
        "--config.hp.kl_coef=0.5",
        "--config.hp.epochs=2",
        "--config.hp.whiten=false",
        "--config.hp.sampling.top_k=7",
        "--config.hp.sizes=(1, 2, 3)",
        "--config.hp.target=6",
        "--config.hp.truncated=-1.5",
        "--config.hp.fn=module:function",
        "--config.hp.allocation=d2",
    ]
    monkeypatch.setattr("sys.argv", argv)  # config_flags looks for overrides there.
    values = flags.FlagValues()
    config = ConfigDict({"hp": config_dict(Method)})
    config_flags.DEFINE_config_dict("config", config, flag_values=values)
    values(argv)
    method = to_dataclass(Method, values.config.hp)
    assert method == Method(
        kl_coef=0.5,
        epochs=2,
        whiten=False,
        sampling=Sampling(top_k=7),
        sizes=(1, 2, 3),
        target=6.0,
        truncated=-1.5,
        fn="module:function",
        allocation=Allocation(data=2),
    )


def test_suggest_names_the_nearest_or_lists_all():
    assert suggest("kl_coeff", ["kl_coef", "epochs"]) == "Did you mean 'kl_coef'?"
    assert suggest("xyz", ["b", "a"]) == "Known: a, b."
    assert suggest("xyz", []) == "There are none."
