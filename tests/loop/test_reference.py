"""The cache of reference log-probs: what is computed, what is kept, whose it is."""

import json
import threading

import pytest
import torch
from torch import nn

from aapa_lightning.anchor.files import read_tensors, write_tensors
from aapa_lightning.errors import ConfigError
from aapa_lightning.loop import reference
from aapa_lightning.loop.reference import ReferenceCache, ReferencePolicy, response_sums
from aapa_lightning.policy import PolicySpec, load_policy
from aapa_lightning.types import Demonstration, Record


def make_rows(count, seed=0):
    """Responses of unlike lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(5, 250, (4 + 3 * (i % 4) + i % 3,), generator=generator).tolist()
        rows.append(Demonstration(ids, [j >= 2 for j in range(len(ids))], Record("a")))
    return rows


class Counting:
    """Gives the sum of a row's tokens, and remembers the batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        self.batches.append([tuple(row.input_ids) for row in rows])
        return torch.tensor([float(sum(row.input_ids)) for row in rows])

    @property
    def rows(self):
        return [row for batch in self.batches for row in batch]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_rows_are_computed_once_and_found_again(model, tmp_path):
    rows, compute = make_rows(9), Counting()
    cache = ReferenceCache(tmp_path, model)
    assert cache.fill([*rows, rows[0]], compute, batch_size=4) == 9
    assert sorted(compute.rows) == sorted(tuple(row.input_ids) for row in rows)
    assert [len(batch) for batch in compute.batches] == [4, 4, 1]
    widths = [max(map(len, batch)) for batch in compute.batches]
    assert widths == sorted(widths)
    expected = [float(sum(row.input_ids)) for row in rows]
    assert cache(rows).tolist() == expected
    again = ReferenceCache(tmp_path, model)
    assert len(again) == 9
    assert again(rows[::-1]).tolist() == expected[::-1]
    assert again.fill(rows, compute, batch_size=4) == 0
    assert len(compute.batches) == 3


def test_data_that_grows_adds_only_what_is_new(model, tmp_path):
    old, new, compute = make_rows(5), make_rows(4, seed=1), Counting()
    ReferenceCache(tmp_path, model).fill(old, Counting(), batch_size=2)
    cache = ReferenceCache(tmp_path, model)
    assert cache.fill(new + old, compute, batch_size=2) == 4
    assert sorted(compute.rows) == sorted(tuple(row.input_ids) for row in new)
    assert len(ReferenceCache(tmp_path, model)) == 9


def test_prompt_and_response_are_told_apart(model, tmp_path):
    """The same tokens, of which other ones are learnt, are another response."""
    a = Demonstration([5, 6, 7, 8], [False, True, True, True], Record("a"))
    b = Demonstration([5, 6, 7, 8], [False, False, True, True], Record("a"))
    cache = ReferenceCache(tmp_path, model)
    assert cache.fill([a, b], Counting(), batch_size=2) == 2


def test_a_fill_that_dies_keeps_the_chunks_before(model, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK", 4)
    rows, compute = make_rows(10), Counting()

    def dies(part):
        if len(compute.batches) == 4:
            raise RuntimeError("out of memory")
        return compute(part)

    with pytest.raises(RuntimeError, match="out of memory"):
        ReferenceCache(tmp_path, model).fill(rows, dies, batch_size=2)
    assert len(ReferenceCache(tmp_path, model)) == 8


def _on_ranks(folder, model, rows, world_size, computes):
    """Fill a cache as ``world_size`` ranks at once, in threads."""
    barrier, shared, caches, errors = threading.Barrier(world_size), {}, {}, []

    def work(rank):
        def gather(value):
            shared[rank] = value
            barrier.wait()
            values = [shared[i] for i in range(world_size)]
            barrier.wait()
            return values

        caches[rank] = ReferenceCache(folder[rank], model)
        barrier.wait()
        try:
            caches[rank].fill(rows, computes[rank], batch_size=2, rank=rank, world_size=world_size, gather=gather)
        except ConfigError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return caches, errors


def test_ranks_share_the_work_and_batches_do_not_depend_on_their_number(model, tmp_path):
    rows, one, two = make_rows(11), Counting(), [Counting(), Counting()]
    ReferenceCache(tmp_path / "one", model).fill(rows, one, batch_size=2)
    caches, errors = _on_ranks([tmp_path / "two"] * 2, model, rows, 2, two)
    assert not errors
    assert [len(compute.batches) for compute in two] == [3, 3]
    assert sorted(two[0].batches + two[1].batches) == sorted(one.batches)
    assert torch.equal(caches[0](rows), caches[1](rows))
    files = [(tmp_path / name / "reference.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_ranks_that_see_different_folders_are_told(model, tmp_path):
    ReferenceCache(tmp_path / "a", model).fill(make_rows(3), Counting(), batch_size=2)
    _, errors = _on_ranks([tmp_path / "a", tmp_path / "b"], model, make_rows(3), 2, [Counting(), Counting()])
    assert len(errors) == 2
    assert "expected a folder that all ranks see, found [3, 0] entries" in errors[0]


@pytest.mark.parametrize("change", ["weight", "dtype", "precision"])
def test_another_model_is_refused(model, tmp_path, change):
    ReferenceCache(tmp_path, model, "32-true").fill(make_rows(2), Counting(), batch_size=2)
    if change == "weight":
        with torch.no_grad():
            model.weight[0, 0] += 1e-7
    elif change == "dtype":
        model.bfloat16()
    with pytest.raises(ConfigError, match=r"log-probs of another model.*expected fingerprint \w{12}, found \w{12}; name another folder"):
        ReferenceCache(tmp_path, model, "bf16-mixed" if change == "precision" else "32-true")


def _cut(folder):
    file = folder / "reference.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def _lost(folder):
    (folder / "reference.safetensors").unlink()


def _not_json(folder):
    (folder / "reference.json").write_text("{")


def _no_keys(folder):
    write_tensors(folder / "reference.safetensors", {"logprobs": torch.zeros(2)})


def _other_keys(folder):
    write_tensors(folder / "reference.safetensors", {"logprobs": torch.zeros(2), "keys": torch.zeros(2, 16)})


def _other_count(folder):
    tensors = read_tensors(folder / "reference.safetensors")
    write_tensors(folder / "reference.safetensors", tensors | {"logprobs": torch.zeros(3)})


def _flipped(folder):
    content = bytearray((folder / "reference.safetensors").read_bytes())
    value = read_tensors(folder / "reference.safetensors")["logprobs"].numpy().tobytes()
    content[content.index(value)] ^= 1  # the last digit of a log-prob
    (folder / "reference.safetensors").write_bytes(content)


@pytest.mark.parametrize("damage", [_cut, _lost, _not_json, _no_keys, _other_keys, _other_count, _flipped])
def test_a_damaged_folder_is_refused_and_named(model, tmp_path, damage):
    ReferenceCache(tmp_path, model).fill(make_rows(2), Counting(), batch_size=2)
    damage(tmp_path)
    with pytest.raises(ConfigError, match="reference"):
        ReferenceCache(tmp_path, model)


def test_a_folder_without_a_fingerprint_is_made_again(model, tmp_path):
    """What a crash between the two files leaves."""
    ReferenceCache(tmp_path, model).fill(make_rows(2), Counting(), batch_size=2)
    (tmp_path / "reference.json").unlink()
    cache = ReferenceCache(tmp_path, model)
    assert cache.fill(make_rows(3), Counting(), batch_size=2) == 3
    assert json.loads((tmp_path / "reference.json").read_text())["responses"] == 3


def test_the_cache_has_what_the_live_policy_says(tiny_model_dir, tmp_path):
    policy, tokenizer = load_policy(PolicySpec(str(tiny_model_dir)))
    rows = make_rows(13)
    live = ReferencePolicy(policy, tokenizer.pad_token_id)
    expected = live(rows)
    kept = ReferencePolicy(policy, tokenizer.pad_token_id, ReferenceCache(tmp_path, policy))
    kept.remember(iter(rows), batch_size=3)
    assert kept.model is None
    torch.testing.assert_close(kept(rows), expected, rtol=0, atol=1e-5)
    again = ReferencePolicy(policy, tokenizer.pad_token_id, ReferenceCache(tmp_path, policy))
    again.remember(rows, batch_size=5)
    assert torch.equal(again(rows), kept(rows))
    with pytest.raises(ConfigError, match="second fit brought responses that the first had not"):
        kept.remember(make_rows(2, seed=7), batch_size=2)


def test_a_reference_is_frozen_and_in_evaluation_mode(tiny_model_dir):
    policy, tokenizer = load_policy(PolicySpec(str(tiny_model_dir)))
    live = ReferencePolicy(policy.train(), tokenizer.pad_token_id)
    assert not policy.training
    assert not any(p.requires_grad for p in policy.parameters())
    assert not live(make_rows(2)).requires_grad


def test_sums_are_over_the_response_alone(tiny_model_dir):
    policy, tokenizer = load_policy(PolicySpec(str(tiny_model_dir)))
    rows = make_rows(3)
    sums, lengths, (logprobs, mask) = response_sums(policy, rows, tokenizer.pad_token_id, "cpu")
    assert lengths.tolist() == [len(row.input_ids) - 2 for row in rows]
    for row, value in zip(rows, sums, strict=True):
        ids = torch.tensor([row.input_ids])
        expected = policy(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[1:].sum()
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((logprobs * mask).sum(-1), sums)
