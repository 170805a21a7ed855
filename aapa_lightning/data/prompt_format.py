"""How records become tokens: the options, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from aapa_lightning.errors import COUNT, ConfigError, check_numbers

TemplateUse = Literal["auto", "always", "never"]
Overlong = Literal["error", "drop"]
AssistantTurns = Literal["last", "all"]

#: Arguments of ``apply_chat_template`` that the encoder sets itself.
RESERVED = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
}


@dataclass(frozen=True)
class PromptFormat:
    """How records become tokens.

    Args:
        chat_template: ``auto`` uses the tokenizer's chat template where it has one (a text prompt becomes one user turn), ``always``
            demands one, ``never`` encodes text prompts as they are.
        chat_template_kwargs: options of the template, such as ``{"enable_thinking": false}`` for Qwen3.
        system_prompt: system turn put before prompts that have none of their own; needs a chat template.
        max_prompt_tokens: limit on the prompt, generation prompt included.
        max_response_tokens: limit on an expert response, EOS included.
        overlong: what ``fit_lengths`` does with records over a limit: ``error`` stops, ``drop`` leaves them out and says how many.
        assistant_turns: the assistant turns that a demonstration teaches: the ``last`` one, or ``all`` of the conversation.
    """

    chat_template: TemplateUse = "auto"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    max_prompt_tokens: int = 1024
    max_response_tokens: int = 1024
    overlong: Overlong = "error"
    assistant_turns: AssistantTurns = "last"

    def __post_init__(self) -> None:
        for name, value, options in (
            ("chat_template", self.chat_template, get_args(TemplateUse)),
            ("overlong", self.overlong, get_args(Overlong)),
            ("assistant_turns", self.assistant_turns, get_args(AssistantTurns)),
        ):
            if value not in options:
                raise ConfigError(f"{name} must be one of {', '.join(options)}, found {value!r}")
        limits = {"max_prompt_tokens": COUNT, "max_response_tokens": COUNT}
        check_numbers({name: getattr(self, name) for name in limits}, limits)
        if reserved := RESERVED & self.chat_template_kwargs.keys():
            raise ConfigError(f"chat_template_kwargs cannot set {sorted(reserved)}: the encoder does; give options of the template only")
