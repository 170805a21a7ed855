import json

import pytest

from aapa_lightning.data.records import parse_record, prompt_hash, read_records, require_experts, row_parsers, split_records, take
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Instruction, Record

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello."}


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_native_row():
    row = {
        "prompt": "Write.",
        "expert": ["One.", "Two."],
        "instructions": [{"id": "punctuation:no_comma", "kwargs": None}, {"id": "x:y", "kwargs": {"n": 3, "unused": None}}],
        "chosen": "good",
        "rejected": "bad",
        "key": 1000,
        "topic": "sea",
        "nothing": None,
    }
    record = parse_record(row, "f:1")
    assert record == Record(
        prompt="Write.",
        experts=("One.", "Two."),
        instructions=(Instruction("punctuation:no_comma"), Instruction("x:y", {"n": 3})),
        chosen="good",
        rejected="bad",
        key="1000",
        extra={"topic": "sea"},
        source="f:1",
    )


@pytest.mark.parametrize(
    ("row", "prompt", "experts"),
    [
        ({"prompt": "Hi", "expert": "Hello."}, "Hi", ("Hello.",)),
        ({"prompt": "Hi", "experts": ["Hello.", "Hey."]}, "Hi", ("Hello.", "Hey.")),
        ({"prompt": "Hi", "expert": None}, "Hi", ()),
        ({"prompt": [USER]}, (USER,), ()),
        ({"messages": [USER, REPLY]}, (USER,), ("Hello.",)),
        ({"messages": [USER, REPLY, USER]}, (USER, REPLY, USER), ()),
        ({"messages": [USER, REPLY, USER, REPLY]}, (USER, REPLY, USER), ("Hello.",)),
        ({"prompt": "Hi", "messages": [USER, REPLY]}, (USER,), ("Hello.",)),
        ({"prompt": "Hi", "completion": " there"}, "Hi", (" there",)),
        ({"prompt": [USER], "completion": [REPLY]}, (USER,), ("Hello.",)),
        ({"prompt": [USER], "completion": [REPLY, USER, REPLY]}, (USER, REPLY, USER), ("Hello.",)),
    ],
)
def test_dialects(row, prompt, experts):
    record = parse_record(row, "f:1")
    assert record.prompt == prompt
    assert record.experts == experts
    assert record.extra == {}


def test_ifeval_row():
    row = {"key": 7, "prompt": "p", "instruction_id_list": ["a:b", "c:d"], "kwargs": [{}, {"n": 1, "m": None}]}
    assert parse_record(row, "f:1").instructions == (Instruction("a:b"), Instruction("c:d", {"n": 1}))


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "Hi", "a", "b"),
        ({"prompt": "Hi", "chosen": [REPLY], "rejected": [{**REPLY, "content": "No."}]}, "Hi", "Hello.", "No."),
        ({"prompt": "Hi", "chosen": [USER, REPLY], "rejected": [USER, {**REPLY, "content": "No."}]}, "Hi", "Hello.", "No."),
        ({"chosen": [USER, REPLY], "rejected": [USER, {**REPLY, "content": "No."}]}, (USER,), "Hello.", "No."),
        ({"chosen": "Q: sky? A: blue", "rejected": "Q: sky? A: green"}, "Q: sky? A:", " blue", " green"),
    ],
)
def test_preference_rows(row, prompt, chosen, rejected):
    record = parse_record(row, "f:1")
    assert (record.prompt, record.chosen, record.rejected) == (prompt, chosen, rejected)


def test_implicit_text_prompt_equals_trls():
    import trl

    row = {"chosen": "Q: sky? A: blue", "rejected": "Q: sky? A: green"}
    theirs = trl.extract_prompt(row)
    ours = parse_record(row, "f:1")
    assert (ours.prompt, ours.chosen, ours.rejected) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "no prompt"),
        ({"text": "x"}, r"no prompt.*found columns \['text'\]"),
        ({"prompt": ""}, "'prompt' is empty"),
        ({"prompt": " \n"}, "'prompt' is empty"),
        ({"prompt": 3}, "'prompt' must be a list of chat turns"),
        ({"prompt": []}, "not empty"),
        ({"prompt": ["Hi"]}, r"'prompt\[0\]' must be an object with 'role' and 'content', found str"),
        ({"prompt": [{"from": "human", "value": "Hi"}]}, r"found an object with \['from', 'value'\]"),
        ({"prompt": [{"role": "human", "content": "Hi"}]}, "role 'human'; expected one of system"),
        ({"prompt": [{"role": "user"}]}, r"'prompt\[0\].content' must be text"),
        ({"prompt": [USER, {**REPLY, "tool_calls": [{}]}, USER]}, "tool calls"),
        ({"prompt": [USER, REPLY]}, "ends with an assistant turn"),
        ({"prompt": "half \ud800"}, "half a surrogate pair"),
        ({"messages": [REPLY]}, "no prompt before it"),
        ({"messages": "Hi"}, "'messages' must be a list"),
        ({"prompt": "p", "expert": 3}, "'expert' must be text or a list"),
        ({"prompt": "p", "expert": ["a", ""]}, r"'expert\[1\]' is empty"),
        ({"prompt": "p", "expert": "a", "experts": ["b"]}, "keep one"),
        ({"prompt": "p", "completion": [USER]}, "must end with an assistant turn"),
        ({"chosen": "a"}, "no prompt"),
        ({"chosen": [REPLY]}, "let 'chosen' begin with the turns of the prompt"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "'chosen' is empty"),
        ({"prompt": "p", "chosen": [{**REPLY, "content": " "}]}, r"'chosen\[0\].content' is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": [REPLY]}, "both be text or both be chat"),
        ({"prompt": "p", "chosen": [USER], "rejected": [USER]}, "must end with an assistant turn"),
        ({"prompt": "other", "chosen": [USER, REPLY], "rejected": [USER, REPLY]}, "not those of 'prompt'"),
        ({"chosen": [USER, REPLY], "rejected": [{**USER, "content": "Yo"}, REPLY]}, "differ before their last turn"),
        ({"chosen": "a", "rejected": "b"}, "is empty"),
        ({"prompt": "p", "instructions": "no_comma"}, "'instructions' must be a list"),
        ({"prompt": "p", "instructions": ["no_comma"]}, r"'instructions\[0\]' must be an object with 'id'"),
        ({"prompt": "p", "instructions": [{"id": 3}]}, "id' must be text"),
        ({"prompt": "p", "instructions": [{"id": "a", "kwargs": [1]}]}, "arguments of instruction 'a' must be an object"),
        ({"prompt": "p", "instruction_id_list": ["a", "b"], "kwargs": [{}]}, "2 ids .* but 1 entries"),
        ({"prompt": "p", "key": 1.5}, "'key' must be"),
        ({"prompt": "p", "key": True}, "'key' must be"),
    ],
)
def test_malformed_row_is_named(tmp_path, row, message):
    path = write(tmp_path / "d.jsonl", [{"prompt": "fine"}, "", row])
    with pytest.raises(DataError, match=message) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}:3: ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": ', r"malformed JSON \(.*column"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b'{"prompt": "\xff"}', "expected UTF-8 text, found byte 0xff at column 13"),
        (b"[" * 200_000, "nested too deeply|malformed"),
        (b'{"prompt": "x", "n": ' + b"1" * 5000 + b"}", "malformed"),
    ],
)
def test_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        read_records(str(path))
    assert str(caught.value).startswith(f"{path}:2: ")


def test_byte_order_mark_and_unicode_line_breaks_inside_text(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"prompt": "a\u2028b"}\r\n'.encode())
    (record,) = read_records(str(path))
    assert record.prompt == "a\u2028b"
    assert record.source == f"{path}:1"


def test_empty_and_missing_files(tmp_path):
    path = write(tmp_path / "d.jsonl", ["", ""])
    with pytest.raises(DataError, match=r"d\.jsonl is empty"):
        read_records(path)
    with pytest.raises(DataError, match=r"cannot read .*missing\.jsonl: No such file"):
        read_records(str(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match="does not exist"):
        read_records(str(tmp_path / "missing.parquet.d" / "x"))
    with pytest.raises(ConfigError, match="has no split 'test'"):
        read_records(path, split="test")


ROWS = [
    {"prompt": "a", "key": 1, "instruction_id_list": ["x:y", "z:w"], "kwargs": [{"n": 3}, {"m": "t"}]},
    {"prompt": "b", "key": 2, "instruction_id_list": ["x:y"], "kwargs": [{"n": 4}]},
]


@pytest.mark.usefixtures("arrow_cache")
def test_parquet_and_saved_folders_give_the_same_records(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "d.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    table.to_parquet(tmp_path / "files" / "train.parquet")
    expected = [parse_record(row, "x") for row in ROWS]
    for name in ("d.parquet", "saved", "splits", "files"):
        records = read_records(str(tmp_path / name))
        assert [(r.prompt, r.key, r.instructions) for r in records] == [(r.prompt, r.key, r.instructions) for r in expected], name
        assert records[1].source == f"{tmp_path / name}:row 1"
        assert not isinstance(records, list), "Arrow data must stay on disk"
    assert [r.prompt for r in read_records(str(tmp_path / "splits"), split="test")] == ["b"]
    with pytest.raises(DataError, match=r"no split 'val'; it has \['test', 'train'\]"):
        read_records(str(tmp_path / "splits"), split="val")


@pytest.mark.usefixtures("arrow_cache")
def test_arrow_errors_name_the_row(tmp_path):
    import datasets

    path = str(tmp_path / "d.parquet")
    datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": ""}]).to_parquet(path)
    records = read_records(path)
    with pytest.raises(DataError, match=r"d\.parquet:row 1: 'prompt' is empty"):
        records[1]
    other = str(tmp_path / "e.parquet")
    datasets.Dataset.from_list([{"text": "a"}]).to_parquet(other)
    with pytest.raises(DataError, match=r"expected a column 'prompt', 'messages' or 'chosen', found \['text'\]"):
        read_records(other)
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"cannot open '.*bad\.parquet'"):
        read_records(str(tmp_path / "bad.parquet"))


def test_hub_name(monkeypatch):
    import datasets

    seen = []

    def load(name, config, split):
        seen.append((name, config, split))
        return datasets.Dataset.from_list([{"prompt": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("google/IFEval", "google/IFEval@main:test", "google/IFEval:test", "gsm8k@main"):
        assert len(read_records(name)) == 1
    assert seen == [
        ("google/IFEval", None, "train"),
        ("google/IFEval", "main", "test"),
        ("google/IFEval", None, "test"),
        ("gsm8k", "main", "train"),
    ]
    with pytest.raises(ConfigError, match="names the split 'test' and split='val'"):
        read_records("a/b:test", split="val")

    def fail(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"cannot open 'a/b' \(ConnectionError: offline\)"):
        read_records("a/b")


def test_experts_from_a_response_file(tmp_path):
    data = write(tmp_path / "d.jsonl", [{"prompt": "a", "key": 1, "expert": "own"}, {"prompt": "b"}, {"prompt": "c"}])
    experts = write(
        tmp_path / "e.jsonl",
        [
            {"key": 1, "response": "by key"},
            {"prompt": "b", "response": "by prompt"},
            {"prompt": "c", "response": "cut", "truncated": True},
        ],
    )
    records = read_records(data, experts=experts)
    assert [r.experts for r in records] == [("own", "by key"), ("by prompt",), ()]
    with pytest.raises(DataError, match=r"d\.jsonl:3: no expert response, but SFT imitates experts; add a column 'expert'"):
        require_experts(records, "SFT imitates experts")
    require_experts(records[:2], "SFT imitates experts")


def test_prompt_hash_ignores_the_shape_of_one_prompt():
    assert prompt_hash("Hi") == prompt_hash([USER])
    assert prompt_hash("Hi") != prompt_hash([{"role": "system", "content": "Hi"}])
    assert prompt_hash([USER, REPLY, USER]) != prompt_hash([USER, USER, REPLY])
    # A text that looks like the encoding of a chat is not that chat.
    assert prompt_hash(json.dumps([USER, REPLY], sort_keys=True)) != prompt_hash([USER, REPLY])
    assert len(prompt_hash("é")) == 64


def test_split_is_by_prompt_and_independent_of_order():
    records = [Record(prompt=f"p{i % 50}", key=str(i)) for i in range(100)] + [Record(prompt=({"role": "user", "content": "p0"},))]
    train, val = split_records(records, 0.2, seed=0)
    assert len(train) + len(val) == 101
    prompts = [{prompt_hash(r.prompt) for r in part} for part in (train, val)]
    assert not prompts[0] & prompts[1]
    assert len(prompts[1]) == 10
    again = split_records(records[::-1], 0.2, seed=0)[1]
    assert {r.key for r in again} == {r.key for r in val}
    assert {r.prompt for r in split_records(records[:100], 0.2, seed=1)[1]} != {
        r.prompt for r in split_records(records[:100], 0.2, seed=0)[1]
    }


def test_split_edges():
    two = [Record(prompt="a"), Record(prompt="b")]
    assert split_records(two, 0.0, 0) == (two, [])
    assert [len(part) for part in split_records(two, 0.01, 0)] == [1, 1]
    assert [len(part) for part in split_records(two, 0.99, 0)] == [1, 1]
    with pytest.raises(DataError, match="at least two different prompts, found 1"):
        split_records([two[0], two[0]], 0.5, 0)
    with pytest.raises(ConfigError, match=r"val_fraction must be in \[0, 1\), found 1"):
        split_records(two, 1, 0)


def test_take_indexes_like_a_list():
    records = [Record(prompt=str(i)) for i in range(5)]
    some = take(records, [4, 2, 0])
    assert [r.prompt for r in some] == ["4", "2", "0"]
    assert some[-1].prompt == "0"
    assert [r.prompt for r in some[1:]] == ["2", "0"]
    with pytest.raises(IndexError):
        some[3]


def test_row_parsers_go_on_after_an_error(tmp_path):
    path = write(tmp_path / "d.jsonl", ["{", {"prompt": "a"}])
    first, second = row_parsers(path)
    with pytest.raises(DataError):
        first()
    assert second().prompt == "a"


def test_real_prompts(aapa_data):
    folder = aapa_data / "ifeval"
    records = read_records(str(folder / "prompts.jsonl"), experts=str(folder / "responses" / "gpt-4o.jsonl"))
    assert len(records) == 541
    assert [record.key for record in records if not record.experts] == ["2785"]
    assert sum(len(record.instructions) for record in records) == 834


def test_columns_rename_fields(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "Q?", "response": "A.", "prompt": "other"}) + "\n")
    (record,) = read_records(str(path), columns={"prompt": "question", "expert": "response"})
    assert (record.prompt, record.experts, dict(record.extra)) == ("Q?", ("A.",), {})


def test_columns_of_a_parquet_file_are_renamed_too(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"question": ["Why?"], "answer": ["So."]}).to_parquet(tmp_path / "d.parquet")
    (record,) = read_records(str(tmp_path / "d.parquet"), columns={"prompt": "question", "expert": "answer"})
    assert (record.prompt, record.experts) == ("Why?", ("So.",))
    with pytest.raises(DataError, match=r"d.parquet:row 0: columns names 'prompt', found only"):
        read_records(str(tmp_path / "d.parquet"), columns={"messages": "prompt"})


def test_columns_that_are_missing_are_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Q?"}) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: columns names 'response', found only \['prompt'\]"):
        read_records(str(path), columns={"expert": "response"})


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ('[{"num_words": 3}]', None),
        ("[{", "'kwargs' is text but not JSON"),
        ("[" * 100_000, "'kwargs' is text but not JSON"),
    ],
    ids=["good", "cut short", "nested"],
)
def test_ifeval_arguments_may_be_json_text(tmp_path, kwargs, match):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Q?", "instruction_id_list": ["length_constraints:number_words"], "kwargs": kwargs}) + "\n")
    if match:
        with pytest.raises(DataError, match=match):
            read_records(str(path))
    else:
        assert read_records(str(path))[0].instructions[0].kwargs == {"num_words": 3}
