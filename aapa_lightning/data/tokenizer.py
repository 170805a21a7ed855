"""A byte-level BPE tokenizer trained on the user's own text: for from-scratch policies, tests and the quickstart."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

from aapa_lightning.chat_templates import CHATML

#: The template of tokenizers that are trained here.
CHAT_TEMPLATE = CHATML


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: every string encodes and decodes back unchanged.

    Args:
        texts: training text.
        vocab_size: upper bound on the vocabulary, special tokens and the 256 bytes included; at least 259.
        chat_template: Jinja template; None for a plain-text tokenizer.

    Returns:
        A fast tokenizer with ``<|im_end|>`` as EOS, ``<|pad|>`` as padding and ``<|im_start|>``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",  # noqa: S106 - a token of the vocabulary, not a secret
        eos_token="<|im_end|>",  # noqa: S106
        extra_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )
