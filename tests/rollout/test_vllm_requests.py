"""What is asked of vLLM, and that an answer is not believed before it was looked at."""

from __future__ import annotations

import copy
import json

import pytest

from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.rollout.base import RolloutRequest, SamplingParams
from aapa_lightning.rollout.vllm_requests import completion_body, first_seed, read_completion, sampling_fields
from aapa_lightning.types import Record

REQUEST = RolloutRequest([5, 6], Record("p", source="data.jsonl:7"), 3, 2)
PARAMS = SamplingParams(max_new_tokens=3, temperature=0.7)
EOS = (1, 2)


def choice(index, ids, reason, **others):
    logprobs = {"tokens": [f"token_id:{token}" for token in ids], "token_logprobs": [-0.5 - i for i in range(len(ids))]}
    return {"index": index, "token_ids": ids, "prompt_token_ids": [5, 6], "logprobs": logprobs, "finish_reason": reason} | others


GOOD = {"choices": [choice(1, [8, 9, 7], "length"), choice(0, [8, 2], "stop", weight_versions=[{"version": "v1", "start": 0, "end": 2}])]}


def read(answer, params=PARAMS, version="v1", request=REQUEST):
    content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return read_completion(content, request, params, EOS, vocabulary=10, version=version)


def test_a_good_answer_is_read_in_order_of_samples():
    first, second = read(GOOD)
    assert first == ([8, 2], [-0.5, -1.5], False)
    assert second == ([8, 9, 7], [-0.5, -1.5, -2.5], True)


def test_a_request_says_all_that_a_server_could_fill_in():
    params = SamplingParams(max_new_tokens=3, temperature=0.7, top_p=0.9, top_k=4, stop=("\n",))
    fields = sampling_fields(REQUEST, params, EOS, seed=11, window=4)
    assert fields == {
        "n": 2,
        "seed": first_seed(11, 4, 3),
        "max_tokens": 3,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": ["\n"],
        "stop_token_ids": [1, 2],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": 0,
    }
    body = completion_body("m", REQUEST, fields)
    assert body["prompt"] == [5, 6]
    assert (body["model"], body["stream"], body["return_token_ids"], body["return_tokens_as_token_ids"]) == ("m", False, True, True)
    assert json.loads(json.dumps(body)) == body


def test_seeds_differ_and_leave_room_for_samples():
    seeds = {first_seed(seed, window, slot) for seed in range(3) for window in range(3) for slot in range(3)}
    assert len(seeds) == 27
    assert all(0 <= seed < 2**62 for seed in seeds)


def test_greedy_is_asked_for_once_and_repeated():
    greedy = SamplingParams(max_new_tokens=3, temperature=0.0)
    assert sampling_fields(REQUEST, greedy, EOS, 0, 0)["n"] == 1
    rows = read({"choices": [choice(0, [8, 2], "stop")]}, greedy)
    assert rows == [([8, 2], [-0.5, -1.5], False)] * 2


def test_a_temperature_that_vllm_would_raise_is_refused():
    with pytest.raises(ConfigError, match=r"sampling\.temperature: expected 0 or at least 0\.01, found 0\.001"):
        sampling_fields(REQUEST, SamplingParams(temperature=0.001), EOS, 0, 0)


def changed(position, /, **values):
    answer = copy.deepcopy(GOOD)
    answer["choices"][position] |= values
    return answer


def logprobs(values, tokens=None):
    return {"tokens": tokens or ["token_id:8", "token_id:9", "token_id:7"], "token_logprobs": values}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>", "JSONDecodeError"),
        (b"[" * 100_000, "RecursionError"),
        (b'{"choices": [{"index": ' + b"9" * 5000 + b"}]}", "ValueError"),
        ({"object": "error"}, "KeyError: 'choices'"),
        ({"choices": None}, "TypeError"),
        ({"choices": GOOD["choices"][:1]}, r"expected choices 0 to 1, found \[1\]"),
        ({"choices": [GOOD["choices"][0]] * 2}, r"expected choices 0 to 1, found \[1\]"),
        (changed(0, index=5), r"expected choices 0 to 1, found \[0, 5\]"),
        (changed(0, index="1"), "TypeError"),
        (changed(0, index=[]), "TypeError"),
        (changed(0, prompt_token_ids=[5, 7]), "another prompt"),
        (changed(0, prompt_token_ids=None), "another prompt"),
        (changed(0, token_ids=None), "expected token_ids and logprobs"),
        (changed(0, logprobs=None), "expected token_ids and logprobs"),
        (changed(0, logprobs={"tokens": []}), "not those of token_ids"),
        (changed(0, logprobs=logprobs([-1.0, -1.0])), "a finite log-prob for each of 3 tokens"),
        (changed(0, logprobs=logprobs([-1.0, None, -1.0])), "a finite log-prob for each of 3 tokens"),
        (changed(0, logprobs=logprobs([-1.0, float("nan"), -1.0])), "a finite log-prob"),
        (changed(0, logprobs=logprobs([-1.0, float("-inf"), -1.0])), "a finite log-prob"),
        (changed(0, logprobs=logprobs([-1.0, 0.5, -1.0])), "a finite log-prob"),
        (changed(0, logprobs=logprobs([-1.0, True, -1.0])), "a finite log-prob"),
        (changed(0, logprobs=logprobs([-1.0, "-1", -1.0])), "a finite log-prob"),
        (changed(0, logprobs=logprobs([-1.0] * 3, ["token_id:8", "token_id:9", "token_id:6"])), "not those of token_ids"),
        (changed(0, **choice(1, [8, 9, 10], "length")), r"token ids in \[0, 10\)"),
        (changed(0, **choice(1, [8, 9, -1], "length")), r"token ids in \[0, 10\)"),
        (changed(0, **choice(1, [8, 9, 1.0], "length")), r"token ids in \[0, 10\)"),
        (changed(0, **choice(1, [], "stop")), "expected 1 to 3 token ids"),
        (changed(0, **choice(1, [8, 9, 7, 6], "length")), "expected 1 to 3 token ids"),
        (changed(0, finish_reason=None), "finish_reason None"),
        (changed(0, finish_reason="abort"), "finish_reason 'abort'"),
        (changed(0, finish_reason="stop"), "an end at its first end-of-sequence token"),
        (changed(0, **choice(1, [1, 9, 7], "length")), "an end at its first end-of-sequence token"),
        (changed(1, weight_versions=[{"version": "v0", "start": 0, "end": 2}]), r"weights of version \['v0'\], expected 'v1'"),
        (changed(1, weight_versions=[{"version": v, "start": 0, "end": 1} for v in ("v0", "v1")]), "weights of version"),
    ],
)
def test_answers_that_are_not_what_was_asked_for(answer, message):
    with pytest.raises(DataError, match=message) as caught:
        read(answer)
    assert "data.jsonl:7" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("row", [choice(1, [8, 9], "length"), choice(1, [8, 9, 2], "length")])
def test_a_cut_before_the_limit_is_the_servers_context(row):
    with pytest.raises(ConfigError, match="--max-model-len"):
        read(changed(0, **row))


def test_a_stop_string_may_end_a_response_anywhere():
    (row, _) = read({"choices": [choice(0, [8], "stop"), choice(1, [8, 2], "stop")]}, SamplingParams(max_new_tokens=3, stop=("x",)))
    assert row == ([8], [-0.5], False)
