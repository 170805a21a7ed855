"""Embeddings of reference texts, made once and kept: the expert side of a discriminator that compares."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from aapa_lightning.anchor.encoder import Embedded, FrozenEncoder
from aapa_lightning.anchor.segment import Segmenter
from aapa_lightning.types import Record

#: Most bytes of embeddings that are kept, on the CPU.
LIMIT = 256 * 2**20


class ReferenceCache:
    """Embeds reference texts; those that were used last are kept.

    Each text is encoded by itself. In a batch its last digits would depend on its neighbours, and a run that is resumed meets it in another
    company than the run that went on.

    Args:
        encoder: frozen.
        segmenter: how texts are split.
        limit: bytes of embeddings kept.
    """

    def __init__(self, encoder: FrozenEncoder, segmenter: Segmenter, limit: int = LIMIT) -> None:
        self.encoder, self.segmenter, self.limit = encoder, segmenter, limit
        self._kept: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()
        self._bytes = 0

    def __call__(self, chosen: Sequence[tuple[Record, str]]) -> tuple[Embedded, list[int]]:
        """Embed the reference text of each request.

        Args:
            chosen: record and reference text, ``N``.

        Returns:
            Each different text once, on the encoder's device, and the row of each request.
        """
        keys = [_key(record, text) for record, text in chosen]
        rows: dict[bytes, int] = {}
        found: list[tuple[Tensor, Tensor]] = []
        for key, (record, text) in zip(keys, chosen, strict=True):
            if rows.setdefault(key, len(rows)) == len(found):
                found.append(self._embedded(key, record, text))
        device = self.encoder.model.device
        sizes = torch.tensor([len(counts) for _, counts in found], dtype=torch.int64)
        embeddings = torch.cat([part for part, _ in found]) if found else torch.zeros(0, self.encoder.hidden_size)
        counts = torch.cat([part for _, part in found]) if found else torch.zeros(0, dtype=torch.int64)
        index = torch.repeat_interleave(torch.arange(len(found)), sizes)
        return Embedded(embeddings.to(device), counts.to(device), index.to(device), len(found)), [rows[key] for key in keys]

    def _embedded(self, key: bytes, record: Record, text: str) -> tuple[Tensor, Tensor]:
        kept = self._kept.pop(key, None)
        if kept is None:
            embedded = self.encoder([record.prompt], [text], [self.segmenter(text)])
            kept = embedded.embeddings.cpu(), embedded.counts.cpu()
            self._bytes += kept[0].nbytes
        self._kept[key] = kept
        while self._bytes > self.limit and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1][0].nbytes
        return kept


def _key(record: Record, text: str) -> bytes:
    # surrogates that are no text must not end a run
    return hashlib.sha256(repr((record.prompt, text)).encode(errors="surrogatepass")).digest()
