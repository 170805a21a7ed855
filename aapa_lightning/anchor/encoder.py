"""A frozen encoder: responses in the context of their prompts -> one embedding per sentence."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aapa_kernels import sentence_pool
from aapa_lightning.anchor.context import ContextTokenizer, Encoding, Prompt
from aapa_lightning.anchor.forward import RowEncoder
from aapa_lightning.anchor.onednn import use_onednn
from aapa_lightning.anchor.segment import Span
from aapa_lightning.errors import ConfigError
from aapa_lightning.files import refuse_missing
from aapa_lightning.loading import check_weights
from aapa_lightning.logprobs.inputs import rotary_limit


@dataclass(slots=True)
class HiddenBatch:
    """Hidden states of ``B`` responses with their ``s`` sentences, as the kernels take them.

    Args:
        hidden: ``[B, L, D]`` in the encoder's type.
        starts: int64 ``[s]``, each sentence's first token among the ``B L``, ascending.
        lengths: int64 ``[s]``, tokens seen of it.
        offsets: int64 ``[B + 1]``, sentences of response b are ``offsets[b] .. offsets[b + 1] - 1``.
        sentences: int64 ``[s]``, their numbers among all ``S``.
    """

    hidden: Tensor
    starts: Tensor
    lengths: Tensor
    offsets: Tensor
    sentences: Tensor


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

    @property
    def offsets(self) -> Tensor:
        """Sentences of response i are ``offsets[i] .. offsets[i + 1] - 1``: int64 ``[N + 1]``."""
        return torch.searchsorted(self.response_index, torch.arange(self.size + 1, device=self.response_index.device))


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
        limit = rotary_limit(self.model)
        if limit is not None and max_length > limit:
            raise ConfigError(
                f"encoder {path!r}: its rotary positions change with length beyond {limit} tokens (`dynamic`, `longrope`), so that a "
                f"sentence would depend on the texts beside its own; set encoding.max_length to {limit} or less, not {encoding.max_length}"
            )
        self.context = ContextTokenizer(self.tokenizer, encoding, causal=causal, max_length=max_length)
        self._forward = RowEncoder(self.model, encoding, self.tokenizer.pad_token_id or 0, causal=causal)
        use_onednn(self.model)

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
        sizes = torch.tensor([len(spans) for spans in char_spans], dtype=torch.int64)
        index = torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(self.model.device)
        embeddings = torch.zeros(len(index), self.hidden_size, device=index.device)
        counts = torch.zeros_like(index)
        for batch in self.batches(prompts, responses, char_spans):
            embeddings[batch.sentences] = sentence_pool(batch.hidden, batch.starts, batch.lengths)
            counts[batch.sentences] = batch.lengths
        return Embedded(embeddings, counts, index, len(responses))

    @torch.no_grad()
    def batches(self, prompts: Sequence[Prompt], responses: Sequence[str], char_spans: Sequence[Sequence[Span]]) -> Iterator[HiddenBatch]:
        """Encode responses of similar length together, a prompt that many share once; those of which the encoder sees nothing are left out.

        Args:
            prompts: as for a call.
            responses: as for a call.
            char_spans: as for a call.
        """
        rows = self.context(prompts, responses, char_spans)
        first = [0, *itertools.accumulate(len(spans) for spans in char_spans)]
        seen = [i for i, row in enumerate(rows) if any(s >= 0 for s in row.sentences)]
        device = self.model.device
        for encoded in self._forward(rows, seen):
            width = encoded.hidden.shape[1]
            numbers = [range(first[i], first[i + 1]) for i in encoded.rows]
            spans = [
                _token_spans(rows[i].sentences[skipped:], b * width, numbers[b])
                for b, (i, skipped) in enumerate(zip(encoded.rows, encoded.skipped, strict=True))
            ]
            starts, lengths = torch.tensor([pair for row in spans for pair in row], device=device).unbind(1)
            yield HiddenBatch(
                encoded.hidden,
                starts.contiguous(),
                lengths.contiguous(),
                torch.tensor([0, *itertools.accumulate(map(len, numbers))], device=device),
                torch.tensor([s for row in numbers for s in row], device=device),
            )


def _token_spans(sentences: Sequence[int], base: int, numbers: range) -> list[tuple[int, int]]:
    """First token (plus ``base``) and number of tokens of each sentence in ``numbers``; 0 tokens for one that was cut off."""
    counts = Counter(sentences)
    position = base + next(t for t, s in enumerate(sentences) if s >= 0)
    spans = []
    for number in numbers:
        spans.append((position, counts[number]))
        position += counts[number]
    return spans


def _load(path: str, trust_remote_code: bool, *, language_model: bool) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    loader: Any = AutoModelForCausalLM if language_model else AutoModel
    try:
        refuse_missing(path)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": trust_remote_code}
        model, info = loader.from_pretrained(path, dtype="auto", **options)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"cannot load the encoder {path!r}: expected a folder (or Hub name) with a model and its tokenizer, found: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if model.config.is_encoder_decoder:
        raise ConfigError(f"encoder {path!r} is an encoder-decoder ({model.config.model_type}); expected an encoder or a causal LM")
    if not tokenizer.is_fast:
        raise ConfigError(f"encoder {path!r} has no fast tokenizer, which maps characters to tokens; expected a tokenizer.json beside it")
    missing = [name for name in info["missing_keys"] if "pooler" not in name]
    if language_model and any(name.startswith(("cls.", "lm_head", "predictions")) for name in missing):
        raise ConfigError(
            f"encoding.likelihood: expected a causal language model, but {path!r} ({model.config.model_type}) has no head for it"
        )
    # what lies on the body is not read: heads of any kind, and pooling layers
    check_weights(info | {"missing_keys": missing, "unexpected_keys": ()}, f"encoder {path!r}")
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
    for name in sorted(tensors):  # one at a time: each may be gathered from several ranks when it is looked at
        value = tensors[name]
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
