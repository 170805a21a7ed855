"""Anchored SFT samples responses to the prompts of its demonstrations."""

import pytest

from aapa_lightning.data.datamodule import AapaDataModule
from aapa_lightning.data.prompt_format import PromptFormat
from aapa_lightning.types import Record


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rollouts_answer_the_prompts_that_are_imitated(kit, spec, accumulate):
    """Also when demonstrations are a dataset of their own, of which some are too long."""
    long = [Record(f"Describe {i}", experts=("The boats rest. " * 30,), source=f"d.jsonl:{i}") for i in range(3)]
    demonstrations = [*kit.make_records(7), *long]
    module = kit.make_module("sft", spec, prompt_format=PromptFormat(max_response_tokens=40, overlong="drop"))
    trainer = kit.make_trainer(4, accumulate=accumulate, callbacks=[kit.make_anchor()])
    pairs = []
    plain = module.loss_terms

    def watched(window, micro_step):
        experience, _ = window.sampled_of(micro_step)
        rows, _ = window.demonstrations_of(micro_step)
        pairs.append(([record.prompt for record in experience.rollouts.records[::2]], [row.record.prompt for row in rows]))
        return plain(window, micro_step)

    module.loss_terms = watched
    trainer.fit(module, AapaDataModule([Record("Another task", source="t.jsonl:1")], demonstrations=demonstrations))
    assert len(pairs) == 4 * accumulate
    assert all(prompts == imitated for prompts, imitated in pairs)


def test_rewards_of_sft_are_for_evaluation(kit, spec, same):
    """They are neither scored in training nor do they leave demonstrations out."""

    class Refuses(kit.TextReward):
        def skip_reason(self, record):
            return "cannot score this"

    def run(**options):
        module = kit.make_module("sft", spec, **options)
        kit.fit(module, kit.make_trainer(2, callbacks=[kit.make_anchor()]))
        return module

    scored = run(rewards=[Refuses()])
    assert scored.rewards.rewards[0].seen == []
    same(kit.weights(scored), kit.weights(run()))
