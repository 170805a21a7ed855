import logging

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from aapa_lightning.data.encode import (
    OverlongError,
    PromptFormat,
    encode_demonstration,
    encode_prompt,
    end_of_turn_id,
    expert_responses,
    fit_lengths,
)
from aapa_lightning.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Record

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Describe the harbor."}
REPLY = {"role": "assistant", "content": "The boats rest."}
MORE = {"role": "user", "content": "And now?"}
EXPERT = "The gulls call calmly."

LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n\\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"
)
#: The parts of Qwen3's template that matter: the thinking switch, and thinking shown in the last turn alone.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
#: Always opens a thought in the generation prompt and never shows it in the conversation, as DeepSeek-R1's distillations do.
BROKEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
#: ChatML without generation blocks.
PLAIN_CHATML = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
#: No end token at all.
ALPACA = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\\n' + m['content'] + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"
)
TEXTS = ["Describe the harbor. The boats rest. And now? The gulls call calmly. system user assistant think"]


def make(template, *, bos=False):
    tokenizer = train_tokenizer(TEXTS, 320, chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|eot|>"]})
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


@pytest.fixture(scope="module")
def chatml():
    return make(CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def plain():
    return make(None)


def id_of(tokenizer, token):
    return tokenizer.convert_tokens_to_ids(token)


def demonstrate(tokenizer, prompt, expert=EXPERT, eos="<|im_end|>", **options):
    """The prompt's text, the learned text, the demonstration; and the rules that hold for every demonstration."""
    record = Record(prompt=prompt, experts=(expert,), source="d.jsonl:7")
    fmt = PromptFormat(**options)
    prompt_ids = encode_prompt(tokenizer, record, fmt)
    demo = encode_demonstration(tokenizer, record, expert, fmt, id_of(tokenizer, eos))
    assert demo.input_ids[: len(prompt_ids)] == prompt_ids
    assert len(demo.input_ids) == len(demo.response_mask)
    assert all(demo.response_mask[len(prompt_ids) :])
    response = demo.input_ids[len(prompt_ids) :]
    assert response[-1] == id_of(tokenizer, eos)
    assert response.count(id_of(tokenizer, eos)) == 1
    learned = [token for token, flag in zip(demo.input_ids, demo.response_mask, strict=True) if flag]
    return tokenizer.decode(prompt_ids), tokenizer.decode(learned), demo


def test_text_prompt_becomes_one_user_turn(chatml):
    prompt, learned, demo = demonstrate(chatml, USER["content"])
    assert prompt == "<|im_start|>user\nDescribe the harbor.<|im_end|>\n<|im_start|>assistant\n"
    assert learned == EXPERT + "<|im_end|>"
    assert demonstrate(chatml, (USER,))[2].input_ids == demo.input_ids


def test_template_never_encodes_the_text_as_it_stands(chatml):
    prompt, learned, _ = demonstrate(chatml, USER["content"], chat_template="never")
    assert prompt == USER["content"]
    assert learned == EXPERT + "<|im_end|>"


def test_without_a_template(plain):
    prompt, learned, _ = demonstrate(plain, USER["content"], expert=" with spaces \n")
    assert prompt == USER["content"]
    assert learned == " with spaces \n<|im_end|>"
    with pytest.raises(DataError, match=r"d\.jsonl:7: the prompt is a chat, but no chat template"):
        demonstrate(plain, (USER,))
    with pytest.raises(ConfigError, match="chat_template is 'always', but the tokenizer has no"):
        demonstrate(plain, USER["content"], chat_template="always")
    with pytest.raises(ConfigError, match="system_prompt needs a chat template"):
        demonstrate(plain, USER["content"], system_prompt="Be kind.")


def test_system_prompt_yields_to_the_records_own(chatml):
    assert demonstrate(chatml, (USER,), system_prompt="Be brief.")[0].startswith("<|im_start|>system\nBe brief.<|im_end|>")
    prompt = demonstrate(chatml, (SYSTEM, USER), system_prompt="Be brief.")[0]
    assert prompt.startswith("<|im_start|>system\nBe kind.<|im_end|>")
    assert "brief" not in prompt


def test_beginning_of_sequence_is_written_once():
    llama = make(LLAMA, bos=True)
    for template in ("auto", "never"):
        _, _, demo = demonstrate(llama, USER["content"], eos="<|eot|>", chat_template=template)
        assert demo.input_ids[0] == llama.bos_token_id
        assert demo.input_ids.count(llama.bos_token_id) == 1
    # A prompt that already spells it.
    _, _, demo = demonstrate(llama, "<s>" + USER["content"], chat_template="never")
    assert demo.input_ids.count(llama.bos_token_id) == 1


def test_prompt_and_response_that_would_merge_stay_apart(plain):
    ids = plain("The", add_special_tokens=False)["input_ids"]
    assert len(ids) == 1, "the tokenizer has no merge for this test"
    _, learned, demo = demonstrate(plain, "T", expert="he")
    assert demo.input_ids[:1] == plain("T")["input_ids"]
    assert learned == "he<|im_end|>"
    assert plain.decode(demo.input_ids) == "The<|im_end|>"


@pytest.mark.parametrize("bos", [False, True])
def test_sentencepiece_marks_the_start_of_a_text_once(bos):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=["<s>", "<|im_end|>"], show_progress=False))
    if bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>")  # noqa: S106 - tokens, not secrets
    _, _, demo = demonstrate(tokenizer, "And now?", expert="gulls")
    alone = tokenizer("gulls", add_special_tokens=False)["input_ids"]
    assert demo.input_ids[-len(alone) - 1 : -1] != alone, "the tokenizer does not mark the start of a text"
    assert tokenizer.decode(demo.input_ids, skip_special_tokens=True) == "And now?gulls"


def test_llama_turns_end_with_their_own_token():
    llama = make(LLAMA, bos=True)
    fmt = PromptFormat()
    both = (id_of(llama, "<|im_end|>"), id_of(llama, "<|eot|>"))
    assert end_of_turn_id(llama, fmt, both) == id_of(llama, "<|eot|>")
    assert end_of_turn_id(llama, PromptFormat(chat_template="never"), both) == llama.eos_token_id
    assert end_of_turn_id(llama, PromptFormat(chat_template="never"), both[1:]) == id_of(llama, "<|eot|>")
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        end_of_turn_id(llama, fmt, ())
    # The template trims the expert: what is learned is what it renders.
    assert demonstrate(llama, (USER,), expert=f" {EXPERT}\n", eos="<|eot|>")[1] == EXPERT + "<|eot|>"


def test_thinking_switch():
    qwen = make(QWEN3)
    prompt, learned, _ = demonstrate(qwen, (USER,))
    assert prompt.endswith("assistant\n")
    assert learned == f"<think>\n\n</think>\n\n{EXPERT}<|im_end|>"
    prompt, learned, _ = demonstrate(qwen, (USER,), chat_template_kwargs={"enable_thinking": False})
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n")
    assert learned == EXPERT + "<|im_end|>"


def test_template_without_an_end_token():
    alpaca = make(ALPACA)
    assert demonstrate(alpaca, (USER,))[1] == EXPERT + "<|im_end|>"
    assert demonstrate(alpaca, (USER,), expert=EXPERT + "\n")[1] == EXPERT + "\n<|im_end|>"


def test_template_that_breaks_its_own_prompt_is_refused():
    with pytest.raises(ConfigError, match=r"d\.jsonl:7: the chat template renders the conversation differently .*'<think>"):
        demonstrate(make(BROKEN), (USER,))


def test_template_that_refuses_the_turns_is_named():
    strict = make("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"d\.jsonl:7: the chat template refuses the turns \(user\): roles must alternate"):
        demonstrate(strict, (USER,))


def test_end_token_inside_the_response_is_text(chatml, plain):
    for tokenizer in (chatml, plain):
        # ``demonstrate`` asserts that the learned tokens hold the end once, as the last
        for expert in ("a<|im_end|>b", "a<|im_end|>"):
            assert demonstrate(tokenizer, USER["content"], expert=expert)[1] == expert + "<|im_end|>"


def test_spelled_tokens_to_be_learned_are_announced(chatml, caplog):
    records = [Record("a", experts=("b",)), Record("a<|im_end|>", experts=("b",)), Record("a", experts=("b<|im_end|>",))]
    with caplog.at_level(logging.WARNING):
        assert fit_lengths(chatml, records, PromptFormat(), chatml.eos_token_id, expert_responses) is records
    assert "1 of 3 records have responses that spell control tokens, which are learnt as text" in caplog.text


#: Phi-3's way: an end after every turn and another after the last, both of which stop generation.
TWO_ENDS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|eot|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% else %}{{ eos_token }}{% endif %}"
)


@pytest.mark.parametrize("turns", ["last", "all"])
def test_one_end_of_a_response_where_a_template_writes_two(turns):
    tokenizer = make(TWO_ENDS)
    both = (tokenizer.eos_token_id, id_of(tokenizer, "<|eot|>"))
    assert end_of_turn_id(tokenizer, PromptFormat(), both) == id_of(tokenizer, "<|eot|>")
    assert end_of_turn_id(tokenizer, PromptFormat(), both[:1]) == tokenizer.eos_token_id
    learned = demonstrate(tokenizer, (USER, REPLY, MORE), eos="<|eot|>", assistant_turns=turns)[1]
    assert learned == (f"{REPLY['content']}<|eot|>" if turns == "all" else "") + EXPERT + "<|eot|>"


#: The end of a turn outside the block, after a line break, and nothing but the content inside.
NARROW_BLOCKS = CHAT_TEMPLATE.replace(
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}", "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}"
)
#: A block that goes on after the end.
WIDE_BLOCKS = CHAT_TEMPLATE.replace("{% endgeneration %}", "{{ '\\n' }}{% endgeneration %}")


@pytest.mark.parametrize("template", [NARROW_BLOCKS, WIDE_BLOCKS])
def test_every_learned_turn_has_its_end_whatever_the_blocks_hold(template):
    assert template != CHAT_TEMPLATE
    learned = demonstrate(make(template), (USER, REPLY, MORE), assistant_turns="all")[1]
    assert learned == f"{REPLY['content']}<|im_end|>{EXPERT}<|im_end|>"


@pytest.mark.parametrize("blocks", [True, False])
def test_turns_without_an_end_cannot_be_learned(blocks):
    template = ALPACA
    if blocks:
        template = ALPACA.replace("{{ '### '", "{% generation %}{{ '### '").replace("+ '\\n\\n' }}", "+ '\\n\\n' }}{% endgeneration %}")
        assert "{% generation %}" in template
    with pytest.raises(
        ConfigError, match=r"d\.jsonl:7: assistant_turns='all' needs a chat template that ends every assistant turn with '<\|im_end\|>'"
    ):
        demonstrate(make(template), (USER, REPLY, MORE), assistant_turns="all")


def test_template_that_always_adds_the_generation_prompt():
    tokenizer = make(PLAIN_CHATML.replace("{% if add_generation_prompt %}", "{% if true %}"))
    prompt, learned, _ = demonstrate(tokenizer, (USER, REPLY, MORE), assistant_turns="all")
    assert prompt.endswith("And now?<|im_end|>\n<|im_start|>assistant\n")
    assert learned == f"{REPLY['content']}<|im_end|>{EXPERT}<|im_end|>"


@pytest.mark.parametrize(
    ("template", "expert"),
    [
        # no assistant turn at all; only users' turns; the thinking cut off, as DeepSeek-R1's does; the end before the content
        (PLAIN_CHATML.replace("{% for message in messages %}", "{% for message in messages if message['role'] == 'user' %}"), EXPERT),
        (PLAIN_CHATML.replace("message['content']", "message['content'].split('</think>')[-1]"), "<think>A gull.</think>The gulls."),
        (PLAIN_CHATML.replace("message['content'] + '<|im_end|>'", "'<|im_end|>' + message['content']"), EXPERT),
        (PLAIN_CHATML.replace("message['content']", "message['content'][:4]"), EXPERT),
    ],
)
def test_template_that_loses_the_response_is_blamed(template, expert):
    with pytest.raises(
        ConfigError, match=r"d\.jsonl:7: the chat template does not write the response as it is .*the data is not at fault: name another"
    ):
        demonstrate(make(template), (USER,), expert=expert)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PLAIN_CHATML], ids=["generation-blocks", "prefixes"])
def test_all_assistant_turns(template):
    tokenizer = make(template)
    chat = (SYSTEM, USER, REPLY, MORE)
    assert demonstrate(tokenizer, chat)[1] == f"{EXPERT}<|im_end|>"
    assert demonstrate(tokenizer, chat, assistant_turns="all")[1] == f"{REPLY['content']}<|im_end|>{EXPERT}<|im_end|>"
    twice = (USER, REPLY, MORE, {"role": "assistant", "content": "Still."}, MORE)
    assert demonstrate(tokenizer, twice, assistant_turns="all")[1] == f"{REPLY['content']}<|im_end|>Still.<|im_end|>{EXPERT}<|im_end|>"
    assert demonstrate(tokenizer, "Hi", assistant_turns="all")[1] == f"{EXPERT}<|im_end|>"


def test_all_assistant_turns_with_padding_equal_to_the_end_token():
    tokenizer = make(PLAIN_CHATML)
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    _, learned, demo = demonstrate(tokenizer, (USER, REPLY, MORE), assistant_turns="all")
    assert learned == f"{REPLY['content']}<|im_end|>{EXPERT}<|im_end|>"
    # The user's turns end with the same token, and are not learned.
    ends = [flag for token, flag in zip(demo.input_ids, demo.response_mask, strict=True) if token == tokenizer.eos_token_id]
    assert ends == [False, True, False, True]


def test_all_assistant_turns_refuses_a_template_that_rewrites_history():
    with pytest.raises(ConfigError, match=r"d\.jsonl:7: assistant_turns='all' needs a chat template .*generation"):
        demonstrate(make(QWEN3), (USER, REPLY, MORE), assistant_turns="all")


def test_limits_count_the_end_token(chatml):
    record = Record(prompt=(USER,), source="d.jsonl:7")
    prompt = len(encode_prompt(chatml, record, PromptFormat()))
    eos = chatml.eos_token_id
    response = len(encode_demonstration(chatml, record, EXPERT, PromptFormat(), eos).input_ids) - prompt
    exact = PromptFormat(max_prompt_tokens=prompt, max_response_tokens=response)
    assert len(encode_demonstration(chatml, record, EXPERT, exact, eos).input_ids) == prompt + response
    expected = rf"d\.jsonl:7: the prompt has {prompt} tokens, the limit is {prompt - 1}; raise max_prompt_tokens, or set overlong to 'drop'"
    with pytest.raises(OverlongError, match=expected):
        encode_prompt(chatml, record, PromptFormat(max_prompt_tokens=prompt - 1))
    with pytest.raises(OverlongError, match=rf"the expert response has {response} tokens, the limit is {response - 1}"):
        encode_demonstration(chatml, record, EXPERT, PromptFormat(max_response_tokens=response - 1), eos)


def test_fit_lengths(plain, caplog):
    eos = plain.eos_token_id
    records = [Record(prompt="a"), Record(prompt="a" * 40, source="d.jsonl:2"), Record(prompt="b", experts=("c" * 40,))]
    assert fit_lengths(plain, records, PromptFormat(), eos, expert_responses) is records
    with pytest.raises(OverlongError, match=r"d\.jsonl:2: the prompt has 40 tokens"):
        fit_lengths(plain, records, PromptFormat(max_prompt_tokens=8), eos, expert_responses)
    drop = PromptFormat(max_prompt_tokens=8, max_response_tokens=8, overlong="drop")
    with caplog.at_level(logging.WARNING):
        kept = fit_lengths(plain, records, drop, eos, expert_responses)
    assert [r.prompt for r in kept] == ["a"]
    assert "2 of 3 records are over the length limits" in caplog.text
    assert [r.prompt for r in fit_lengths(plain, records, drop, eos)] == ["a", "b"]
    with pytest.raises(DataError, match="all 1 records are longer than the limits"):
        fit_lengths(plain, records[1:2], drop, eos, expert_responses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat_template": "yes"}, "chat_template must be one of auto, always, never, found 'yes'"),
        ({"overlong": "cut"}, "overlong must be one of error, drop"),
        ({"assistant_turns": "first"}, "assistant_turns must be one of last, all"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens: expected a whole number, at least 1, found 0"),
        ({"chat_template_kwargs": {"tokenize": True}}, r"chat_template_kwargs cannot set \['tokenize'\]"),
    ],
)
def test_illegal_options(options, message):
    with pytest.raises(ConfigError, match=message):
        PromptFormat(**options)


def test_whatever_a_template_raises_names_the_record():
    for source in ("{{ range(10**9) }}", "{{ 1 // 0 }}", "{{ messages['x']['y'] }}"):
        with pytest.raises(DataError, match=r"d\.jsonl:7: the chat template refuses the turns \(user\): "):
            demonstrate(make(source), (USER,))
