import pytest

from aapa_lightning.data.records import parse_record
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.rewards.compose import RewardSet
from aapa_lightning.rewards.functions import FunctionReward, TRLReward, import_function
from aapa_lightning.types import Record

TEXT = Record(prompt="Hi", extra={"solution": "4"}, key="1", experts=("e",), source="d.jsonl:1")
CHAT = Record(prompt=({"role": "user", "content": "Hi"},), extra={"other": 2}, source="d.jsonl:2")


def test_own_function_from_a_file_and_a_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def shorter(responses, records):\n    return [-len(r) for r in responses]\nnumber = 3\n")
    reward = FunctionReward(f"{tmp_path / 'my_rewards.py'}:shorter")
    assert reward.name == "shorter"
    assert reward(["ab"], [TEXT]) == [-2]
    monkeypatch.syspath_prepend(tmp_path)
    assert FunctionReward("my_rewards:shorter", name="short").name == "short"
    assert FunctionReward("my_rewards.shorter")(["abc"], [TEXT]) == [-3]
    with pytest.raises(ConfigError, match="'my_rewards:number' is not a function but int"):
        FunctionReward("my_rewards:number")


@pytest.mark.parametrize("target", ["no_such_module:f", "json:no_such", "missing.py:f", "json", ":f", "os.path:"])
def test_what_cannot_be_imported_is_named(target):
    with pytest.raises(ConfigError, match=r"expected 'package\.module:function' or 'path/to/file\.py:function'"):
        import_function(target)


def test_trl_function_gets_prompts_completions_and_columns():
    seen = {}

    def function(prompts, completions, solution, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, solution=solution)
        return [None, 2]

    reward = TRLReward(function)
    assert reward(["a", "b"], [TEXT, CHAT]) == [0.0, 2.0]
    assert seen["prompts"] == ["Hi", [{"role": "user", "content": "Hi"}]]
    assert seen["completions"] == ["a", [{"role": "assistant", "content": "b"}]]
    assert seen["solution"] == ["4", None]
    assert seen["other"] == [None, 2]
    assert seen["key"] == ["1", None]
    assert seen["experts"] == [["e"], []]
    assert TRLReward(function, none_value=-1)(["a", "b"], [TEXT, CHAT]) == [-1.0, 2.0]


def test_trl_function_without_kwargs_gets_what_it_names():
    def function(completions, solution):
        return [float(c == s) for c, s in zip(completions, solution, strict=True)]

    reward = TRLReward(function)
    assert reward(["4", "5"], [TEXT, TEXT]) == [1.0, 0.0]
    assert reward.skip_reason(TEXT) is None
    with pytest.raises(DataError, match=r"d\.jsonl:2: reward 'function' needs the columns \['solution'\], found \['other'\]"):
        reward.skip_reason(CHAT)


def test_trl_functions_that_cannot_run_here():
    def needs_ids(prompts, completions, completion_ids):
        return []

    async def waits(completions):
        return []

    with pytest.raises(ConfigError, match=r"needs \['completion_ids'\], which only TRL's trainer has"):
        TRLReward(needs_ids)
    with pytest.raises(ConfigError, match="asynchronous"):
        TRLReward(waits)


def test_trls_own_reward_runs():
    reward = TRLReward("trl.rewards:think_format_reward")
    good, bad = "<think>\nsure\n</think>\nyes", "yes"
    assert RewardSet([reward]).score([good, bad], [CHAT, CHAT])[:, 0].tolist() == [1.0, 0.0]


def test_nan_from_a_trl_function_stops():
    with pytest.raises(DataError, match=r"must return finite numbers, found nan for d\.jsonl:1"):
        RewardSet([TRLReward(lambda completions: [float("nan")], name="n")]).score(["a"], [TEXT])


def test_a_trl_function_sees_every_column_under_its_own_name():
    seen = {}

    def function(prompts, completions, **kwargs):
        seen.update(kwargs)
        return [0.0] * len(prompts)

    rows = [
        {"question": "q", "good": "x", "bad": "y", "answer": "4", "key": 7, "nothing": None},
        {
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}],
            "instruction_id_list": ["a:b"],
            "kwargs": [{"n": 1}],
            "label": True,
        },
    ]
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    records = [parse_record(rows[0], "f:1", columns), parse_record(rows[1], "f:2")]
    TRLReward(function)(["a", "b"], records)
    for name in {name for row in rows for name in row}:
        assert seen[name] == [row.get(name) for row in rows], name
    assert seen["chosen"] == ["x", "Yes"]
    assert "prompt" not in seen
    assert TRLReward(lambda completions, question: [0.0], name="r").skip_reason(records[0]) is None


def test_records_compare_without_their_rows():
    assert parse_record({"prompt": "a", "messages": None}, "f:1") == parse_record({"prompt": "a"}, "f:1")
