"""A judge of whole responses: any sequence classifier or scalar reward model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from aapa_lightning.anchor.base import Discriminator
from aapa_lightning.anchor.encoder import hash_tensors
from aapa_lightning.anchor.encoder_head import pick_reference
from aapa_lightning.anchor.onednn import use_onednn
from aapa_lightning.data.control_tokens import encode_batch, marked
from aapa_lightning.data.records import prompt_text
from aapa_lightning.documents import read_json
from aapa_lightning.errors import ConfigError
from aapa_lightning.files import refuse_missing, write_json
from aapa_lightning.loading import check_weights
from aapa_lightning.logprobs.inputs import rotary_limit
from aapa_lightning.logprobs.padding import Side, sees_padding
from aapa_lightning.types import Record, SentenceSpans

#: What ``discriminator.json`` holds.
_KINDS: dict[str, Any] = {
    "model": str,
    "template": str,
    "max_length": int,
    "temperature": float,
    "batch_size": int,
    "batch_tokens": int,
    "fingerprint": str,
}
_FIELD = re.compile(r"\{(prompt|reference|response)\}")


class SequenceClassifierDiscriminator(Discriminator):
    r"""Scores a response as one sentence with an ``AutoModelForSequenceClassification``.

    A model with one output gives its value, one with two gives the difference of logits (second minus first); both are divided by
    ``temperature``. A template with ``{reference}`` makes the score depend on an expert response, as POLAR's does (arXiv 2507.05197):
    ``"{prompt}\n{reference}<|reward|>{prompt}\n{response}[UNUSED_TOKEN_130]"``.

    Args:
        model: folder or Hub name.
        template: the input; ``{prompt}``, ``{response}`` and ``{reference}`` are filled in.
        max_length: tokens; longer inputs lose their beginning, so that the end of the response stays.
        temperature: divides the score; reward models are rarely calibrated.
        batch_size: most responses in one forward pass.
        batch_tokens: most tokens in one forward pass, padding included.
        trust_remote_code: run code that comes with the weights.
    """

    model: Any

    whole_response = True

    def __init__(
        self,
        model: str,
        template: str = "{prompt}\n{response}",
        max_length: int = 512,
        temperature: float = 1.0,
        batch_size: int = 16,
        batch_tokens: int = 8192,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if "{response}" not in template or temperature <= 0:
            raise ConfigError(f"expected a template with {{response}} and a temperature above 0, found {template!r} and {temperature}")
        try:
            refuse_missing(model)
            self.tokenizer = AutoTokenizer.from_pretrained(model, truncation_side="left", trust_remote_code=trust_remote_code)
            self.model, info = AutoModelForSequenceClassification.from_pretrained(
                model, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot load the sequence classifier {model!r}: {str(error).splitlines()[0]}") from error
        check_weights(info, f"sequence classifier {model!r}")
        if self.model.config.num_labels > 2:
            raise ConfigError(f"sequence classifier {model!r} has {self.model.config.num_labels} outputs; expected 1 or 2")
        self.model.eval().requires_grad_(False)
        use_onednn(self.model)
        self.settings = {
            "model": model,
            "template": template,
            "max_length": max_length,
            "temperature": temperature,
            "batch_size": batch_size,
            "batch_tokens": batch_tokens,
        }
        limit = rotary_limit(self.model)
        if limit is not None and max_length > limit:
            raise ConfigError(
                f"sequence classifier {model!r}: its rotary positions change with length beyond {limit} tokens (`dynamic`, `longrope`), so "
                f"that a score would depend on the texts beside its own; set max_length to at most {limit}, found {max_length}"
            )
        self.template, self.max_length, self.temperature = template, max_length, temperature
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self.needs_experts = "{reference}" in template
        # the judged position is found from this id, also where the tokenizer pads with EOS
        self.model.config.pad_token_id = self.tokenizer.pad_token_id

    @torch.no_grad()
    def score(self, responses: Sequence[str], records: Sequence[Record], spans: SentenceSpans) -> Tensor:
        """Log-odds float32 ``[S]``: every sentence of a response gets the response's own score."""
        texts = [self._fill(text, record) for text, record in zip(responses, records, strict=True)]
        scores = torch.zeros(len(texts), device=self.model.device)
        encoded = encode_batch(self.tokenizer, texts, add_special_tokens=True, max_length=self.max_length)
        rows = {"input_ids": [row.ids for row in encoded], "token_type_ids": [row.types for row in encoded]}
        names = [name for name in rows if name in self.tokenizer.model_input_names]
        for batch in self._batches([len(row.ids) for row in encoded]):
            chosen = {name: [rows[name][i] for i in batch] for name in names}
            inputs = self.tokenizer.pad(chosen, padding=True, return_tensors="pt").to(self.model.device)
            logits = self.model(**inputs).logits.float()
            scores[batch] = logits[:, -1] - (logits[:, 0] if logits.shape[-1] == 2 else 0.0)
        return (scores / self.temperature)[spans.response_index.to(scores.device)]

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Indices in order of length, as many together as both budgets allow, at least one."""
        most = self.batch_size if self.tokenizer.pad_token_id is not None else 1
        apart = most > 1 and len(set(lengths)) > 1 and self._sees_padding()
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lengths.__getitem__):
            full = len(batch) == most or (len(batch) + 1) * lengths[i] > self.batch_tokens
            if batch and (full or (apart and lengths[i] != lengths[batch[0]])):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _sees_padding(self) -> bool:
        side: Side = "left" if self.tokenizer.padding_side == "left" else "right"

        def read(ids: Tensor, mask: Tensor) -> Tensor:
            logits: Tensor = self.model(input_ids=ids, attention_mask=mask.long()).logits
            return logits

        size = int(getattr(self.model.config.get_text_config(), "vocab_size", 0) or 32)
        return sees_padding(self.model, read, size, self.model.device, side, self.tokenizer.pad_token_id)

    def _fill(self, response: str, record: Record) -> str:
        parts = {"prompt": prompt_text(record.prompt), "response": response}
        if self.needs_experts:
            parts["reference"] = pick_reference(response, record, strict=False)
        values = {name: marked(self.tokenizer, part) for name, part in parts.items()}
        # one pass: text that happens to hold "{response}" is not filled in again
        return _FIELD.sub(lambda match: values[match.group(1)], self.template)

    def fingerprint(self) -> str:
        """Hex digest of weights and settings."""
        return hash_tensors(repr([self.template, self.max_length, self.temperature]), self.model.state_dict())

    def to(self, device: torch.device | str) -> Self:
        """Move the weights; returns itself."""
        self.model.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Write ``discriminator.json``; the weights stay where they are."""
        write_json(
            Path(folder) / "discriminator.json", {"class": "sequence_classifier", **self.settings, "fingerprint": self.fingerprint()}
        )

    @classmethod
    def load(cls, folder: Path, *, encoder: str | None = None, trust_remote_code: bool = False) -> Self:
        """Read what ``save`` wrote; ``encoder`` says where the weights lie now, if they moved.

        Raises:
            ConfigError: a file is missing or damaged, or the weights are others than those that were saved.
        """
        file = Path(folder) / "discriminator.json"
        settings = read_json(file, **_KINDS)
        expected = settings.pop("fingerprint", None)
        settings.pop("class", None)
        if encoder is not None:
            settings["model"] = encoder
        try:
            judge = cls(**settings, trust_remote_code=trust_remote_code)
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{file} is damaged or of another version: {error}") from error
        if judge.fingerprint() != expected:
            raise ConfigError(f"{file}: expected weights with fingerprint {expected}, found {judge.fingerprint()} at {settings['model']!r}")
        return judge
