"""A frozen encoder: responses in the context of their prompts -> one embedding per sentence."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aapa_kernels.sentence_pool import sentence_pool
from aapa_lightning.anchor.context import ContextRow, ContextTokenizer, Encoding, Prompt
from aapa_lightning.anchor.segment import Span
from aapa_lightning.errors import ConfigError
from aapa_lightning.logprobs import token_logprobs
from aapa_lightning.types import pad_right


@dataclass(slots=True)
class Embedded:
    """Sentence embeddings of ``N`` responses.

    Args:
        embeddings: float32 ``[S, D]``, the mean hidden state of each sentence; 0 where nothing of it was seen.
        counts: int64 ``[S]``, encoder tokens seen of each sentence; 0 when it is empty or was cut off.
        response_index: int64 ``[S]``.
        size: ``N``.
    """

    embeddings: Tensor
    counts: Tensor
    response_index: Tensor
    size: int


class FrozenEncoder:
    """Any ``AutoModel`` that is not an encoder-decoder, with its own fast tokenizer, in eval mode and without gradients.

    A causal language model sees the prompt through its chat template where it has one, so that its hidden states are those of a policy
    in its own format; an encoder sees prompt and response as a pair.

    Args:
        path: folder or Hub name.
        encoding: how text is presented.
        trust_remote_code: run code that comes with the weights.

    Raises:
        ConfigError: the folder does not exist, has no fast tokenizer, lacks weights, or is an encoder-decoder.
    """

    def __init__(self, path: str, encoding: Encoding, *, trust_remote_code: bool = False) -> None:
        self.path, self.encoding = path, encoding
        self.model, self.tokenizer = _load(path, trust_remote_code, language_model=encoding.likelihood)
        self._fingerprint = _hash_encoder(self.model, self.tokenizer)
        self.model.to(getattr(torch, encoding.dtype)).eval().requires_grad_(False)
        text_config = self.model.config.get_text_config()
        self.hidden_size: int = text_config.hidden_size * len(encoding.layers) + 2 * encoding.likelihood
        causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in self.model.config.architectures or ())
        positions = getattr(text_config, "max_position_embeddings", None) or encoding.max_length
        max_length = min(encoding.max_length, positions, self.tokenizer.model_max_length)
        self.context = ContextTokenizer(self.tokenizer, encoding, causal=causal, max_length=max_length)

    def fingerprint(self) -> str:
        """Hex digest of architecture, weights (as stored) and vocabulary."""
        return self._fingerprint

    def to(self, device: torch.device | str) -> FrozenEncoder:
        """Move the weights; returns itself."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], char_spans: Sequence[Sequence[Span]]) -> Embedded:
        """Embed the sentences of ``N`` responses.

        Args:
            prompts: their prompts, ``N``; ignored unless the encoder sees prompts.
            responses: the texts.
            char_spans: their sentences.

        Returns:
            Embeddings on the encoder's device, sentences in order of response, then position.
        """
        lengths = [len(spans) for spans in char_spans]
        index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
        rows = self.context(prompts, responses, char_spans)
        counts = torch.bincount(torch.tensor([s for row in rows for s in row.sentences if s >= 0], dtype=torch.int64), minlength=len(index))
        device = self.model.device
        embeddings = torch.zeros(len(index), self.hidden_size, device=device)
        for batch in _batches([row for row in rows if any(s >= 0 for s in row.sentences)], self.encoding.batch_tokens):
            sentences = pad_right([row.sentences for row in batch], -1)
            seen, local = torch.unique(sentences[sentences >= 0], return_inverse=True)
            numbered = torch.full_like(sentences, -1).masked_scatter(sentences >= 0, local)
            embeddings[seen.to(device)] = sentence_pool(self._hidden(batch), numbered.to(device), len(seen))
        return Embedded(embeddings, counts.to(device), index.to(device), len(responses))

    def _hidden(self, batch: list[ContextRow]) -> Tensor:
        device = self.model.device
        inputs = {
            "input_ids": pad_right([row.ids for row in batch], self.tokenizer.pad_token_id or 0).to(device),
            "attention_mask": pad_right([[1] * len(row.ids) for row in batch], 0).to(device),
        }
        if getattr(self.model.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = pad_right([row.types for row in batch], 0).to(device)
        cache = {"use_cache": False} if self.context.causal else {}
        if self.encoding.layers == (-1,) and not self.encoding.likelihood:
            return self.model(**inputs, **cache).last_hidden_state
        outputs = self.model(**inputs, **cache, output_hidden_states=True)
        parts = [outputs.hidden_states[layer] for layer in self.encoding.layers]
        if self.encoding.likelihood:
            parts = [part.float() for part in parts] + [_likelihood(outputs.logits, inputs["input_ids"])]
        return torch.cat(parts, -1)


def _likelihood(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-prob of each token, and that plus the entropy, float32 ``[B, L, 2]``; 0 for the first, which nothing predicts."""
    logprobs, entropy = token_logprobs(logits[:, :-1], ids[:, 1:], entropy=True)
    columns = torch.stack([logprobs, logprobs + (0.0 if entropy is None else entropy)], -1)
    return torch.nn.functional.pad(columns, (0, 0, 1, 0))


def _batches(rows: list[ContextRow], batch_tokens: int) -> Iterator[list[ContextRow]]:
    """Rows of similar length together; at least one row a batch."""
    batch: list[ContextRow] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if batch and len(row.ids) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _load(path: str, trust_remote_code: bool, *, language_model: bool) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    loader: Any = AutoModelForCausalLM if language_model else AutoModel
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model, info = loader.from_pretrained(path, dtype="auto", output_loading_info=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"cannot load the encoder {path!r}: expected a folder (or Hub name) with a model and its tokenizer, found: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if model.config.is_encoder_decoder:
        raise ConfigError(f"encoder {path!r} is an encoder-decoder ({model.config.model_type}); expected an encoder or a causal LM")
    if not tokenizer.is_fast:
        raise ConfigError(f"encoder {path!r} has no fast tokenizer, which maps characters to tokens; expected a tokenizer.json beside it")
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if language_model and any(name.startswith(("cls.", "lm_head", "predictions")) for name in missing):
        raise ConfigError(
            f"encoding.likelihood: expected a causal language model, but {path!r} ({model.config.model_type}) has no head for it"
        )
    if missing:
        raise ConfigError(f"encoder {path!r} lacks the weights {', '.join(missing[:3])} ({len(missing)} in all); random ones would be used")
    return model, tokenizer


def _hash_encoder(model: Any, tokenizer: Any) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest = hashlib.sha256(repr((model.config.model_type, vocabulary)).encode())
    # unused here, and random where the checkpoint has none
    weights = {name: value for name, value in model.state_dict().items() if "pooler" not in name}
    return hash_tensors(digest.hexdigest(), weights)


def hash_tensors(salt: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of tensors, in order of name."""
    digest = hashlib.sha256(salt.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
