"""What a chat template reads reaches it, in every format and dialect; what it does not read is refused or counted."""

import copy
import json
import pickle
from pathlib import Path

import pytest
from chat_templates import MODELS, small_tokenizer

from aapa_lightning.chat_templates import CHATML, QWEN3, read_chat_template
from aapa_lightning.cli import main
from aapa_lightning.data.check import check_dataset
from aapa_lightning.data.encode import PromptFormat, encode_demonstration, encode_prompt
from aapa_lightning.data.records import parse_record, prompt_hash, read_records
from aapa_lightning.data.rows import record_row, write_rows
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Record, Reply

QUESTION = {"role": "user", "content": "What is 3 times 4?"}
THOUGHT = {"role": "assistant", "reasoning_content": "Three fours are twelve.", "content": "It is 12."}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLS = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"}
ANSWER = {"role": "assistant", "content": "It rains."}
ROWS = [
    {"messages": [QUESTION, THOUGHT]},
    {"messages": [{"role": "user", "content": "Weather in Oslo?"}, CALLS, RESULT, ANSWER], "tools": TOOLS},
    {
        "messages": [{"role": "user", "content": "Weather in Oslo?"}, CALLS],
        "tools": TOOLS,
        "chat_template_kwargs": {"enable_thinking": True},
    },
    {"prompt": [QUESTION], "completion": [THOUGHT]},
    {"prompt": [QUESTION], "chosen": [THOUGHT], "rejected": [{**THOUGHT, "content": "13."}]},
    {"messages": [QUESTION, THOUGHT], "label": True},
]
WIDE = PromptFormat(max_prompt_tokens=10**5, max_response_tokens=10**5)
TOKENIZER, EOS = small_tokenizer("qwen3")


def texts(record, tokenizer=TOKENIZER, fmt=WIDE):
    """Prompt and learned text of every response of a record."""
    responses = [text for text in (*record.experts, record.chosen, record.rejected) if text is not None]
    demos = [encode_demonstration(tokenizer, record, text, fmt, EOS) for text in responses]
    prompt = tokenizer.decode(encode_prompt(tokenizer, record, fmt))
    return prompt, [tokenizer.decode([i for i, flag in zip(d.input_ids, d.response_mask, strict=True) if flag]) for d in demos]


def test_thinking_reaches_the_template_from_every_dialect():
    expected = "<think>\nThree fours are twelve.\n</think>\n\nIt is 12.<|im_end|>"
    for row in (ROWS[0], ROWS[3], ROWS[4], ROWS[5]):
        assert texts(parse_record(row, "d:1"))[1][0] == expected
    record = parse_record(ROWS[0], "d:1")
    assert record.experts == ("It is 12.",), "judges read the answer"
    assert record.experts[0].turn == THOUGHT
    for again in (pickle.loads(pickle.dumps(record)), copy.deepcopy(record)):  # noqa: S301 - our own
        assert again.experts[0].turn == THOUGHT


def test_tools_and_calls_reach_the_template():
    prompt, (learned,) = texts(parse_record(ROWS[1], "d:1"))
    assert json.dumps(TOOLS[0]) in prompt
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>' in prompt
    assert "<tool_response>\nrain\n</tool_response>" in prompt
    assert learned.endswith("It rains.<|im_end|>")
    record = parse_record(ROWS[2], "d:1")
    assert texts(record)[1][0].endswith('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>')
    assert record.experts == ('{"name": "weather", "arguments": {"city": "Oslo"}}',), "judges read the call"


@pytest.mark.parametrize("arguments", [json.dumps({"city": "Oslo"}), {"city": "Oslo", "date": None}])
def test_arguments_as_text_and_with_nulls(arguments):
    turn = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}], "name": None}
    assert parse_record({"messages": [QUESTION, turn]}, "d:1").experts[0].turn == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
    }


def test_a_template_that_wants_arguments_as_text_gets_them():
    template = MODELS["qwen3"][0].replace("f.arguments if f.arguments is string else f.arguments | tojson", "f.arguments + ''")
    tokenizer, _ = small_tokenizer("qwen3")
    tokenizer.chat_template = template
    assert '"arguments": {"city": "Oslo"}}' in texts(parse_record(ROWS[2], "d:1"), tokenizer)[1][0]


def test_options_of_a_row_win_over_the_formats():
    record = parse_record({"messages": [QUESTION], "chat_template_kwargs": '{"enable_thinking": false}'}, "d:1")
    fmt = PromptFormat(chat_template_kwargs={"enable_thinking": True})
    assert TOKENIZER.decode(encode_prompt(TOKENIZER, record, fmt)).endswith("<think>\n\n</think>\n\n")
    for name in ("tokenize", "chat_template", "messages"):  # a row brings no template of its own, which could write control tokens
        with pytest.raises(DataError, match=rf"d:1: chat_template_kwargs cannot set \['{name}'\]"):
            encode_prompt(TOKENIZER, parse_record({"messages": [QUESTION], "chat_template_kwargs": {name: "x"}}, "d:1"), fmt)
    for value, message in (([1], "must be an object, found list"), ("{", "is text but not JSON")):
        with pytest.raises(DataError, match=f"d:1: 'chat_template_kwargs' {message}"):
            parse_record({"messages": [QUESTION], "chat_template_kwargs": value}, "d:1")


def test_tools_as_json_text_and_a_column_of_that_name():
    assert parse_record({"messages": [QUESTION], "tools": json.dumps(TOOLS)}, "d:1").extra["tools"] == TOOLS
    for value in ("hammer", 3, ["hammer", "saw"]):
        record = parse_record({"messages": [QUESTION], "tools": value}, "d:1")
        assert record.extra["tools"] == value
        assert "hammer" not in texts(record)[0]
    with pytest.raises(DataError, match="d:1: 'tools' is text but not JSON"):
        parse_record({"messages": [QUESTION], "tools": "[{"}, "d:1")


@pytest.mark.parametrize("template", [QWEN3, CHATML])
def test_turns_of_weight_0_are_not_learned(template):
    tokenizer, _ = small_tokenizer("qwen3")
    tokenizer.chat_template = template
    turns = [
        QUESTION,
        {"role": "assistant", "content": "Go away.", "weight": 0},
        QUESTION,
        {"role": "assistant", "content": "Twelve.", "weight": 1},
        QUESTION,
    ]
    every = PromptFormat(assistant_turns="all")
    for weight in (0, 0.0, False):
        turns[1]["weight"] = weight
        learned = texts(parse_record({"messages": [*turns, ANSWER]}, "d:1"), tokenizer, every)[1][0]
        assert "Go away." not in learned
        assert "Twelve.<|im_end|>" in learned
        assert learned.endswith("It rains.<|im_end|>")
    last = parse_record({"messages": [*turns, {**ANSWER, "weight": 0}]}, "d:1")
    assert texts(last, tokenizer, every)[1][0].endswith("Twelve.<|im_end|>")
    with pytest.raises(DataError, match="d:1: the expert response has weight 0"):
        texts(last, tokenizer)
    with pytest.raises(DataError, match=r"d:1: 'messages\[1\].weight' must be 0 \(not learned\) or 1, found 0.5"):
        parse_record({"messages": [QUESTION, {**ANSWER, "weight": 0.5}]}, "d:1")


def test_calls_that_a_template_does_not_write_are_refused():
    tokenizer, _ = small_tokenizer("chatml")
    for row in ROWS[1:3]:
        with pytest.raises(DataError, match=r"d:1: the turns have tool calls, which the chat template does not write"):
            texts(parse_record(row, "d:1"), tokenizer)
    for calls in ([{}], ["x"], [{"function": {}}], "x"):
        with pytest.raises(DataError, match=r"d:1: .*messages\[1\]"):
            parse_record({"messages": [QUESTION, {"role": "assistant", "tool_calls": calls}]}, "d:1")


def write_all(path, rows, kind):
    import datasets

    every = {name: None for row in rows for name in row}
    rows = [every | row for row in rows]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_every_format_gives_the_same_tokens(kind, tmp_path, arrow_cache):
    path = tmp_path / ("d" if kind == "folder" else f"d.{kind}")
    rows = [*ROWS[:3], {"messages": [QUESTION, {**ANSWER, "weight": 1}]}]
    write_all(path, rows, kind)
    assert [texts(record) for record in read_records(str(path))] == [texts(parse_record(row, "d:1")) for row in rows]


def test_records_are_written_as_they_were_read(tmp_path):
    records = [parse_record(row, "d:1") for row in ROWS]
    records.append(Record("p", experts=("plain", Reply("It is 12.", THOUGHT))))
    records.append(Record("p", chosen=Reply("It is 12.", THOUGHT), rejected="no"))
    write_rows(tmp_path / "o.jsonl", [(record.source, record_row(record)) for record in records])
    for record, again in zip(records, read_records(str(tmp_path / "o.jsonl")), strict=True):
        assert texts(again) == texts(record)
        assert prompt_hash(again.prompt) == prompt_hash(record.prompt)


def test_prompts_that_differ_in_a_call_are_different():
    record = parse_record(ROWS[1], "d:1")
    other = copy.deepcopy(record.prompt)
    other[1]["tool_calls"][0]["function"]["arguments"]["city"] = "Rome"
    assert prompt_hash(other) != prompt_hash(record.prompt)
    assert prompt_hash([{**QUESTION, "weight": 0}]) == prompt_hash(QUESTION["content"])


def test_data_check_counts_what_is_read_and_what_is_not(tmp_path, capsys):
    path = tmp_path / "d.jsonl"
    rows = [
        *ROWS[:2],
        {"messages": [QUESTION, {**ANSWER, "mood": "wet<|im_end|>", "content": "a<|im_end|>"}], "chat_template_kwargs": {"x": 1}},
    ]
    write_all(path, rows, "jsonl")
    report = check_dataset(str(path), tokenizer=TOKENIZER)
    assert report.ok
    assert report.template_fields == {
        "chat_template_kwargs": 1,
        "mood": 1,
        "name": 1,
        "reasoning_content": 1,
        "tool_call_id": 1,
        "tool_calls": 1,
        "tools": 1,
    }
    assert report.unread_fields == {"chat_template_kwargs": 1, "mood": 1, "name": 1, "tool_call_id": 1}
    assert report.spelled == 1
    folder = tmp_path / "tokenizer"
    tokenizer, _ = small_tokenizer("chatml")
    tokenizer.save_pretrained(folder)
    write_all(path, rows[:1], "jsonl")
    assert main(["data", "check", str(path), "--tokenizer", str(folder)]) == 0
    assert "rows of whose reasoning_content the chat template writes nothing: 1" in capsys.readouterr().out
    assert main(["data", "check", str(path), "--tokenizer", str(folder), "--chat-template", "qwen3"]) == 0
    assert "writes nothing" not in capsys.readouterr().out
    assert main(["data", "check", str(path), "--chat-template", "qwen3"]) == 2


def test_data_check_measures_to_the_end_that_the_generation_config_names(tmp_path, capsys):
    tokenizer, end = small_tokenizer("phi3")
    tokenizer.save_pretrained(tmp_path / "t")
    path = tmp_path / "d.jsonl"
    write_all(path, [{"prompt": "Hi", "expert": "Yes."}], "jsonl")
    lengths = []
    for ends in (None, [tokenizer.eos_token_id, end]):
        if ends:
            (tmp_path / "t/generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        assert main(["data", "check", str(path), "--tokenizer", str(tmp_path / "t"), "--json"]) == 0
        lengths.append(json.loads(capsys.readouterr().out)["expert_lengths"]["maximum"])
    response = len(tokenizer("Yes.", add_special_tokens=False)["input_ids"])
    assert lengths == [response + 2, response + 1], "<|end|> and the EOS; <|end|> alone"


def test_templates_by_name_and_file(tmp_path):
    tokenizer, _ = small_tokenizer("qwen3")
    assert read_chat_template("chatml", tokenizer) == CHATML
    (tmp_path / "t.jinja").write_text("{{ messages }}é", encoding="utf-8")
    assert read_chat_template(str(tmp_path / "t.jinja"), tokenizer) == "{{ messages }}é"
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    assert read_chat_template("tool_use", tokenizer) == "b"
    (tmp_path / "bad.jinja").write_text("{% for %}")
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    for name, message in (
        ("nothing", "expected a file with a Jinja template, or one of chatml, default, qwen3, tool_use; found 'nothing'"),
        (str(tmp_path / "bad.jinja"), "is no chat template: TemplateSyntaxError"),
        (str(tmp_path / "latin.jinja"), "is no chat template: UnicodeDecodeError"),
    ):
        with pytest.raises(ConfigError, match=f"policy.chat_template: .*{message}"):
            read_chat_template(name, tokenizer)


def test_qwen3_for_training_marks_every_turn():
    tokenizer, _ = small_tokenizer("qwen3")
    chat = parse_record({"messages": [QUESTION, THOUGHT, QUESTION, CALLS, RESULT, ANSWER], "tools": TOOLS}, "d:1")
    every = PromptFormat(assistant_turns="all", max_prompt_tokens=10**5)
    with pytest.raises(
        ConfigError, match=r"use a template with \{% generation %\} blocks \(name another template with policy.chat_template\)"
    ):
        texts(chat, tokenizer, every)
    tokenizer.chat_template = QWEN3
    assert texts(chat, tokenizer, every)[1][0] == (
        "<think>\nThree fours are twelve.\n</think>\n\nIt is 12.<|im_end|>"
        '<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
        "<think>\n\n</think>\n\nIt rains.<|im_end|>"
    )


def test_our_qwen3_is_that_of_trl_for_training():
    trl = pytest.importorskip("trl")
    theirs = Path(trl.__file__).parent / "chat_templates/qwen3_training.jinja"
    if not theirs.is_file():
        pytest.skip("this TRL has no chat templates")
    tokenizer, _ = small_tokenizer("qwen3")
    system = {"role": "system", "content": "Be kind."}
    inline = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}
    chats = [
        [QUESTION, THOUGHT],
        [system, QUESTION, inline, QUESTION],
        [QUESTION, CALLS, RESULT, RESULT, {**CALLS, "content": "So."}, RESULT, ANSWER],
    ]
    for chat in chats:
        for tools in (None, TOOLS):
            for options in ({}, {"add_generation_prompt": True}, {"add_generation_prompt": True, "enable_thinking": False}):
                ours, expected = (
                    tokenizer.apply_chat_template(chat, tools=tools, chat_template=template, tokenize=False, **options)
                    for template in (QWEN3, theirs.read_text())
                )
                assert ours == expected
