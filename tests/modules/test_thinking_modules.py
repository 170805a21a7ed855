"""Policies whose prompts open a thought: what rewards, judges and predictions make of it."""

from aapa_lightning.data.encode import PromptFormat
from aapa_lightning.types import Record

RECORDS = [Record(f"Describe the harbor {i}. <think>\n", source=f"d.jsonl:{i}") for i in range(4)]
PLAIN = PromptFormat(chat_template="never")


def test_a_cut_thought_is_an_empty_answer_in_training_and_validation(kit, spec):
    for option, empty in ((False, True), (True, False)):
        reward, judge = kit.TextReward(), kit.TextReward()
        judge.name = "judge"
        module = kit.make_module("grpo", spec, rewards=[reward], judges=[judge], prompt_format=PLAIN, score_thinking=option)
        trainer = kit.make_trainer(1)
        kit.fit(module, trainer, data=RECORDS, val=RECORDS[:2])
        for seen in (reward.seen, judge.seen):
            assert seen
            assert all((text == "") is empty for _, text in seen)


def test_predictions_say_where_the_prompt_opens_a_thought(kit, spec):
    from aapa_lightning.data.datamodule import AapaDataModule

    module = kit.make_module("sft", spec, prompt_format=PLAIN)
    plain = Record("Describe the harbor.", source="d.jsonl:9")
    batches = kit.make_trainer().predict(module, AapaDataModule([*RECORDS[:2], plain]))
    assert [row.get("prompt_end") for rows in batches for row in rows] == ["<think>", "<think>", None]
