"""Chat templates by file or name, for tokenizers whose own cannot mark the assistant's turns, or that have none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aapa_lightning.errors import ConfigError, in_one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: ChatML without anything model-specific. ``{% generation %}`` marks the assistant's tokens for multi-turn training.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
#: Qwen3's template for training: a think block in every assistant turn, also in earlier ones, and the assistant's tokens marked.
QWEN3 = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n" }}
    {{- "You are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within " }}
    {{- "<tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>" }}
    {{- "<|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if message.reasoning_content is not string and '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {%- if content or not loop.first %}
                {{- '\n' }}
            {%- endif %}
            {{- '<tool_call>\n{"name": "' + function.name + '", "arguments": ' }}
            {{- function.arguments if function.arguments is string else function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
TEMPLATES = {"chatml": CHATML, "qwen3": QWEN3}


def read_chat_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A Jinja chat template.

    Args:
        name: a file, the name of one of the tokenizer's own templates where it has several, or one of ``TEMPLATES``.
        tokenizer: the one that will use it.

    Raises:
        ConfigError: nothing of that name, a file that cannot be read, or one that is no Jinja template.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    known = {**TEMPLATES, **own}
    if name in known:
        return known[name]
    if not Path(name).is_file():
        raise ConfigError(
            f"policy.chat_template: expected a file with a Jinja template, or one of {', '.join(sorted(known))}; found {name!r}"
        )
    try:
        template = Path(name).read_text(encoding="utf-8")
        render_jinja_template(conversations=[], chat_template=template)  # which compiles it
    except Exception as error:  # of the file system, of Unicode and of Jinja
        raise ConfigError(f"policy.chat_template: {name!r} is no chat template: {in_one_line(error)}") from error
    return template
