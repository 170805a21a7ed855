import pytest
import torch
from torch import nn

from aapa_lightning.modules.skipping import SkipCounter, all_finite, gradient_norm
from aapa_lightning.types import identity_sum


def test_a_finite_step_ends_a_row_but_not_the_count() -> None:
    counter = SkipCounter(3)
    for finite in (False, False, True, False, False):
        counter.record(finite, "step 1")
    assert (counter.total, counter.in_a_row) == (4, 2)
    with pytest.raises(RuntimeError, match=r"3 optimiser steps in a row .* the last was step 9"):
        counter.record(False, "step 9")


def test_the_count_goes_on_after_a_resume() -> None:
    counter, resumed = SkipCounter(2), SkipCounter(2)
    counter.record(False, "step 0")
    resumed.load_state_dict(counter.state_dict())
    with pytest.raises(RuntimeError, match="2 optimiser steps in a row"):
        resumed.record(False, "step 1")
    assert resumed.total == 2


def test_gradient_norm_is_the_norm_that_clipping_sees() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    unused = nn.Parameter(torch.zeros(2))
    assert gradient_norm([unused]) == 0
    layer(torch.randn(4, 3)).pow(2).sum().backward()
    expected = nn.utils.clip_grad_norm_(layer.parameters(), 1e9)
    torch.testing.assert_close(gradient_norm([*layer.parameters(), unused]), expected)
    layer.bias.grad[0] = float("nan")
    assert gradient_norm(layer.parameters()).isnan()
    half = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    half.grad = torch.full((2,), 6e4, dtype=torch.float16)
    assert gradient_norm([half]).item() == pytest.approx(6e4 * 2**0.5, rel=1e-3)  # in float16 it would overflow


@pytest.mark.parametrize(("value", "finite"), [(1.0, True), (float("nan"), False), (float("inf"), False), (-float("inf"), False)])
def test_one_bad_rank_is_enough(value: float, finite: bool) -> None:
    assert all_finite(torch.tensor(value), identity_sum) is finite
    assert all_finite(torch.tensor(value), lambda flag: flag + 1) is False
    assert all_finite(torch.tensor(value), lambda flag: flag * 4) is finite
