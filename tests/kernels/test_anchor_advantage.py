"""``anchor_advantage`` against hand-computed values and a float64 double loop written from the definition."""

import math
from dataclasses import dataclass, replace
from decimal import Decimal, localcontext
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aapa_kernels import anchor_advantage, response_scores
from aapa_kernels.anchor_advantage import GRANULARITIES, POOLS, SCALES, TRANSFORMS
from aapa_kernels.anchor_advantage.reference import pool_sentences, transform_logits


@dataclass
class Case:
    """``counts[i][k]`` tokens and ``logits[i][k]`` of sentence k of response i, in groups ``groups[i]``."""

    logits: list[list[float]]
    counts: list[list[int]]
    groups: list[int]
    experts: list[float]
    keep: list[bool]
    pad: int = 0

    def run(self, dtype=torch.float64, device="cpu", **options):
        index = [i for i, row in enumerate(self.logits) for _ in row]
        width = max(sum(row) for row in self.counts) + self.pad
        token_sentence, s = torch.full((len(self.logits), width), -1), 0
        for i, row in enumerate(self.counts):
            t = 0
            for n in row:
                token_sentence[i, t : t + n] = s
                s, t = s + 1, t + n
        tensors = (
            torch.tensor([value for row in self.logits for value in row], dtype=dtype),
            torch.tensor([n for row in self.counts for n in row]),
            torch.tensor(index),
            token_sentence,
            torch.tensor(self.groups),
        )
        experts, keep = torch.tensor(self.experts, dtype=dtype).to(device), torch.tensor(self.keep).to(device)
        found = anchor_advantage(*(t.to(device) for t in tensors), expert_logits=experts, row_mask=keep, **options)
        return type(found)(*(value.cpu() for value in found))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def brute_force(
    case, transform="gan_ns", tau=1.0, pool="mean", softmin_temperature=1.0, scale="batch", scale_floor=0.1, granularity="response"
):
    n = len(case.logits)
    rules = {
        "gan_ns": lambda x, e: log_sigmoid(x / tau),
        "score": lambda x, e: x / tau,
        "gan_sat": lambda x, e: -log_sigmoid(-x / tau),
        "bt_gap": lambda x, e: log_sigmoid((x - e) / tau),
    }
    g = [[rules[transform](x, case.experts[i]) for x in case.logits[i]] for i in range(n)]
    total = [sum(row) for row in case.counts]
    w = [[c / total[i] if total[i] else 1 / len(case.counts[i]) for c in case.counts[i]] for i in range(n)]
    token_mean = [sum(a * b for a, b in zip(w[i], g[i], strict=True)) for i in range(n)]

    def softmin(row):
        low = min(row)
        return low - softmin_temperature * math.log(sum(math.exp(-(x - low) / softmin_temperature) for x in row) / len(row))

    pools = {
        "mean": lambda i: sum(g[i]) / len(g[i]),
        "token_mean": lambda i: token_mean[i],
        "min": lambda i: min(g[i]),
        "softmin": lambda i: softmin(g[i]),
    }
    u = [pools[pool](i) for i in range(n)]
    members = {i: [j for j in range(n) if case.groups[j] == case.groups[i] and case.keep[j]] for i in range(n)}
    alive = [case.keep[i] and len(members[i]) > 1 for i in range(n)]

    def group_average(values, i):
        return sum(values[j] for j in members[i]) / len(members[i])

    c = [u[i] - group_average(u, i) if alive[i] else 0.0 for i in range(n)]

    def std(values):
        mean = sum(values) / max(len(values), 1)
        return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1)) if len(values) > 1 else 0.0

    batch = max(std([c[i] for i in range(n) if alive[i]]), scale_floor)
    scales = [
        {"fixed": 1.0, "batch": batch, "group": (std([u[j] for j in members[i]]) if alive[i] else 0.0) + 1e-4}[scale] for i in range(n)
    ]
    out = torch.zeros(n, max(total) + case.pad, dtype=torch.float64)
    for i in range(n):
        t = 0
        for k, count in enumerate(case.counts[i]):
            value = c[i]
            if granularity == "sentence" and alive[i]:
                value = sum(w[i][j] * g[i][j] for j in range(k, len(g[i]))) - group_average(token_mean, i) * sum(w[i][k:])
            out[i, t : t + count] = value / scales[i] if alive[i] else 0.0
            t += count
    return torch.tensor(u, dtype=torch.float64), torch.tensor(c, dtype=torch.float64), out


@st.composite
def cases(draw):
    n = draw(st.integers(1, 6))
    logits, counts = [], []
    for _ in range(n):
        size = draw(st.integers(1, 4))
        logits.append(draw(st.lists(st.floats(-30, 30), min_size=size, max_size=size)))
        empty = size == 1 and draw(st.booleans())
        counts.append([0] if empty else draw(st.lists(st.integers(1, 5), min_size=size, max_size=size)))
    fixed = {"min_size": n, "max_size": n}
    return Case(
        logits,
        counts,
        draw(st.lists(st.integers(0, 2), **fixed)),
        draw(st.lists(st.floats(-5, 5), **fixed)),
        draw(st.lists(st.sampled_from([True, True, True, False]), **fixed)),
        draw(st.integers(0, 3)),
    )


OPTIONS = st.fixed_dictionaries(
    {
        "transform": st.sampled_from(TRANSFORMS),
        "tau": st.sampled_from([0.5, 1.0, 5.0]),
        "pool": st.sampled_from(POOLS),
        "softmin_temperature": st.sampled_from([0.3, 2.0]),
        "scale": st.sampled_from(SCALES),
        "scale_floor": st.sampled_from([0.01, 0.1]),
        "granularity": st.sampled_from(GRANULARITIES),
    }
)


@settings(max_examples=200, deadline=None)
@given(case=cases(), options=OPTIONS)
def test_equals_the_definition(case, options):
    found = case.run(**options)
    scores, centred, advantages = brute_force(case, **options)
    torch.testing.assert_close(found.scores, scores, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.centred, centred, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.advantages, advantages, rtol=1e-8, atol=1e-8)


#: Scores near 30 carry 2e-6 of float32 rounding; a scale of 0.01 makes that 2e-4 of an advantage. Times 4.
KERNEL_ERROR = 1e-3


@settings(max_examples=25, deadline=None)
@given(case=cases(), options=OPTIONS)
def test_kernels_equal_the_definition(case, options, device):
    found = case.run(torch.float32, device, impl="triton", **options)
    again = case.run(torch.float32, device, impl="triton", **options)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    # the definition at the rounded numbers
    rounded = replace(case, **{name: torch.tensor(getattr(case, name)).tolist() for name in ("experts",)})
    rounded.logits = [torch.tensor(row).tolist() for row in case.logits]
    scores, centred, advantages = brute_force(rounded, **options)
    torch.testing.assert_close(found.scores.double(), scores, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(found.centred.double(), centred, rtol=1e-6, atol=2e-5)
    if options["scale"] != "group":  # a deviation of nearly equal scores is all rounding: see the next test
        torch.testing.assert_close(found.advantages.double(), advantages, rtol=KERNEL_ERROR, atol=KERNEL_ERROR)


def test_kernels_scale_by_the_group(device):
    for granularity in GRANULARITIES:
        options = {"transform": "score", "scale": "group", "granularity": granularity}
        found, expected = CASE.run(torch.float32, device, impl="triton", **options), CASE.run(**options)
        torch.testing.assert_close(found.advantages.double(), expected.advantages, rtol=1e-5, atol=1e-5)


# two groups: rows 0 and 2, rows 1 and 3; a group of one: row 4
CASE = Case([[1.0, -1.0], [0.0], [2.0], [3.0, 1.0, 2.0], [9.0]], [[3, 1], [2], [4], [1, 1, 2], [2]], [5, 3, 5, 3, 8], [0.0] * 5, [True] * 5)


def test_hand_computed_response():
    found = CASE.run(transform="score", tau=2.0, scale="fixed")
    torch.testing.assert_close(found.scores, torch.tensor([0.0, 0.0, 1.0, 1.0, 4.5], dtype=torch.float64))
    torch.testing.assert_close(found.centred, torch.tensor([-0.5, -0.5, 0.5, 0.5, 0.0], dtype=torch.float64))
    expected = [[-0.5] * 4, [-0.5, -0.5, 0, 0], [0.5] * 4, [0.5] * 4, [0] * 4]
    torch.testing.assert_close(found.advantages, torch.tensor(expected, dtype=torch.float64))
    # four rows count, the group of one does not: std = sqrt(4 * 0.25 / 3)
    torch.testing.assert_close(CASE.run(transform="score", tau=2.0).scale, torch.full((5,), (1 / 3) ** 0.5, dtype=torch.float64))
    group = torch.tensor([0.5**0.5 + 1e-4] * 4 + [1e-4], dtype=torch.float64)
    torch.testing.assert_close(CASE.run(transform="score", tau=2.0, scale="group").scale, group)


def test_hand_computed_sentence():
    found = CASE.run(transform="score", scale="fixed", granularity="sentence").advantages
    # row 0: w = 3/4, 1/4; token means of the group are 0.5 and 2, so the baseline is 1.25
    first = (0.75 * 1.0 + 0.25 * -1.0) - 1.25
    last = 0.25 * -1.0 - 1.25 * 0.25
    torch.testing.assert_close(found[0], torch.tensor([first, first, first, last], dtype=torch.float64))
    assert found[4].eq(0).all()


def test_first_sentence_answers_for_all_and_last_for_itself():
    options = {"transform": "gan_ns", "scale": "fixed", "pool": "token_mean"}
    sentence, response = CASE.run(granularity="sentence", **options), CASE.run(**options)
    torch.testing.assert_close(sentence.advantages[:, 0], response.advantages[:, 0])
    changed = replace(CASE, logits=[[-7.0, -1.0], *CASE.logits[1:]])
    # the last sentence of row 0 does not read the first one's logit, except through the group's baseline (n = 2, weight 1/4)
    moved = changed.run(granularity="sentence", **options).advantages[0, 3] - sentence.advantages[0, 3]
    baseline = (changed.run(**options).scores - response.scores)[0] / 2
    torch.testing.assert_close(moved, -0.25 * baseline)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_extreme_logits_stay_finite_and_ordered(transform, pool, scale, granularity):
    case = Case([[-1e4, 1e4], [0.0], [1e4], [-1e4]], [[2, 1], [1], [2], [0]], [0, 0, 0, 0], [1e4, -1e4, 0.0, 0.0], [True] * 4)
    found = case.run(torch.float32, transform=transform, pool=pool, scale=scale, granularity=granularity)
    for value in found:
        assert torch.isfinite(value).all()
    if transform != "bt_gap":
        assert found.centred[2] > found.centred[3]


def test_large_neighbours_do_not_round_off_small_credits():
    small = Case([[0.3, 0.1], [0.2, 0.4]], [[1, 1], [1, 1]], [0, 0], [0.0] * 2, [True] * 2)
    both = Case(small.logits + [[1e8, -1e8]] * 2, small.counts * 2, [0, 0, 1, 1], [0.0] * 4, [True] * 4)
    options = {"transform": "score", "scale": "fixed", "granularity": "sentence"}
    assert torch.equal(both.run(torch.float32, **options).advantages[:2], small.run(torch.float32, **options).advantages)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("pool", POOLS)
def test_equal_logits_of_any_size_in_any_number_of_sentences_give_exactly_nothing(pool, impl, device):
    sizes = [1, 2, 3, 5, 7, 70]
    for logit in (3.3, 50.1, 333.3):
        case = Case([[logit] * n for n in sizes], [[1 + k % 3 for k in range(n)] for n in sizes], [0] * 6, [1.7] * 6, [True] * 6)
        for transform, scale, granularity in product(("score", "bt_gap"), SCALES, GRANULARITIES):
            options = {"transform": transform, "pool": pool, "scale": scale, "granularity": granularity, "scale_floor": 1e-6, "impl": impl}
            found = case.run(torch.float32, device, **options)
            assert torch.equal(found.centred, torch.zeros(6)), options
            assert torch.equal(found.advantages, torch.zeros_like(found.advantages)), options


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scores_that_differ_by_rounding_are_equal_and_others_are_not(granularity, impl, device):
    for logit in (3.3, 50.1, 333.3, -333.3):
        above = float(torch.nextafter(torch.tensor(logit), torch.tensor(1e9)))
        options = {"transform": "score", "scale": "group", "granularity": granularity, "impl": impl}
        case = Case([[logit], [above, logit], [above]], [[1], [2, 1], [1]], [0] * 3, [0.0] * 3, [True] * 3)
        assert torch.equal(case.run(torch.float32, device, **options).advantages, torch.zeros(3, 3))
        apart = replace(case, logits=[[logit], [logit * (1 + 1e-5)] * 2, [logit]])
        assert float(apart.run(torch.float32, device, **options).advantages.abs().max()) > 0.1
        tiny = replace(case, logits=[[logit * 1e-9], [-logit * 1e-9] * 2, [0.0]])  # small, but not rounding
        assert float(tiny.run(torch.float32, device, **options).advantages.abs().max()) > 0


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("scale", SCALES)
def test_equal_scores_give_exactly_nothing(scale, impl, device):
    case = Case([[0.1]] * 7, [[2]] * 7, [0] * 7, [0.0] * 7, [True] * 7)
    assert torch.equal(case.run(torch.float32, device, scale=scale, impl=impl).advantages, torch.zeros(7, 2))


def test_floor_keeps_noise_small_where_group_scale_blows_it_up():
    case = Case([[0.0], [1e-3]], [[1], [1]], [0, 0], [0.0] * 2, [True] * 2)
    assert case.run(transform="score").advantages.abs().max() < 0.01
    assert case.run(transform="score", scale="group").advantages.abs().max() > 0.5


def test_order_of_rows_does_not_matter():
    order = [3, 0, 4, 2, 1]
    moved = Case(*([values[i] for i in order] for values in (CASE.logits, CASE.counts, CASE.groups, CASE.experts, CASE.keep)))
    for granularity in GRANULARITIES:
        expected, found = CASE.run(granularity=granularity), moved.run(granularity=granularity)
        torch.testing.assert_close(found.advantages, expected.advantages[order])


def test_padding_does_not_matter():
    for granularity in GRANULARITIES:
        expected, found = CASE.run(granularity=granularity).advantages, replace(CASE, pad=3).run(granularity=granularity).advantages
        assert torch.equal(found[:, : expected.shape[1]], expected)
        assert found[:, expected.shape[1] :].eq(0).all()


def test_two_ranks_share_one_scale():
    halves = []
    for rows in ([0, 2], [1, 3, 4]):
        halves.append(Case(*([getattr(CASE, f)[i] for i in rows] for f in ("logits", "counts", "groups", "experts", "keep"))))
    sent = []
    for half in halves:
        half.run(sum_over_ranks=lambda moments: sent.append(moments) or moments)
    assert len(sent) == 2  # one sum per rank
    whole = CASE.run()
    for half, rows in zip(halves, ([0, 2], [1, 3, 4]), strict=True):
        found = half.run(sum_over_ranks=lambda _: sent[0] + sent[1])
        torch.testing.assert_close(found.advantages, whole.advantages[rows][:, : found.advantages.shape[1]])


def test_softmin_lies_between_min_and_mean():
    g, counts, offsets = torch.tensor([-3.0, -1.0, -0.5]), torch.tensor([1, 1, 1]), torch.tensor([0, 3])
    pooled = {name: pool_sentences(g, counts, offsets, name).item() for name in POOLS}
    assert pooled["min"] < pooled["softmin"] < pooled["mean"]
    assert pool_sentences(g, counts, offsets, "softmin", 1e-3).item() == pytest.approx(-3.0, abs=0.01)
    assert pool_sentences(g, counts, offsets, "softmin", 1e4).item() == pytest.approx(-1.5, abs=0.01)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("temperature", [1e-40, 1e-3, 0.1, 1.0, 1e2, 1e4, 1e6, 1e8, 1e12, 1e30, 1e39])
def test_softmin_at_any_temperature(temperature, impl, device):
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 3, 64, 65, 300]
    logits, offsets = torch.randn(sum(sizes), generator=generator) * 3 - 2, torch.tensor([0, *sizes]).cumsum(0)
    logits[offsets[3]], logits[-1] = -12.0, -15.0  # the lowest first and last
    options = {"transform": "score", "pool": "softmin", "softmin_temperature": temperature}
    counts = torch.ones(len(logits), dtype=torch.int64)
    given = logits.to(device).requires_grad_()
    found = response_scores(given, counts.to(device), offsets.to(device), impl=impl, **options).scores
    with localcontext() as context:
        context.prec = 80
        t = Decimal(temperature)
        exponentials = [(-Decimal(x) / t).exp() if temperature > 1e-6 else None for x in logits.tolist()]
        rows = [slice(a, b) for a, b in pairwise(offsets.tolist())]
        means = [float(-t * (sum(exponentials[row]) / (row.stop - row.start)).ln()) if temperature > 1e-6 else None for row in rows]
    expected = torch.tensor([float(logits[row].min()) if mean is None else mean for mean, row in zip(means, rows, strict=True)])
    torch.testing.assert_close(found.detach().cpu(), expected, rtol=2e-6, atol=2e-6)
    found.sum().backward()
    exact = logits.double()
    shares = torch.cat([torch.softmax(-exact[row] / max(temperature, 1e-30), 0) for row in rows])
    torch.testing.assert_close(given.grad.cpu(), shares.float(), rtol=1e-5, atol=1e-7)


def test_gradient_of_the_scores():
    logits = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    counts, offsets = torch.tensor([1, 3, 2]), torch.tensor([0, 2, 3])
    for pool in POOLS:
        assert torch.autograd.gradcheck(lambda x, pool=pool: pool_sentences(transform_logits(x), counts, offsets, pool), logits)


@pytest.mark.parametrize("bad", [{"transform": "gan"}, {"pool": "max"}, {"scale": "none"}, {"granularity": "token"}])
def test_unknown_names_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        CASE.run(**bad)


def test_no_rows():
    none = torch.zeros(0, dtype=torch.int64)
    for granularity in GRANULARITIES:
        found = anchor_advantage(torch.zeros(0), none, none, torch.zeros(0, 3, dtype=torch.int64), none, granularity=granularity)
        assert found.advantages.shape == (0, 3)
