"""A copy of a tokenizer to which control tokens are text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def with_other_names(backend: Any, names: set[str], prefix: str) -> Tokenizer | None:
    """A copy of a tokenizer that knows some added tokens by other names, so that their own are text to it.

    Args:
        backend: a ``tokenizers.Tokenizer``, or whatever a tokenizer has in its place.
        names: added tokens.
        prefix: stands before their names in the copy. Their ids stay.

    Returns:
        The copy, without truncation and padding; None where it cannot be made.
    """
    from tokenizers import Tokenizer

    try:
        spec = json.loads(backend.to_str())
        ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
        copy = Tokenizer.from_str(json.dumps(_rename(spec, names, prefix)))
    except Exception:  # no backend, or one with parts written in Python, or of another format: tokenizers raises bare exceptions
        return None
    copy.no_truncation()
    copy.no_padding()
    same = all(copy.token_to_id(prefix + name if name in names else name) == token for name, token in ids.items())
    return copy if same else None


def _rename(spec: dict[str, Any], names: set[str], prefix: str) -> dict[str, Any]:
    def new(name: Any) -> Any:
        return prefix + name if name in names else name

    for token in spec["added_tokens"]:
        if token["content"] in names:
            token |= {"content": new(token["content"]), "normalized": False}
    model = spec["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {new(piece): index for piece, index in model["vocab"].items()}
    else:  # a unigram model: pieces with their scores
        model["vocab"] = [[new(piece), *score] for piece, *score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = new(model["unk_token"])
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if not _touches(merge, names)]
    return spec


def _touches(merge: Sequence[str] | str, names: set[str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return not names.isdisjoint((left, right, left + right))
