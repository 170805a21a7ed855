import pytest

from aapa_lightning.errors import ConfigError
from aapa_lightning.rollout.base import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("stop", ("a", "")),
    ],
)
def test_values_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"sampling\.{name}: expected .*found"):
        SamplingParams(**{name: value})


def test_the_edges_are_legal() -> None:
    SamplingParams(max_new_tokens=1, temperature=0.0, top_p=1.0, top_k=0, stop=("x",))
