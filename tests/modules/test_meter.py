import pytest
import torch

from aapa_lightning.loop.terms import LossTerm, total_loss
from aapa_lightning.modules.meter import StepMeter
from aapa_lightning.reduce import Mean, StepCounts, count_step
from aapa_lightning.types import LossOutputs, identity_sum

CPU = torch.device("cpu")
LOSSES = torch.arange(12.0).reshape(4, 3)
MASK = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [False, False, False]])


def fill(meter: StepMeter, rows: list[slice], scale: float, aggregation: str = "dapo") -> None:
    """Micro-steps of one optimiser step of ``LOSSES``."""
    counts = StepCounts.from_tensor(count_step(MASK))
    for part in rows:
        outputs = LossOutputs(LOSSES[part], {"half": LOSSES[part] / 2})
        term = LossTerm("policy", outputs, MASK[part], counts, aggregation, 0.5)
        loss, values = total_loss([term], scale)
        meter.add_terms([term], values, loss)


@pytest.mark.parametrize("aggregation", ["dapo", "grpo"])
def test_a_step_has_one_value_however_it_is_cut(aggregation: str) -> None:
    found = []
    for rows in ([slice(0, 4)], [slice(0, 2), slice(2, 4)], [slice(i, i + 1) for i in range(4)]):
        meter = StepMeter()
        fill(meter, rows, float(len(rows)), aggregation)
        found.append(meter.compute(identity_sum, CPU))
    losses = LOSSES[MASK].sum() / 6 if aggregation == "dapo" else torch.tensor((0.5 + 3.0 + 7.0) / 3)
    for metrics in found:
        assert metrics["losses/policy"] == pytest.approx(losses.item(), rel=1e-6)
        assert metrics["loss"] == pytest.approx(losses.item() / 2, rel=1e-6)
        assert metrics["policy/half"] == pytest.approx((LOSSES[MASK] / 2).mean().item(), rel=1e-6)


def test_ranks_agree_on_the_value_of_the_whole_step() -> None:
    meters = [StepMeter(), StepMeter()]
    fill(meters[0], [slice(0, 2)], 2.0)
    fill(meters[1], [slice(2, 4)], 2.0)
    sent: list[torch.Tensor] = []
    for meter in meters:
        meter.compute(lambda value: (sent.append(value), value)[1], CPU)
    again = StepMeter()
    fill(again, [slice(0, 2)], 2.0)
    metrics = again.compute(lambda value: value + sent[1], CPU)
    assert metrics["losses/policy"] == pytest.approx(LOSSES[MASK].sum().item() / 6, rel=1e-6)
    assert metrics["policy/half"] == pytest.approx((LOSSES[MASK] / 2).mean().item(), rel=1e-6)


def test_computing_empties_the_meter() -> None:
    meter = StepMeter()
    meter.add("x", 6.0, 3.0)
    meter.add("x", torch.tensor(2.0), 1.0)
    meter.add("nothing", 0.0, 0.0)
    meter.add_means({"mean": 5.0})
    assert meter.compute(identity_sum, CPU) == {"x": 2.0, "nothing": 0.0, "mean": 5.0}
    assert meter.compute(identity_sum, CPU) == {}


def test_means_of_unequal_counts_are_joined_by_their_parts() -> None:
    meter = StepMeter()
    meter.add_means({"tokens": Mean(3.0, 3), "same": 5.0, "none": Mean(0.0, 0)})
    other = StepMeter()
    other.add_means({"tokens": Mean(300.0, 100), "same": 5.0, "none": Mean(0.0, 0)})
    sent: list[torch.Tensor] = []
    other.compute(lambda value: (sent.append(value), value)[1], CPU)
    assert meter.compute(lambda value: value + sent[0], CPU) == {"tokens": 303 / 103, "same": 5.0, "none": 0.0}
    assert Mean.of(torch.tensor([True, False, True])) == pytest.approx(2 / 3)
    assert Mean.of(torch.zeros(0)) == 0.0
