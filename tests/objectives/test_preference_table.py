"""Binding the options of a preference objective, and the mistakes that it answers."""

import math

import pytest
import torch

from aapa_lightning.errors import ConfigError
from aapa_lightning.objectives.preference import PREFERENCES, PreferenceObjective
from aapa_lightning.types import LossOutputs, PairLossInputs


def one_pair(**stressed):
    length = torch.tensor([1])
    return PairLossInputs(
        torch.tensor([-1.0]), torch.tensor([-2.0]), length, length, torch.tensor([-1.5]), torch.tensor([-1.5]), **stressed
    )


def test_bound_options_reach_the_loss_and_the_others_keep_their_defaults():
    simpo = PREFERENCES["simpo"]
    assert simpo.bind({})(one_pair()).losses.item() == pytest.approx(math.log1p(math.exp(-2.5 * 0.45)))
    assert simpo.bind({"gamma_beta_ratio": 0})(one_pair()).losses.item() == pytest.approx(math.log1p(math.exp(-2.5)))


def test_unknown_options_list_the_known_ones():
    with pytest.raises(ConfigError, match="option of simpo_loss: expected one of beta, gamma_beta_ratio, label_smoothing; found 'gamma'"):
        PREFERENCES["simpo"].bind({"gamma": 1.0})
    with pytest.raises(ConfigError, match="rrhf_loss has no options; found beta"):
        PREFERENCES["rrhf"].bind({"beta": 1.0})


@pytest.mark.parametrize(
    ("name", "option", "value", "found"),
    [
        ("dpo", "beta", "0.1", r"expected float, found '0.1' \(str\)"),
        ("dpo", "beta", True, r"expected float, found True \(bool\)"),
        ("dpo", "beta", None, r"expected float, found None \(NoneType\)"),
        ("dpo", "length_normalize", 1, r"expected bool, found 1 \(int\)"),
        ("sympo", "kind", 2.0, r"expected str, found 2.0 \(float\)"),
        ("kto", "desirable_weight", [1.0], r"expected float, found \[1.0\] \(list\)"),
    ],
)
def test_values_of_another_type(name, option, value, found):
    with pytest.raises(ConfigError, match=f"option {option} of {name}_loss: {found}"):
        PREFERENCES[name].bind({option: value})


RANGES = [
    (name, option, bad)
    for name, option, values in [
        *((name, "beta", (0.0, -0.1, math.nan, math.inf)) for name in PREFERENCES if name != "rrhf"),
        *((name, "label_smoothing", (-0.1, 0.5, math.nan)) for name in ("simpo", "gapo", "amapo", "cdpo", "rdpo")),
        ("ropo", "alpha", (0.0,)),
        ("sympo", "clip", (0.0,)),
        ("dr_dpo", "beta_prime", (0.0,)),
        ("kto", "desirable_weight", (0.0,)),
        ("kto", "undesirable_weight", (-1.0,)),
    ]
    for bad in values
]


@pytest.mark.parametrize(("name", "option", "bad"), RANGES)
def test_values_out_of_range_are_refused_when_bound(name, option, bad):
    with pytest.raises(ConfigError, match=rf"{option}: expected .*, found {bad}"):
        PREFERENCES[name].bind({option: bad})


def test_the_probe_of_gapo_is_simpo_with_gapos_defaults():
    assert [name for name, row in PREFERENCES.items() if row.probe] == ["gapo"]
    assert PREFERENCES["dpo"].bind_probe({}) is None
    for options, beta, ratio in (({}, 2.0, 0.25), ({"beta": 10.0, "gamma_beta_ratio": 0.5}, 10.0, 0.5)):
        loss = PREFERENCES["gapo"].bind_probe(options)(one_pair()).losses.item()
        assert loss == pytest.approx(math.log1p(math.exp(-beta * (1.0 - ratio))))
        # At unperturbed margins of 0 the loss is its own probe.
        assert PREFERENCES["gapo"].bind(options)(one_pair(stressed_margins=torch.zeros(1))).losses.item() == pytest.approx(loss)


def test_a_row_of_ones_own_is_bound_the_same_way():
    def slack_loss(inputs: PairLossInputs, *, slack: float = 0.5) -> LossOutputs:
        return LossOutputs(slack - inputs.chosen_logprobs)

    row = PreferenceObjective(slack_loss, options={"slack": 0.25})
    assert row.bind({})(one_pair()).losses.item() == 1.25
    assert row.bind({"slack": 1})(one_pair()).losses.item() == 2.0
    with pytest.raises(ConfigError, match="option of slack_loss: expected one of slack; found 'beta'"):
        row.bind({"beta": 1.0})
