"""A discriminator that is interrupted and resumed is the one of a run that went on, bit for bit, from any optimiser step."""

from __future__ import annotations

import json
import random

import pytest
import torch

from aapa_lightning.errors import ConfigError
from aapa_lightning.modules.discriminator import DiscriminatorModule
from aapa_lightning.modules.discriminator_data import DiscriminatorData, ShuffledBatches, place_in_epoch
from aapa_lightning.types import Record

GOOD, BAD = ("The boats rest calmly", "The gulls call softly"), ("zq xx kk", "qq zz 000")
#: Options of the module, of the trainer, of the data, and the optimiser steps of an epoch.
CASES = {
    "cross_entropy": ({}, {}, {}, 4),
    "bradley_terry": ({"loss": "bradley_terry", "folds": 3}, {}, {"other_prompts": 0.5}, 6),
    "accumulated": ({"folds": 2, "select": "last"}, {"accumulate": 3}, {}, 2),
    "without held-out prompts": ({"hidden_units": 0, "label_smoothing": 0.1}, {"gradient_clip_val": 0.1}, {"val_fraction": 0.0}, 5),
    "validated often": ({"loss": "bradley_terry"}, {"val_check_interval": 2}, {}, 4),
    "sanity checked": ({"features": ("sentence", "reference")}, {"num_sanity_val_steps": 1, "limit_train_batches": 3}, {}, 3),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Records of 20 prompts with two experts each, and a file of bad responses."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)

    def text(words):
        return " ".join(f"{rng.choice(words)} {rng.choice('abcdef')}." for _ in range(rng.randint(1, 3)))

    records = [Record(f"Describe {i}.", experts=(f"{text(GOOD)} a{i}.", f"{text(GOOD)} b{i}."), source=f"d:{i}") for i in range(20)]
    bad = [{"prompt": record.prompt, "response": f"{text(BAD)} c{i}."} for i, record in enumerate(records)]
    (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    return {"train": records, "negatives": [str(folder / "bad.jsonl")], "other_prompts": 0.0, "batch_size": 12}


class Run:
    """Runs of one configuration."""

    def __init__(self, kit, encoder, source, case):
        self.kit = kit
        self.encoder, (self.options, self.trainer, data, self.steps) = str(encoder), CASES[case]
        self.source = source | data

    def __call__(self, folder, ckpt=None, epochs=3, max_steps=-1, batches=(), data=None, **options):
        torch.manual_seed(int(torch.randint(1 << 30, ())))  # whatever the process has drawn before
        module = DiscriminatorModule(self.encoder, **({"hidden_units": 8, "lr": 1e-2, "resamples": 5} | self.options | options))
        rows = self.kit.Rows()
        trainer = self.kit.make_trainer(
            max_steps,
            max_epochs=epochs,
            callbacks=[self.kit.SaveAt(folder, batches=batches)],
            logger=rows,
            default_root_dir=folder,
            **self.trainer,
        )
        trainer.fit(module, datamodule=DiscriminatorData(**(self.source | (data or {}))), ckpt_path=ckpt)
        state = trainer.strategy.optimizer_state(trainer.optimizers[0])
        module.export(folder / "export")
        return {"module": module, "optimizer": state, "rows": rows.rows, "export": folder / "export"}


def merged(rows, first=0):
    """Rows of a log by step, as ``metrics.csv`` has them; without Lightning's own epoch counter."""
    steps: dict[int, dict[str, float]] = {}
    for step, values in rows:
        if step >= first:
            steps.setdefault(step, {}).update({name: value for name, value in values.items() if name != "epoch"})
    return {step: values for step, values in steps.items() if values}


def assert_equal(whole, again, first=0):
    torch.testing.assert_close(again["module"].head.state_dict(), whole["module"].head.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(again["optimizer"], whole["optimizer"], rtol=0, atol=0)
    assert again["module"].metrics == whole["module"].metrics
    assert again["module"].discriminator().fingerprint() == whole["module"].discriminator().fingerprint()
    for file in whole["export"].iterdir():
        assert (again["export"] / file.name).read_bytes() == file.read_bytes()
    assert merged(again["rows"], first) == merged(whole["rows"], first)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_resume_from_every_step(kit, tiny_model_dir, source, tmp_path, case):
    resume_from(kit, tiny_model_dir, source, tmp_path, case, range(1, 3 * CASES[case][3] + 1))


@pytest.mark.parametrize("case", ["cross_entropy", "bradley_terry"])
def test_resume_at_the_first_step_inside_and_at_the_last_of_an_epoch(kit, tiny_model_dir, source, tmp_path, case):
    steps = CASES[case][3]
    resume_from(kit, tiny_model_dir, source, tmp_path, case, (1, steps - 1, steps, 3 * steps))


def resume_from(kit, tiny_model_dir, source, tmp_path, case, steps):
    run = Run(kit, tiny_model_dir, source, case)
    whole = run(tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("step=*.ckpt"))) == 3 * run.steps
    assert sum("train/loss" in values for values in merged(whole["rows"]).values()) == 3
    for step in steps:
        # the checkpoint of an epoch's last step is taken before the validation, which the resumed run makes up for
        assert_equal(whole, run(tmp_path / "again", ckpt=tmp_path / "whole" / f"step={step}.ckpt"), first=step)


def test_many_interruptions(kit, tiny_model_dir, source, tmp_path):
    run = Run(kit, tiny_model_dir, source, "bradley_terry")
    whole = run(tmp_path / "whole")
    rows, ckpt = [], None
    for step in (1, 5, 7, 12, 17, 18):
        part = run(tmp_path / "parts", ckpt=ckpt, max_steps=step)
        rows += part["rows"]
        ckpt = tmp_path / "parts" / f"step={step}.ckpt"
    assert_equal(whole, part | {"rows": rows})


def test_checkpoint_in_the_middle_of_an_accumulation_rewinds(kit, tiny_model_dir, source, tmp_path):
    run = Run(kit, tiny_model_dir, source, "accumulated")
    whole = run(tmp_path / "whole", batches=range(1, 8))
    files = sorted((tmp_path / "whole").glob("batch=*.ckpt"))
    assert len(files) == 7
    for file in files:
        step = torch.load(file, weights_only=True)["global_step"]
        assert_equal(whole, run(tmp_path / "again", ckpt=file), first=step)


def test_a_continued_head_resumes(kit, tiny_model_dir, source, tmp_path):
    run = Run(kit, tiny_model_dir, source, "cross_entropy")
    start = run(tmp_path / "start", epochs=1)["export"]
    whole = run(tmp_path / "whole", start=str(start), epochs=2)
    for step in (1, 4, 6):
        again = run(tmp_path / "again", start=str(start), epochs=2, ckpt=tmp_path / "whole" / f"step={step}.ckpt")
        assert_equal(whole, again, first=step)


def test_more_epochs_for_a_finished_run(kit, tiny_model_dir, source, tmp_path):
    run = Run(kit, tiny_model_dir, source, "cross_entropy")
    run(tmp_path / "short", epochs=2)
    assert_equal(run(tmp_path / "whole"), run(tmp_path / "again", ckpt=tmp_path / "short" / "step=8.ckpt"), first=8)


def test_other_data_or_sizes_are_refused(kit, tiny_model_dir, source, tmp_path):
    run = Run(kit, tiny_model_dir, source, "cross_entropy")
    run(tmp_path, epochs=1)
    for change in ({"batch_size": 6}, {"seed": 1}, {"train": source["train"][::-1]}):
        with pytest.raises(ConfigError, match=r"resume: the checkpoint was taken with other data or sizes: .* -> "):
            run(tmp_path / "again", ckpt=tmp_path / "step=2.ckpt", data=change)


def test_every_epoch_is_a_pass_in_an_order_of_its_own():
    units = [torch.tensor([2 * i, 2 * i + 1]) for i in range(11)]
    epochs = [list(ShuffledBatches(units, 4, 7, position=lambda e=epoch: (e, 0))) for epoch in range(3)]
    assert [[len(batch) for batch in batches] for batches in epochs] == [[8, 8, 6]] * 3
    orders = [torch.cat(batches).tolist() for batches in epochs]
    assert all(sorted(order) == list(range(22)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    rest = list(ShuffledBatches(units, 4, 7, position=lambda: (1, 2)))
    assert [batch.tolist() for batch in rest] == [epochs[1][2].tolist()]
    assert torch.cat(list(ShuffledBatches(units, 4, 8))).tolist() != orders[0]


def test_ranks_share_an_epoch_and_take_equal_numbers_of_steps():
    units = torch.arange(10)[:, None]
    shares = [list(ShuffledBatches(units, 2, 0, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(share) for share in shares] == [3, 3] == [len(ShuffledBatches(units, 2, 0, rank=0, world_size=2))] * 2
    turns = [batch for pair in zip(*shares, strict=True) for batch in pair]
    assert sorted(torch.cat(turns[:5]).tolist()) == list(range(10))
    assert turns[5].tolist() == turns[0].tolist()


@pytest.mark.parametrize(("batches", "accumulate", "expected"), [(4, 1, (1, 1)), (5, 2, (1, 4)), (2, 5, (5, 0))])
def test_place_in_epoch(batches, accumulate, expected):
    class At:
        global_step, num_training_batches, accumulate_grad_batches = 5, batches, accumulate

    assert place_in_epoch(At) == expected
