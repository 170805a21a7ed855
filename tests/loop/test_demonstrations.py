import torch

from aapa_lightning.loop.demonstrations import collate_demonstrations, count_demonstrations, demonstration_logprobs
from aapa_lightning.reduce import count_step
from aapa_lightning.types import Demonstration, Record

RECORD = Record("p", ("e",))
ROWS = [
    Demonstration([5, 6, 7, 8], [False, False, True, True], RECORD),
    Demonstration([0, 0], [True, True], RECORD),  # the padding id may be text, and nothing predicts the first token
    Demonstration([9, 4, 3], [False, False, False], RECORD),
]


def test_padding_is_on_the_right_and_masks_come_from_lengths() -> None:
    batch = collate_demonstrations(ROWS, pad_token_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [0, 0, 0, 0], [9, 4, 3, 0]]
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, False, False], [True, True, True, False]]
    assert batch.response_mask.tolist() == [[False, False, True, True], [False, True, False, False], [False] * 4]


def test_counts_are_those_of_the_batch() -> None:
    for rows in (ROWS, ROWS[:1], ROWS[2:]):
        assert torch.equal(count_demonstrations(rows), count_step(collate_demonstrations(rows, 0).response_mask[:, 1:]))
    assert count_demonstrations(ROWS).tolist() == [3, 2]
    assert count_demonstrations([]).tolist() == [0, 0]


def test_logprobs_are_the_models_whatever_the_padding(tiny_model_dir) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for pad in (0, 2):
        logprobs, mask = demonstration_logprobs(model, ROWS, pad, "cpu")
        assert logprobs.requires_grad
        assert mask.tolist() == [[False, True, True], [True, False, False], [False] * 3]
        for row, found, learned in zip(ROWS, logprobs, mask, strict=True):
            ids = torch.tensor(row.input_ids)
            alone = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            used = learned[: len(alone)]
            torch.testing.assert_close(found[: len(alone)][used], alone[used], atol=1e-5, rtol=0)
        assert (logprobs[~mask] == 0).all()
