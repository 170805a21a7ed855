"""One rule for what of a response is judged, in every room that judges."""

import json
from dataclasses import replace

import pytest
import torch

from aapa_lightning.anchor.polar import answer_of
from aapa_lightning.anchor.thinking import answer_view
from aapa_lightning.cli import main
from aapa_lightning.data.examples import build_examples
from aapa_lightning.data.pairs import Scored, best
from aapa_lightning.data.responses import read_responses
from aapa_lightning.data.rows import answer_row
from aapa_lightning.data.tokenizer import train_tokenizer
from aapa_lightning.errors import ConfigError
from aapa_lightning.loop.evaluate import predicted_rows
from aapa_lightning.rewards.base import Reward
from aapa_lightning.rewards.compose import RewardSet
from aapa_lightning.rewards.functions import FunctionReward, TRLReward
from aapa_lightning.rewards.reward_model import RewardModelReward
from aapa_lightning.rewards.text import LengthReward, RegexReward, SoftOverlongReward
from aapa_lightning.rewards.verifiable import InstructionReward
from aapa_lightning.rollout.base import RolloutRequest
from aapa_lightning.rollout.collate import Response, collate
from aapa_lightning.thinking import Judged, Thinking
from aapa_lightning.types import Instruction, Record

OPEN = "<|im_start|>assistant\n<think>\n"
ANSWER, THOUGHT = "Boats rest here.", "<think>\nFine, no commas then.\n</think>\n\nBoats rest here."
RECORD = Record("p", instructions=(Instruction("punctuation:no_comma", {}),), experts=("<think>a, b</think>One.",))


@pytest.mark.parametrize(
    ("text", "prompt_end", "answer"),
    [
        ("Let me see", OPEN, ""),  # cut off inside a thought that the prompt opened
        ("Let me see</think>Yes.", OPEN, "Yes."),
        ("Let me see</think>Yes.", "assistant\n", "Yes."),
        ("<think>again</think>Yes.", OPEN, "Yes."),
        ("", OPEN, ""),
        ("</think>Yes.", OPEN, "Yes."),
        ("Yes.", "<think>\n\n</think>\n\n", "Yes."),  # the prompt's thought is closed
        ("Yes.", "Use the <think> tag.\nassistant\n", "Yes."),
        ("<think>\n\n</think>\n\nYes.", "", "\n\nYes."),
        ("<think></think>", "", ""),
        ("<think>a</think>\n<think>b</think>Yes.", "", "Yes."),
        ("<think></think>\n\n<think>cut", "", ""),
        ("a</think><think>b</think>Yes.", OPEN, "Yes."),
        ("<think>a<think>b</think>c</think>Yes.", "", "Yes."),
        ("<think>the tag <think> opens it</think>Yes.", "", "Yes."),
        ("<think>a</think>Yes.<think>b</think>", "", "Yes.<think>b</think>"),
        ("<think>a</think>b</think>c", "", "b</think>c"),
        ("Yes.<think>b", "", "Yes.<think>b"),
    ],
)
def test_where_thinking_ends(text, prompt_end, answer):
    assert Thinking().answer(text, prompt_end) == answer
    assert Thinking(score=True).answer(text, prompt_end) == text


def test_tags_of_ones_own_and_what_was_cut_already():
    other = Thinking(opens="[THINK]", closes="[/THINK]")
    assert other.answers(["[THINK]a[/THINK]b", "<think>a</think>b", "a"], ["", "", "x[THINK]"]) == ["b", "<think>a</think>b", ""]
    assert Thinking().answer(Judged("b</think>c")) == "b</think>c"
    assert (Thinking(True).setting(), Thinking().setting(), other.setting()["opens"]) == (True, False, "[THINK]")
    for tags in (("", "x"), ("x", "x"), ("x", " ")):
        with pytest.raises(ConfigError, match="two different tags"):
            Thinking(False, *tags)


class Seen(Reward):
    name = "seen"

    def __init__(self):
        self.texts = []

    def __call__(self, responses, records):
        self.texts += responses
        return [0.0] * len(responses)


def test_rewards_called_by_themselves_judge_answers():
    assert InstructionReward()([ANSWER, THOUGHT], [RECORD] * 2) == [1.0, 1.0]
    assert InstructionReward(score_thinking=True)([ANSWER, THOUGHT], [RECORD] * 2) == [1.0, 0.0]
    assert LengthReward(maximum=3)([THOUGHT], [RECORD]) == [1.0]
    assert SoftOverlongReward(4, 1)([THOUGHT], [RECORD]) == [0.0]
    assert SoftOverlongReward(4, 1, score_thinking=True)([THOUGHT], [RECORD]) == [-1.0]
    assert RegexReward("commas")([THOUGHT], [RECORD]) == [0.0]
    assert RegexReward("commas", score_thinking=True)([THOUGHT], [RECORD]) == [1.0]
    assert FunctionReward(lambda texts, _: [float(len(text)) for text in texts], name="f")([THOUGHT], [RECORD]) == [18.0]


def test_a_set_shows_every_reward_the_answer_and_knows_the_prompts_end():
    seen, texts, ends = Seen(), ["Let me, see", "Let me, see</think>No", "No"], [OPEN, OPEN, ""]
    rewards = RewardSet([seen, InstructionReward(), RegexReward("Let", score_thinking=True)])
    columns = rewards.score(texts, [RECORD] * 3, ends)
    assert seen.texts == ["", "No", "No"]
    assert columns[:, 1].tolist() == [0.0, 1.0, 1.0]  # an empty answer follows nothing
    assert columns[:, 2].tolist() == [1.0, 1.0, 0.0]
    everything = Seen()
    RewardSet([everything, InstructionReward()], score_thinking=True).score(texts, [RECORD] * 3, ends)
    assert everything.texts == texts


def test_functions_for_trl_see_what_trl_shows_them():
    whole, answers = [], []
    TRLReward(lambda completions: whole.extend(completions) or [0.0], name="a")([THOUGHT], [RECORD])
    TRLReward(lambda completions: answers.extend(completions) or [0.0], name="b", score_thinking=False)([THOUGHT], [RECORD])
    assert (whole, [text.strip() for text in answers]) == ([THOUGHT], [ANSWER])
    assert type(answers[0]) is str


def test_reward_models_judge_what_the_reward_gives_them():
    class Scorer:
        needs_experts = False

        def raw(self, responses, records):
            self.seen = [answer_of(text) for text in responses]
            return torch.zeros(len(responses))

    scorer = Scorer()
    for option, expected in ((None, ANSWER), (True, THOUGHT)):
        RewardSet([RewardModelReward(scorer, score_thinking=option)]).score([THOUGHT], [RECORD])
        assert scorer.seen == [expected]


def drawn(prompt, *texts):
    tokenizer = train_tokenizer(["abc"], vocab_size=300)
    request = RolloutRequest(tokenizer(prompt)["input_ids"], RECORD, 0, len(texts))
    responses = [Response(ids := tokenizer(text)["input_ids"], [0.0] * len(ids), True) for text in texts]
    return collate([request] * len(texts), responses, tokenizer, "cpu")


def test_rollouts_remember_how_their_prompts_end():
    rollouts = drawn("user: hi\n" * 9 + "<think>\n", "Let me", "Let</think>Yes.")
    assert all(end.endswith("\n<think>\n") and len(end) <= 16 for end in rollouts.prompt_ends)
    assert answer_view(rollouts).rollouts.texts == ["", "Yes."]
    assert answer_view(rollouts, Thinking(True)).rollouts.texts == rollouts.texts


def test_prediction_files_keep_it_and_so_does_what_is_made_of_them(tmp_path):
    rows = predicted_rows(drawn("<think>\n", "Let me, see", "Hm</think>Yes, so."), 2, 1.0, Thinking())
    assert [row["prompt_end"] for row in rows] == ["<think>", "<think>"]
    assert "prompt_end" not in predicted_rows(drawn("assistant\n", "Yes."), 1, 1.0, Thinking())[0]
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    found = read_responses(path)
    assert [response.prompt_end for response in found] == ["<think>", "<think>"]
    assert answer_row(RECORD, found[0])["prompt_end"] == "<think>"
    assert [example.prompt_end for example in build_examples([RECORD], [str(path)], other_prompts=0, seed=0)] == ["", "<think>", "<think>"]
    finished = [Scored(replace(response, truncated=False), score) for response, score in zip(found, (2.0, 1.0), strict=True)]
    assert best(finished).score == 1.0  # the other has no answer


def test_evaluate_judges_answers(tmp_path, capsys):
    prompts, responses, out = (tmp_path / name for name in ("p.jsonl", "r.jsonl", "v.jsonl"))
    texts = [(THOUGHT, ""), ("A, b", "<think>"), ("A, b</think>c", "<think>"), ("[T]a, b[/T]c", "")]
    prompt = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "prompt": "p"}
    prompts.write_text("\n".join(json.dumps({"key": i, **prompt}) for i in range(len(texts))))
    responses.write_text("\n".join(json.dumps({"key": i, "response": t, "prompt_end": end}) for i, (t, end) in enumerate(texts)))

    def verdicts(*options):
        assert main(["evaluate", "--prompts", str(prompts), "--responses", str(responses), "--out", str(out), *options]) == 0
        return [json.loads(line)["strict"] for line in out.read_text().splitlines()]

    assert verdicts() == [[True], [False], [True], [False]]
    assert verdicts("--thinking-tags", "[T]", "[/T]") == [[False], [False], [False], [True]]
    assert verdicts("--score-thinking") == [[False]] * 4
