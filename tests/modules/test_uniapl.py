"""UniAPL: what it is without its parts, where its data come from, its normalisers and its schedules."""

from collections import Counter

import pytest
import torch

from aapa_lightning.anchor.schedule import Adaptive, Cosine, Linear, Warmup
from aapa_lightning.anchor.term import AnchorTerm
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.loop.stream import RecordStream


def _fit(kit, module, steps, *callbacks, train=7, demonstrations=5, ckpt=None, **trainer):
    """Train on prompts and on other demonstrations; returns the module and the rows logged."""
    rows, records = kit.Rows(), kit.make_records(train + demonstrations)
    runner = kit.make_trainer(steps, callbacks=callbacks, logger=rows, **trainer)
    kit.fit(module, runner, records[:train], demonstrations=records[train:] or None, ckpt=ckpt)
    return module, [row for _, row in rows.rows]


def _watch(module, name):
    """Keep what a method of the module returned."""
    seen, plain = [], getattr(module, name)

    def watched(*args):
        seen.append(plain(*args))
        return seen[-1]

    setattr(module, name, watched)
    return seen


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize(("dropout", "precision"), [(0.0, "32-true"), (0.3, "32-true"), (0.0, "bf16-mixed")])
def test_without_reinforcement_it_is_sft(kit, spec, same, differ, anchored, dropout, precision):
    """Bit for bit; also with dropout, for which every pass through the policy draws."""

    def run(name, anchor=None, **options):
        module = kit.make_module(name, spec, **options)
        module.configure_model()
        start = kit.weights(module)
        for layer in module.model.model.layers:
            layer.self_attn.attention_dropout = dropout
        _fit(kit, module, 5, *([anchor] if anchor else []), accumulate=2, precision=precision)
        return kit.weights(module), start

    sft, start = run("sft")
    assert differ(sft, start)
    same(sft, run("uniapl", kit.make_anchor(0.0) if anchored else None, rl_weight=0.0)[0])


@pytest.mark.parametrize("anchored", [False, True])
def test_without_demonstrations_it_is_grpo(kit, spec, same, anchored):
    options = {"minibatches": 2, "updates_per_window": 2, "beta": 0.1, "entropy_coef": 0.01}

    def run(name, **own):
        module = kit.make_module(name, spec, **options, **own)
        return kit.weights(_fit(kit, module, 6, *([kit.make_anchor()] if anchored else []), accumulate=2, gradient_clip_val=0.5)[0])

    same(run("grpo"), run("uniapl", demonstrations_per_step=0))


def test_no_demonstrations_and_no_weight_is_a_step_of_zeros(kit, spec):
    """A warm-up starts at 0: the step must still have a graph to go back through."""
    module = kit.make_module("uniapl", spec, demonstrations_per_step=0, rl_weight=Warmup(1.0, 2))
    _, rows = _fit(kit, module, 2)
    assert [row["train/loss"] == 0 for row in rows] == [True, False]
    assert rows[0]["train/grad_norm"] == 0


def test_two_datasets_are_visited_as_their_streams_say(kit, spec):
    """Seven prompts and five demonstrations, four of each a step: nine steps are 36 draws, five passes and seven."""
    steps, records = 9, kit.make_records(12)
    module = kit.make_module("uniapl", spec, sampling=kit.SamplingParams(1), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    visited = {"sampled": [], "imitated": []}
    plain = module.loss_terms

    def watched(window, micro_step):
        visited["sampled"] += [record.prompt for record in window.rollouts_of(micro_step)[0].rollouts.records[::3]]
        visited["imitated"] += [row.record.prompt for row in window.demonstrations_of(micro_step)[0]]
        return plain(window, micro_step)

    module.loss_terms = watched
    _fit(kit, module, steps, accumulate=2)
    for name, part in (("sampled", records[:7]), ("imitated", records[7:])):
        stream = RecordStream(part, module.seed)
        assert visited[name] == [stream[i].prompt for i in range(36)]
        assert Counter(visited[name][: 36 // len(part) * len(part)]) == {record.prompt: 36 // len(part) for record in part}


def test_two_datasets_go_on_after_a_resume(kit, spec, same, tmp_path):
    """At and inside windows of two steps, in later passes over either dataset."""

    def run(ckpt=None, *callbacks):
        module = kit.make_module("uniapl", spec, updates_per_window=2)
        _, rows = _fit(kit, module, 7, kit.make_anchor(0.5), *callbacks, ckpt=ckpt, accumulate=2)
        return kit.weights(module), rows

    whole, rows = run(None, kit.SaveAt(tmp_path))
    for step in (1, 4, 5):
        again, later = run(tmp_path / f"step={step}.ckpt")
        same(whole, again)
        assert later == rows[step:]


def test_one_normaliser_for_the_rollouts_of_both(kit, spec):
    """Tokens of the whole step, over two micro-steps, worked out from what was sampled."""
    module = kit.make_module("uniapl", spec)
    steps, windows = _watch(module, "loss_terms"), _watch(module, "open")
    _fit(kit, module, 2, kit.make_anchor(0.5), accumulate=2)
    for number, window in enumerate(windows):
        experience = window.experience
        lengths = experience.rollouts.lengths
        assert len(lengths) == (4 + 4) * 3
        parts = steps[2 * number : 2 * number + 2]
        for micro_step, terms in enumerate(parts):
            imitation, policy, anchor = terms
            rows = torch.cat(
                [torch.arange(24)[window.plan.prompt_rows(micro_step)], torch.arange(24)[window.plan.demonstration_rows(micro_step)]]
            )
            assert anchor.mask.sum(-1).tolist() == lengths[rows].tolist()
            assert (policy.counts.tokens, policy.counts.responses) == (lengths[:12].sum(), 12)
            assert (anchor.counts.tokens, anchor.counts.responses) == (lengths.sum(), 24)
            assert imitation.counts.tokens == sum(sum(row.response_mask[1:]) for row in window.demonstrations)
            # the ratio is 1: the surrogate is minus the advantage
            expected = -experience.anchor_advantages[rows][experience.loss_mask[rows]].sum() / lengths.sum()
            torch.testing.assert_close(anchor.reduce(1.0).detach(), expected)
        assert sum(int(terms[2].mask.sum()) for terms in parts) == lengths.sum()


def test_rewards_and_the_guard_look_at_train_alone(kit, spec, monkeypatch):
    module, watched, plain = kit.make_module("uniapl", spec), [], AnchorTerm.observe

    def observe(term, rollouts, signal, *rest, **more):
        watched.append((rollouts, signal))
        return plain(term, rollouts, signal, *rest, **more)

    monkeypatch.setattr(AnchorTerm, "observe", observe)
    windows = _watch(module, "open")
    _, rows = _fit(kit, module, 2, kit.make_anchor(0.5))
    prompts = {record.prompt for record in kit.make_records(7)}
    reward = module.rewards.rewards[0]
    assert len(reward.seen) == 24
    assert {prompt for prompt, _ in reward.seen} <= prompts
    for window, row, (rollouts, signal) in zip(windows, rows, watched, strict=True):
        experience = window.experience
        assert {record.prompt for record in experience.rollouts.records[12:]}.isdisjoint(prompts)
        assert experience.advantages[12:].tolist() == [0.0] * 12
        assert (experience.advantages[:12] != 0).any()
        assert experience.rewards[12:].isnan().all()
        assert row["train/reward"] == pytest.approx(float(experience.rewards[:12].mean()))
        assert row["train/guard/length"] > 0
        assert rollouts.records == experience.rollouts.records[:12]
        assert torch.equal(signal.scores, experience.scores[:12])


def test_demonstrations_are_sampled_only_when_anchored(kit, spec):
    module = kit.make_module("uniapl", spec)
    windows = _watch(module, "open")
    _fit(kit, module, 1)
    assert len(windows[0].experience) == 12


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [
        (Linear(0.0, 1.0, 4), [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
        (Cosine(1.0, 0.0, 2), [1.0, 0.5, 0.0, 0.0, 0.0, 0.0]),
        (Warmup(0.8, 2), [0.0, 0.4, 0.8, 0.8, 0.8, 0.8]),
    ],
)
def test_schedules_count_optimiser_steps(kit, spec, schedule, weights):
    """w and lambda, over windows of two steps and steps of two micro-steps; the logged loss says what was used."""
    module = kit.make_module("uniapl", spec, rl_weight=schedule, updates_per_window=2)
    _, rows = _fit(kit, module, 6, kit.make_anchor(Linear(0.6, 0.0, 3)), accumulate=2)
    for w, weight, row in zip(weights, [0.6, 0.4, 0.2, 0.0, 0.0, 0.0], rows, strict=True):
        imitation, policy, anchor = (row[f"train/losses/{name}"] for name in ("sft", "policy", "anchor"))
        assert row["train/rl_weight"] == pytest.approx(w)
        assert row["train/anchor/weight"] == pytest.approx(weight)
        assert row["train/loss"] == pytest.approx(imitation + w * policy + weight * anchor, rel=1e-5)


def test_refusals(kit, spec):
    with pytest.raises(ConfigError, match="rl_weight: expected a number or a schedule of the step alone"):
        kit.make_module("uniapl", spec, rl_weight=Warmup(Adaptive(1.0), 3))
    with pytest.raises(ConfigError, match="rl_weight: expected a finite number, at least 0, found -1"):
        kit.make_module("uniapl", spec, rl_weight=-1.0)
    for combine in ("advantage", "reward"):
        with pytest.raises(ConfigError, match=f"combine={combine} .* use combine=loss"):
            _fit(kit, kit.make_module("uniapl", spec), 1, kit.make_anchor(combine=combine))
    with pytest.raises(ConfigError, match="demonstrations_per_step=3 does not divide"):
        _fit(kit, kit.make_module("uniapl", spec, demonstrations_per_step=3), 1, accumulate=2)


@pytest.mark.parametrize(("train", "demonstrations", "named"), [([], None, r"data\.train:"), (None, [], r"data\.demonstrations ")])
def test_an_empty_dataset_is_named(kit, spec, train, demonstrations, named):
    full = kit.make_records(4)
    train, demonstrations = (full if part is None else part for part in (train, demonstrations))
    with pytest.raises(DataError, match=f"^{named}.*empty dataset"):
        kit.fit(kit.make_module("uniapl", spec), kit.make_trainer(1), train, demonstrations=demonstrations)
