from dataclasses import fields

import pytest
import torch

from aapa_lightning.loop.experience import Experience, experience_state, restore_experience, slice_rollouts
from aapa_lightning.types import Rollouts

PROMPTS, RESPONSES = [3, 1, 2, 2], [2, 0, 5, 3]


@pytest.fixture
def experience(make_rollouts) -> Experience:
    rollouts = make_rollouts(PROMPTS, RESPONSES, group=2, truncated=(2,))
    per_token = torch.arange(20.0).reshape(4, 5)
    return Experience(
        rollouts=rollouts,
        loss_mask=rollouts.response_mask & ~rollouts.truncated[:, None],
        rewards=torch.arange(8.0).reshape(4, 2),
        advantages=torch.tensor([1.0, -1.0, 0.5, -0.5]),
        scores=torch.tensor([0.1, 0.2, 0.3, 0.4]),
        anchor_advantages=per_token,
        old_logprobs=per_token + 100,
        ref_logprobs=per_token + 200,
        metrics={"reward": 1.5},
    )


def test_rows_cut_the_padding_that_no_row_of_them_needs(experience) -> None:
    part = experience.rows(slice(0, 2))
    assert len(part) == 2
    assert part.rollouts.prompt_ids.shape == (2, 3)
    assert part.rollouts.response_ids.shape == part.loss_mask.shape == part.anchor_advantages.shape == (2, 2)
    part = experience.rows(slice(2, 4))
    assert part.rollouts.prompt_ids.shape == (2, 2)
    assert part.rollouts.prompt_mask.all()
    assert torch.equal(part.rollouts.prompt_ids, experience.rollouts.prompt_ids[2:, 1:])
    assert torch.equal(part.rollouts.response_ids, experience.rollouts.response_ids[2:])
    assert part.rollouts.texts == ["x" * 5, "x" * 3]
    assert part.rollouts.records == experience.rollouts.records[2:]
    assert part.rollouts.group_ids.tolist() == [1, 1]
    assert part.loss_mask.sum(-1).tolist() == [0, 3]
    assert part.advantages.tolist() == [0.5, -0.5]
    assert part.scores.tolist() == pytest.approx([0.3, 0.4])
    assert part.old_logprobs[0, 0] == 110
    assert part.ref_logprobs[1].tolist() == [215, 216, 217, 218, 219]
    assert part.rewards.tolist() == [[4, 5], [6, 7]]


def test_no_unmasked_value_is_lost(experience) -> None:
    for name in ("anchor_advantages", "old_logprobs", "ref_logprobs"):
        whole = getattr(experience, name)[experience.rollouts.response_mask]
        parts = [experience.rows(slice(i, i + 1)) for i in range(4)]
        assert torch.equal(torch.cat([getattr(part, name)[part.rollouts.response_mask] for part in parts]), whole)


def test_empty_responses_keep_a_column(experience) -> None:
    part = slice_rollouts(experience.rollouts, slice(1, 2))
    assert part.response_ids.shape == (1, 1)
    assert not part.response_mask.any()
    assert part.prompt_ids.shape == (1, 1)


def test_what_is_missing_stays_missing(make_rollouts) -> None:
    rollouts = make_rollouts([1, 1], [2, 1])
    part = Experience(rollouts, rollouts.response_mask, torch.zeros(2, 1), torch.zeros(2)).rows(slice(0, 1))
    assert part.scores is part.anchor_advantages is part.old_logprobs is part.ref_logprobs is None


def assert_equal(found: Experience, expected: Experience) -> None:
    for holder, other, kind in ((found, expected, Experience), (found.rollouts, expected.rollouts, Rollouts)):
        for field in fields(kind):
            a, b = getattr(holder, field.name), getattr(other, field.name)
            if isinstance(b, torch.Tensor):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)
            elif field.name != "rollouts":
                assert a == b


def test_state_survives_a_checkpoint_of_tensors_and_primitives(experience, tmp_path) -> None:
    for number, held in enumerate([experience, experience.rows(slice(1, 3))]):
        path = tmp_path / f"{number}.ckpt"
        torch.save(experience_state(held), path)
        assert_equal(restore_experience(torch.load(path, weights_only=True), held.rollouts.records, "cpu"), held)
