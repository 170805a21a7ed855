"""Chat templates of well-known models, cut down to what matters for tokens, and small tokenizers with these models' added tokens."""

from tokenizers import AddedToken

from aapa_lightning.data.tokenizer import train_tokenizer

TEXTS = ["Describe the harbor. The boats rest. And now? The gulls call calmly. system user assistant model think 3 < 4 a|b [x]"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Thinking is read from its own field or cut out of the content, shown after the last question alone; tool results stand in a user turn.
QWEN3 = (
    "{% if tools %}<|im_start|>system\n# Tools\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools><|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content if m.content is string else '' %}"
    "{% if m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}"
    "{% if not thought and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}{{ content }}"
    "{% for call in m.tool_calls or [] %}{% set f = call.function or call %}\n<tool_call>\n"
    '{"name": "{{ f.name }}", "arguments": {{ f.arguments if f.arguments is string else f.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
#: Ends every turn, and the whole text once more.
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
#: name: template, special tokens, added tokens that are not special, the token that ends a turn.
MODELS = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], [], "<|im_end|>"),
    # markers that a community tokenizer added without calling them special
    "chatml-plain": (CHATML.replace("im_", "my_"), [], ["<|my_start|>", "<|my_end|>"], "<|my_end|>"),
    "qwen3": (
        QWEN3,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"],
        "<|im_end|>",
    ),
    "llama3": (LLAMA3, ["<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], [], "<|eot_id|>"),
    "gemma": (GEMMA, ["<bos>", "<start_of_turn>", "<end_of_turn>"], ["\n\n"], "<end_of_turn>"),
    "phi3": (PHI3, ["<|end|>", "<|user|>", "<|assistant|>"], [], "<|end|>"),
}


def small_tokenizer(name):
    """A byte-level tokenizer with a model's template and added tokens; and the id that ends a turn."""
    template, special, plain, end = MODELS[name]
    tokenizer = train_tokenizer(TEXTS, 330, chat_template=template)
    if special and special[0] in ("<s>", "<bos>"):
        tokenizer.add_special_tokens({"bos_token": special[0]})
    strips = name == "phi3"  # as in Phi-3's own tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(token, rstrip=strips, special=True) for token in special]})
    tokenizer.add_tokens([AddedToken(token, special=False) for token in plain])
    return tokenizer, tokenizer.convert_tokens_to_ids(end)
