"""POLAR and other reward models as judges of whole responses, in this process or behind a server."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from aapa_lightning.anchor.base import Discriminator
from aapa_lightning.anchor.encoder import hash_tensors
from aapa_lightning.anchor.kinds import REWARD_MODEL_KINDS
from aapa_lightning.anchor.reference_text import Wrapper, polar_text, template_text
from aapa_lightning.anchor.server import ScoreServer
from aapa_lightning.anchor.value_model import ValueModel, load_tokenizer, reward_token_id, vocabulary
from aapa_lightning.data.control_tokens import broken_up
from aapa_lightning.documents import read_json
from aapa_lightning.errors import ConfigError, DataError, choose
from aapa_lightning.files import write_json
from aapa_lightning.thinking import Thinking
from aapa_lightning.types import Record, SentenceSpans

_OVER: dict[str, Callable[[Tensor], Tensor]] = {"mean": lambda scores: scores.mean(), "max": lambda scores: scores.max()}
#: Settings that do not decide a score, or are digested by themselves.
_NOT_DIGESTED = ("model", "server", "device", "batch_tokens")


def answer_of(text: str) -> str:
    """A response without its thinking and without white space around it."""
    return Thinking().answer(text).strip()


class RewardModelDiscriminator(Discriminator):
    """Scores a whole response by a reward model that compares it with the record's expert responses.

    POLAR's scores (arXiv 2507.05197) are about 0 for the reference itself and about -11 for a wrong answer, and are comparable within a
    prompt alone; ``score`` divides them by ``temperature``. Thinking is cut off responses and experts. An expert response is never compared
    with itself: the record's others are its references. A rollout that repeats the only expert response is compared with it.

    Weights and tokenizer are loaded when they are first needed.

    Args:
        model: folder or Hub name of weights and tokenizer; of the tokenizer alone where a server scores.
        template: input with ``{response}``, and ``{prompt}`` and ``{reference}`` where wanted; default POLAR's (``polar_text``).
        server: scores there instead of in this process.
        temperature: divides the score; default 5 for POLAR's input, 1 for a template.
        over_references: ``mean`` or ``max`` over the scores against several expert responses.
        max_references: the first so many expert responses alone.
        subtract_self: subtract the reference's score against itself, which differs from prompt to prompt.
        wrapper: POLAR's; ``pretrain`` for a model that was not fine-tuned.
        max_tokens: tokens of the input.
        max_response_tokens: tokens of a reference and of a response.
        dtype: precision of the weights; ``auto`` as stored.
        batch_tokens: tokens of a forward pass, padding included.
        device: where the weights go; an ``AnchorCallback`` moves them to the policy's.
        trust_remote_code: run code that comes with the weights or the tokenizer, as POLAR's.

    Raises:
        ConfigError: options are illegal or contradict each other.
    """

    whole_response = True

    def __init__(
        self,
        model: str,
        *,
        template: str | None = None,
        server: ScoreServer | None = None,
        temperature: float | None = None,
        over_references: Literal["mean", "max"] = "mean",
        max_references: int | None = None,
        subtract_self: bool = False,
        wrapper: Wrapper = "sft",
        max_tokens: int = 16384,
        max_response_tokens: int = 4096,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        batch_tokens: int = 16384,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        choose(_OVER, over_references, "over_references")
        choose({"sft": 0, "pretrain": 0}, wrapper, "wrapper")
        _check(template, temperature, max_references, subtract_self, max_tokens, max_response_tokens)
        self.temperature = temperature or (5.0 if template is None else 1.0)
        self.needs_experts = template is None or "{reference}" in template
        self.settings: dict[str, Any] = {
            "model": model,
            "template": template,
            "server": None if server is None else asdict(server),
            "temperature": self.temperature,
            "over_references": over_references,
            "max_references": max_references,
            "subtract_self": subtract_self,
            "wrapper": wrapper,
            "max_tokens": max_tokens,
            "max_response_tokens": max_response_tokens,
            "dtype": dtype,
            "batch_tokens": batch_tokens,
            "device": device,
        }
        self.server, self.device, self.trust_remote_code = server, device, trust_remote_code

    @cached_property
    def local(self) -> ValueModel:
        """The model in this process; loaded at the first use."""
        settings = self.settings
        judge = ValueModel(
            settings["model"],
            dtype=settings["dtype"],
            batch_tokens=settings["batch_tokens"],
            ends_with_reward_token=settings["template"] is None,
            trust_remote_code=self.trust_remote_code,
        )
        if judge.max_tokens is not None and settings["max_tokens"] > judge.max_tokens:
            raise ConfigError(
                f"max_tokens: expected at most the {judge.max_tokens} positions of {settings['model']!r}, found {settings['max_tokens']}; "
                "lower it, and max_response_tokens with it"
            )
        if self.device is not None:
            judge.model.to(self.device)
        return judge

    @cached_property
    def tokenizer(self) -> Any:
        """The reward model's tokenizer; loaded at the first use."""
        if self.server is None:
            return self.local.tokenizer
        tokenizer = load_tokenizer(self.settings["model"], trust_remote_code=self.trust_remote_code)
        if self.settings["template"] is None:
            reward_token_id(tokenizer, self.settings["model"])
        return tokenizer

    def score(self, responses: Sequence[str], records: Sequence[Record], spans: SentenceSpans) -> Tensor:
        """Scores over the temperature, float32 ``[S]``: every sentence of a response gets the response's own."""
        return self._spread(self.raw(responses, records), spans)

    def score_held_out(self, responses: Sequence[str], records: Sequence[Record], spans: SentenceSpans) -> Tensor:
        """Like ``score``, for expert responses: raises DataError for one that has no other expert response to be compared with."""
        return self._spread(self.raw(responses, records, strict=True), spans)

    def raw(self, responses: Sequence[str], records: Sequence[Record], *, strict: bool = False) -> Tensor:
        """The reward model's own scores.

        Args:
            responses: ``N`` texts.
            records: their records.
            strict: an expert response must have another one to be compared with.

        Returns:
            float32 ``[N]``, finite, on the model's device (the CPU with a server).

        Raises:
            DataError: no expert response that will do, or no finite score; names the record.
            ConfigError: the model cannot be loaded, or the server fails.
        """
        places: dict[str, int] = {}  # each different text is scored once
        where: list[str] = []

        def place(text: str, record: Record) -> int:
            if text not in places:
                where.append(record.source)
            return places.setdefault(text, len(places))

        pairs: list[tuple[int, int]] = []
        counts: list[int] = []
        for response, record in zip(responses, records, strict=True):
            candidate = answer_of(response)
            references = self._references(candidate, record, strict=strict)
            counts.append(len(references))
            for reference in references:
                judged = place(self._text(record, reference, candidate), record)
                itself = place(self._text(record, reference, reference), record) if self.settings["subtract_self"] else judged
                pairs.append((judged, itself))
        if not pairs:
            return torch.zeros(0)
        scores = self._scores(list(places), where)
        judged_, itself_ = torch.tensor(pairs, device=scores.device).unbind(-1)
        values = scores[judged_] - scores[itself_] if self.settings["subtract_self"] else scores[judged_]
        over = _OVER[self.settings["over_references"]]
        return torch.stack([over(part) for part in values.split(counts)])

    def _references(self, candidate: str, record: Record, *, strict: bool) -> list[str]:
        if not self.needs_experts:
            return [""]
        answers = list(dict.fromkeys(map(answer_of, record.experts)))
        others = [answer for answer in answers if answer != candidate]
        usable = others if strict else others or answers
        if usable:
            return usable[: self.settings["max_references"]]
        needed = "another expert response than the one judged" if record.experts else "an expert response"
        raise DataError(f"{record.source}: the reward model needs {needed} as reference; found {len(record.experts)} in 'experts'")

    def _text(self, record: Record, reference: str, candidate: str) -> str:
        settings = self.settings
        limits = {"max_tokens": settings["max_tokens"], "max_response_tokens": settings["max_response_tokens"]}
        parts = (record.prompt, reference, candidate, self.tokenizer)
        if settings["template"] is None:
            return polar_text(*parts, wrapper=settings["wrapper"], **limits)
        return template_text(settings["template"], *parts, **limits)

    def _scores(self, texts: list[str], where: list[str]) -> Tensor:
        if self.server is not None:  # it tokenises the text itself
            texts = [broken_up(text) for text in texts]
            return torch.tensor(self.server.scores(texts, where, self.settings["model"]), dtype=torch.float32)
        scores = self.local.scores(texts, where)
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise DataError(
                f"{where[bad[0]]}: expected a finite score from {self.settings['model']!r}, found {float(scores[bad[0]])}; "
                "try dtype: float32"
            )
        return scores

    def _spread(self, scores: Tensor, spans: SentenceSpans) -> Tensor:
        return (scores / self.temperature)[spans.response_index.to(scores.device)]

    def fingerprint(self) -> str:
        """Hex digest of what decides a score: settings, vocabulary, and the weights, or the name under which a server has them.

        A server's address, patience and batches do not count; nor can it be seen whether a server's weights have changed.
        """
        settings = {name: value for name, value in self.settings.items() if name not in _NOT_DIGESTED}
        if self.server is None:
            return hash_tensors(json.dumps([settings, self.local.fingerprint()]), {})
        served = [self.server.model or self.settings["model"], self.server.api, self.server.body]
        return hash_tensors(json.dumps([settings, served, vocabulary(self.tokenizer)], sort_keys=True), {})

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, or have them loaded there; returns itself."""
        self.device = str(device)
        if "local" in self.__dict__:
            self.local.model.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Write ``discriminator.json``; the weights stay where they are (in ``folder`` itself: it may then be moved)."""
        settings = {"class": "reward_model", **self.settings, "fingerprint": self.fingerprint()}
        if settings["model"] is not None and Path(settings["model"]).resolve() == Path(folder).resolve():
            settings["model"] = "."
        write_json(Path(folder) / "discriminator.json", settings)

    @classmethod
    def load(cls, folder: Path, *, encoder: str | None = None, trust_remote_code: bool = False) -> Self:
        """Read what ``save`` wrote, or a file written by hand, with ``model`` (``.``: the folder itself) and what differs from defaults.

        Args:
            folder: holds ``discriminator.json``.
            encoder: where the weights lie now, or the server's address, if they moved.
            trust_remote_code: for weights and tokenizer.

        Raises:
            ConfigError: the file is missing or damaged, or the weights are others than those that were saved.
        """
        file = Path(folder) / "discriminator.json"
        settings = read_json(file, **REWARD_MODEL_KINDS)
        expected, _ = settings.pop("fingerprint", None), settings.pop("class", None)
        try:
            server = None if settings.get("server") is None else ScoreServer(**settings["server"])
            if server is not None:
                settings["server"] = server if encoder is None else replace(server, url=encoder)
            elif encoder is not None or settings.get("model") == ".":
                settings["model"] = encoder or str(folder)
            judge = cls(**settings, trust_remote_code=trust_remote_code)
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{file} is damaged or of another version: {error}") from error
        if expected is not None and judge.fingerprint() != expected:
            raise ConfigError(
                f"{file}: expected a reward model with fingerprint {expected}, found {judge.fingerprint()} at {settings['model']!r}"
            )
        return judge


def _check(
    template: str | None,
    temperature: float | None,
    max_references: int | None,
    subtract_self: bool,
    max_tokens: int,
    max_response_tokens: int,
) -> None:
    """Raise ConfigError for options that cannot be."""
    if template is not None and "{response}" not in template:
        raise ConfigError(f"template: expected {{response}} in it, found {template!r}")
    if subtract_self and template is not None and "{reference}" not in template:
        raise ConfigError(f"subtract_self needs a reference: expected {{reference}} in the template, found {template!r}")
    if temperature is not None and not 0 < temperature < float("inf"):
        raise ConfigError(f"temperature: expected a finite number above 0, found {temperature}")
    if max_references is not None and max_references < 1:
        raise ConfigError(f"max_references: expected at least 1, found {max_references}")
    if max_response_tokens < 1 or max_tokens <= 2 * max_response_tokens:
        raise ConfigError(
            "max_tokens: expected more than twice max_response_tokens (reference and response), found "
            f"{max_tokens} and {max_response_tokens}"
        )
