"""Scores from a reward model in this process: a value head read at the last token, or a sequence classifier with one output."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from aapa_lightning.anchor.encoder import hash_tensors
from aapa_lightning.anchor.reference_text import REWARD_TOKEN
from aapa_lightning.data.control_tokens import encode_batch
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.files import refuse_missing
from aapa_lightning.loading import check_weights
from aapa_lightning.logprobs.inputs import rotary_limit
from aapa_lightning.logprobs.padding import Side, sees_padding
from aapa_lightning.types import pad_right

#: The last three are what code that comes with the weights raises under another version of transformers than its own.
_LOADING = (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError, RuntimeError)


class ValueModel:
    """A frozen reward model with its tokenizer. Texts of like length share a forward pass, padded on the tokenizer's side.

    Args:
        path: folder or Hub name. ``*ForSequenceClassification`` is loaded as such, anything else as ``AutoModel``, whose first output is
            one value for a text (``[B]``, ``[B, 1]``) or for each of its tokens (``[B, L]``, ``[B, L, 1]``; the last token's counts).
        dtype: ``auto`` keeps the precision of the file.
        batch_tokens: tokens of a forward pass, padding included.
        ends_with_reward_token: whether texts end with POLAR's reward token; what the tokenizer adds after it is dropped.
        trust_remote_code: run code that comes with the weights.

    Raises:
        ConfigError: it cannot be loaded, lacks weights, has more than one output, or its tokenizer lacks the reward token.
    """

    def __init__(
        self, path: str, *, dtype: str = "auto", batch_tokens: int = 16384, ends_with_reward_token: bool, trust_remote_code: bool = False
    ) -> None:
        self.path, self.batch_tokens = path, batch_tokens
        self.tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        self._end = reward_token_id(self.tokenizer, path) if ends_with_reward_token else None
        self.model = _load_model(path, dtype, trust_remote_code)
        pad = self.tokenizer.pad_token_id
        self._pad = (self.tokenizer.eos_token_id or 0) if pad is None else pad
        text_config = self.model.config.get_text_config()
        text_config.pad_token_id = self._pad  # a classifier finds its last token by this id
        self._left = self.tokenizer.padding_side == "left"
        self._positions = self._left and "position_ids" in inspect.signature(self.model.forward).parameters
        positions = (getattr(text_config, "max_position_embeddings", None), rotary_limit(self.model))
        #: Beyond them rotary positions of some models change with length, and a score with the texts beside its own.
        self.max_tokens = min((limit for limit in positions if limit is not None), default=None)

    @torch.no_grad()
    def scores(self, texts: Sequence[str], where: Sequence[str]) -> Tensor:
        """Score ``N`` marked texts (``reference_text.py``): float32 ``[N]`` on the model's device, the same whatever texts come with them.

        Raises:
            ConfigError: the model's output is not one value for a text or a token.
            DataError: a text is longer than the model's positions; names the record.
        """
        rows = [self._cut(row.ids) for row in encode_batch(self.tokenizer, texts, add_special_tokens=True)]
        for ids, name in zip(rows, where, strict=True):
            if self.max_tokens is not None and len(ids) > self.max_tokens:
                raise DataError(f"{name}: {len(ids)} tokens, but {self.path} has {self.max_tokens} positions; lower max_tokens")
        scores = torch.zeros(len(rows), device=self.model.device)
        # a reward is computed within the policy's step, whose precision is not the reward model's
        with torch.autocast(scores.device.type, enabled=False):
            for batch in self._batches([len(ids) for ids in rows]):
                scores[batch] = self._forward([rows[i] for i in batch])
        return scores

    def fingerprint(self) -> str:
        """Hex digest of weights and vocabulary."""
        return hash_tensors(vocabulary(self.tokenizer), self.model.state_dict())

    def _cut(self, ids: list[int]) -> list[int]:
        return ids if self._end is None else ids[: len(ids) - ids[::-1].index(self._end)]

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Indices in order of length; each batch as large as the budget allows, at least one."""
        batch: list[int] = []
        side: Side = "left" if self._left else "right"
        size = int(getattr(self.model.config.get_text_config(), "vocab_size", 0) or 32)
        apart = len(set(lengths)) > 1 and sees_padding(self.model, self._values, size, self.model.device, side, self._pad)
        for i in sorted(range(len(lengths)), key=lengths.__getitem__):
            if batch and ((len(batch) + 1) * lengths[i] > self.batch_tokens or (apart and lengths[i] != lengths[batch[0]])):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _forward(self, rows: list[list[int]]) -> Tensor:
        ids, mask = pad_right(rows, self._pad), pad_right([[1] * len(row) for row in rows], 0)
        if self._left:
            shifts = [int(mask.shape[1]) - len(row) for row in rows]
            ids, mask = (torch.stack([row.roll(by) for row, by in zip(rows_, shifts, strict=True)]) for rows_ in (ids, mask))
        return self._values(ids.to(self.model.device), mask.to(self.model.device))

    def _values(self, ids: Tensor, mask: Tensor) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        if self._positions:  # otherwise a padded text would begin at another position
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        return self._read(self.model(**inputs)[0].float(), inputs["attention_mask"])

    def _read(self, output: Tensor, mask: Tensor) -> Tensor:
        values = output.squeeze(-1) if output.dim() == 3 else output
        if values.shape == mask.shape:
            last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
            return values.gather(1, last[:, None])[:, 0]
        if values.shape in ((len(mask),), (len(mask), 1)):
            return values.reshape(-1)
        raise ConfigError(
            f"reward model {self.path!r}: expected one value for each text or each token, found an output of shape {tuple(output.shape)} "
            f"for {len(mask)} texts of {mask.shape[1]} tokens; has it a value head?"
        )


def load_tokenizer(path: str, *, trust_remote_code: bool) -> Any:
    """A reward model's tokenizer. Raises ConfigError when it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        refuse_missing(path)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except _LOADING as error:
        raise _cannot_load(path, "tokenizer", error) from error


def reward_token_id(tokenizer: Any, path: str) -> int:
    """Id of POLAR's reward token. Raises ConfigError when the tokenizer has no such token."""
    found = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
    if found in (None, tokenizer.unk_token_id) or tokenizer(f"a{REWARD_TOKEN}", add_special_tokens=False)["input_ids"][-1] != found:
        raise ConfigError(
            f"the tokenizer of {path!r} has no token {REWARD_TOKEN}, which ends POLAR's input; give a template for another reward model"
        )
    return int(found)


def vocabulary(tokenizer: Any) -> str:
    """The vocabulary as one string, for fingerprints."""
    return repr(list(itertools.chain.from_iterable(sorted(tokenizer.get_vocab().items()))))


def _load_model(path: str, dtype: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    try:
        refuse_missing(path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
        loader: Any = AutoModelForSequenceClassification if classifier else AutoModel
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": trust_remote_code}
        model, info = loader.from_pretrained(path, dtype=dtype, **options)
    except _LOADING as error:
        raise _cannot_load(path, "weights", error) from error
    if classifier and model.config.num_labels != 1:
        raise ConfigError(
            f"reward model {path!r} has {model.config.num_labels} outputs; expected 1 (SequenceClassifierDiscriminator takes two classes)"
        )
    # a classifier reads its pooling layer
    check_weights(info, f"reward model {path!r}", new=() if classifier else [name for name in info["missing_keys"] if "pooler" in name])
    return model.eval().requires_grad_(False)


def _cannot_load(path: str, what: str, error: Exception) -> ConfigError:
    if "trust_remote_code" in str(error):
        return ConfigError(
            f"reward model {path!r} brings code of its own, which is not run unless asked for: read it, then set trust_remote_code: true"
        )
    return ConfigError(
        f"cannot load the {what} of the reward model {path!r}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    )
