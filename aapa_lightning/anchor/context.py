"""Prompt and response as tokens for an encoder, and the sentence that each token belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from aapa_lightning.anchor.segment import Span
from aapa_lightning.data.control_tokens import Encoded, encode_batch, marked, unmarked
from aapa_lightning.data.records import prompt_text
from aapa_lightning.data.templates import apply_template, chat_turns
from aapa_lightning.errors import ConfigError
from aapa_lightning.types import Message

Prompt = str | tuple[Message, ...]
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Encoding:
    """How text is presented to the encoder.

    Args:
        max_length: tokens of prompt and response together; also limited by the encoder. The prompt is cut first, from its beginning, down
            to a quarter of this; then the response, from its end.
        prompt: whether the encoder sees the prompt before the response.
        layers: hidden layers to pool side by side, as in ``hidden_states``: 0 is the embeddings, -1 the last.
        likelihood: also pool how likely each token is under the encoder, two columns: its log-prob, and that plus the entropy of what could
            have stood there (nats). For causal language models: what the policy finds odd about its own text is a strong sign.
        dtype: precision of the encoder.
        batch_tokens: most tokens of a forward pass, padding included; on a CPU no more than 1,024.
        system_prompt: system turn put before the prompt, for encoders with a chat template.
        chat_template_kwargs: arguments of the chat template, such as ``enable_thinking``.
    """

    max_length: int = 512
    prompt: bool = True
    layers: tuple[int, ...] = (-1,)
    likelihood: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_tokens: int = 4096
    system_prompt: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class ContextRow:
    """One response in its context.

    Args:
        ids: token ids.
        types: token types, 1 for the second text of a pair.
        sentences: sentence of each token, -1 outside the response.
        head: tokens before the response.
    """

    ids: list[int]
    types: list[int]
    sentences: list[int]
    head: int


class ContextTokenizer:
    """Lays out prompt and response for an encoder, keeping track of sentences by character offsets.

    Args:
        tokenizer: a fast Hugging Face tokenizer; its own truncation and padding are switched off.
        encoding: how text is presented.
        causal: glue the response to the (templated) prompt, as a policy sees it, instead of forming a pair.
        max_length: limit in tokens.
    """

    def __init__(self, tokenizer: Any, encoding: Encoding, *, causal: bool, max_length: int) -> None:
        self.tokenizer, self.encoding, self.causal, self.max_length = tokenizer, encoding, causal, max_length
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        glued = causal and encoding.prompt
        self._before, self._between, self._after = ([], [], []) if glued else self._specials(pair=encoding.prompt)

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], char_spans: Sequence[Sequence[Span]]) -> list[ContextRow]:
        """Rows of ``N`` responses; sentences are numbered through in order of response, then position."""
        texts = [_SURROGATE.sub("\ufffd", text) for text in responses]
        encoded = encode_batch(self.tokenizer, [marked(self.tokenizer, text) for text in texts], add_special_tokens=False)
        prompt_ids = self._prompt_ids(prompts) if self.encoding.prompt else [[] for _ in texts]
        rows, first = [], 0
        for ids, response, text, spans in zip(prompt_ids, encoded, texts, char_spans, strict=True):
            rows.append(self._row(ids, response, text, [start for start, _ in spans], first))
            first += len(spans)
        return rows

    def render(self, prompt: Prompt) -> str:
        """The prompt as the encoder reads it, marked (``control_tokens.py``). Raises ConfigError when its chat template refuses it."""
        if not (self.causal and self.tokenizer.chat_template):
            return marked(self.tokenizer, _SURROGATE.sub("\ufffd", prompt_text(prompt)))
        turns = chat_turns(prompt, self.encoding.system_prompt)
        try:
            text = apply_template(self.tokenizer, turns, self.encoding.chat_template_kwargs, generation_prompt=True)
        except Exception as error:  # templates are code, and raise what they like
            roles = ", ".join(turn["role"] for turn in turns)
            raise ConfigError(
                f"the encoder's chat template refuses a prompt of the turns ({roles}): {unmarked(str(error))}; expected an encoder with "
                "the policy's template"
            ) from error
        return _SURROGATE.sub("\ufffd", text)

    def _prompt_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        texts = [self.render(prompt) for prompt in prompts]
        unique = list(dict.fromkeys(texts))
        # a chat template writes its special tokens itself
        encoded = encode_batch(self.tokenizer, unique, add_special_tokens=self.causal and not self.tokenizer.chat_template)
        table = {text: row.ids for text, row in zip(unique, encoded, strict=True)}
        return [table[text] for text in texts]

    def _row(self, prompt_ids: list[int], response: Encoded, text: str, starts: list[int], first: int) -> ContextRow:
        room = self.max_length - len(self._before) - len(self._between) - len(self._after)
        prompt_kept = min(len(prompt_ids), max(room - len(response.ids), self.max_length // 4))
        kept = min(len(response.ids), room - prompt_kept)
        sentences = _token_sentences(text, response.offsets[:kept], starts, first)
        head = [*self._before, *prompt_ids[len(prompt_ids) - prompt_kept :], *self._between]
        tail = [-1] * len(self._after)
        return ContextRow(
            ids=[*head, *response.ids[:kept], *self._after],
            types=[0] * len(head) + [int(self.encoding.prompt)] * (kept + len(tail)),
            sentences=[-1] * len(head) + sentences + tail,
            head=len(head),
        )

    def _specials(self, *, pair: bool) -> tuple[list[int], list[int], list[int]]:
        """Special tokens before, between and after one text or a pair of texts."""
        parts = [self._backend.encode("a", add_special_tokens=False) for _ in range(2)]
        width = len(parts[0].ids)
        whole = self._backend.post_process(parts[0], parts[1] if pair else None, add_special_tokens=True)
        text = [i for i, special in enumerate(whole.special_tokens_mask) if not special]
        between = whole.ids[text[width - 1] + 1 : text[width]] if pair else []
        return list(whole.ids[: text[0]]), list(between), list(whole.ids[text[-1] + 1 :])


def _token_sentences(text: str, offsets: Sequence[Span], starts: list[int], first: int) -> list[int]:
    """Sentence of each token: that of its first character that is not white space, as for the policy's own tokens."""
    out, k = [], 0
    for begin, end in offsets:
        piece = text[begin:end]
        stripped = piece.lstrip()
        position = begin + len(piece) - len(stripped) if stripped else begin
        while k + 1 < len(starts) and starts[k + 1] <= position:
            k += 1
        out.append(first + k)
    return out
