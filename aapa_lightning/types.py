"""The data that flows between the rooms: plain dataclasses, no behaviour beyond slicing.

Sizes used throughout: ``N`` responses, ``P`` padded prompt length, ``L`` padded response length, ``S`` sentences (all responses together).
Log-probabilities are natural logarithms (nats) in float32. Masks are boolean, final, and never derived again from token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, Self, TypedDict

import torch
from torch import Tensor


class Message(TypedDict):
    """One turn of a chat. Every other field of the turn that chat templates may read stands beside these as it was given."""

    role: str
    content: str
    weight: NotRequired[int]
    tool_calls: NotRequired[list[dict[str, Any]]]


class Reply(str):
    """A response's text that was a chat turn with more fields than its content, such as ``reasoning_content`` or ``tool_calls``.

    Args:
        text: what judges, rewards and comparisons read.
        turn: the assistant's turn, for chat templates.
    """

    turn: Message

    def __new__(cls, text: str, turn: Message) -> Self:
        """The text, which remembers its turn."""
        self = super().__new__(cls, text)
        self.turn = turn
        return self

    def __reduce__(self) -> tuple[type[Reply], tuple[str, Message]]:
        """How a copy is made."""
        return Reply, (str(self), self.turn)


@dataclass(frozen=True, slots=True)
class Instruction:
    """A verifiable instruction: an identifier such as ``length_constraints:number_words`` and its arguments."""

    id: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """One validated row of a dataset.

    Args:
        prompt: plain text, or the chat turns before the response.
        experts: expert responses to the prompt; may be empty where nothing needs one.
        instructions: verifiable instructions that a response should follow.
        chosen: preferred response of a pair, with ``rejected``; alone, a response labelled desirable.
        rejected: the other response of the pair; alone, a response labelled undesirable. May be empty.
        key: identifier given by the dataset (IFEval's ``key``), used to join response files.
        extra: every other column, passed to reward functions.
        source: ``file:line`` (or ``dataset:row``) for error messages.
        row: all columns under the dataset's own names, for reward functions that were written against them; it does not count when
            records are compared.
    """

    prompt: str | tuple[Message, ...]
    experts: tuple[str, ...] = ()
    instructions: tuple[Instruction, ...] = ()
    chosen: str | None = None
    rejected: str | None = None
    key: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    source: str = "<memory>"
    row: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def to(self, *args: Any, **kwargs: Any) -> Record:
        """Itself: texts lie on no device. Lightning asks this of what a loader gives, and would else try to change it."""
        return self


@dataclass(frozen=True, slots=True)
class Demonstration:
    """An expert response to imitate, tokenised.

    Args:
        input_ids: prompt and response tokens, in order, no padding.
        response_mask: same length; true on the tokens to learn (response tokens and the EOS that ends them).
        record: where it came from.
    """

    input_ids: list[int]
    response_mask: list[bool]
    record: Record

    def to(self, *args: Any, **kwargs: Any) -> Demonstration:
        """Itself; see ``Record.to``."""
        return self


@dataclass(slots=True)
class Rollouts:
    """Sampled responses of whole groups.

    Args:
        prompt_ids: int64 ``[N, P]``, padded on the left.
        prompt_mask: bool ``[N, P]``.
        response_ids: int64 ``[N, L]``, padded on the right.
        response_mask: bool ``[N, L]``; the EOS that ended a response is a response token.
        truncated: bool ``[N]``, stopped by the length limit rather than by an EOS or a stop string.
        group_ids: int64 ``[N]``, the prompt slot; responses with equal ids form a group, whatever their order.
        engine_logprobs: float32 ``[N, L]`` nats, as the engine sampled them (temperature applied, top-p and top-k not), 0 on padding.
        token_ends: int64 ``[N, L]``, characters of the text decoded up to and including this token; non-decreasing, 0 on padding.
        texts: decoded responses without special tokens, ``N`` strings.
        records: the record of each row, ``N``.
        prompt_ends: the last characters of each prompt, which say whether the response begins inside a thought, ``N``; or none.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    truncated: Tensor
    group_ids: Tensor
    engine_logprobs: Tensor
    token_ends: Tensor
    texts: list[str]
    records: list[Record]
    prompt_ends: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return self.response_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Response lengths in tokens, int64 ``[N]``."""
        return self.response_mask.sum(-1)


@dataclass(slots=True)
class SentenceSpans:
    """Where the sentences of ``N`` responses lie. Sentences are numbered ``0..S-1`` in order of response, then position.

    Args:
        response_index: int64 ``[S]``, the response that a sentence belongs to; non-decreasing, every response at least once.
        token_counts: int64 ``[S]``, tokens of the sentence; 0 only for the one empty sentence of an empty response.
        token_sentence: int64 ``[N, L]``, sentence of each response token; -1 on padding.
        char_spans: one list per response of ``(start, end)`` character offsets into its text, in order, without gaps.
    """

    response_index: Tensor
    token_counts: Tensor
    token_sentence: Tensor
    char_spans: list[list[tuple[int, int]]]


@dataclass(slots=True)
class AnchorSignal:
    """What the anchor says about a set of rollouts.

    Args:
        logits: float32 ``[S]``, log-odds that the expert wrote the sentence.
        scores: float32 ``[N]``, pooled score ``u`` of each response.
        advantages: float32 ``[N, L]``, centred and scaled, broadcast to tokens, 0 on padding. Not multiplied by lambda.
        spans: the sentences that were scored.
        metrics: scalars to log, means over this rank's rows (``reduce.Mean``).
    """

    logits: Tensor
    scores: Tensor
    advantages: Tensor
    spans: SentenceSpans
    metrics: dict[str, float]


@dataclass(slots=True)
class TokenLossInputs:
    """Inputs of a token-level policy objective; every log-prob is taken at softmax(logits / temperature).

    Args:
        logprobs: float32 ``[N, L]``, the policy being trained (carries the gradient).
        old_logprobs: float32 ``[N, L]``, the policy that defines the ratio's denominator (detached).
        response_mask: bool ``[N, L]``, final.
        advantages: float32 ``[N, L]`` (detached).
        ref_logprobs: float32 ``[N, L]``, the frozen reference policy, or None without a KL term.
        entropy: float32 ``[N, L]`` nats, of the policy's next-token distribution, or None.
        weights: float32 ``[N, L]`` (detached), what the surrogate is multiplied by to correct for the engine's distribution, or None.
        weight_metrics: values ``[N, L]`` that go with the weights, to be logged.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    response_mask: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    weights: Tensor | None = None
    weight_metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class LossOutputs:
    """What an objective returns: it neither reduces nor logs.

    Args:
        losses: float32 ``[N, L]`` per-token losses in nats, 0 on masked positions; of preference objectives one for each pair ``[B]`` or
            labelled response ``[R]``.
        metrics: values of the losses' shape (detached) that the caller averages over the mask and logs under these names.
    """

    losses: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


#: Concatenates a vector ``[n]`` of every rank, in order of ranks, without gradient: ``[ranks * n]``; the identity in a single process.
GatherOverRanks = Callable[[Tensor], Tensor]


def identity_gather(value: Tensor) -> Tensor:
    """The ``GatherOverRanks`` of a single process."""
    return value.detach()


@dataclass(slots=True)
class PairLossInputs:
    """Inputs of a preference objective over ``B`` pairs; a log-prob is the sum over the response's tokens, at temperature 1.

    Args:
        chosen_logprobs: float32 ``[B]`` nats, the policy's (carries the gradient).
        rejected_logprobs: float32 ``[B]`` nats.
        chosen_lengths: int64 ``[B]``, response tokens, the ending EOS included.
        rejected_lengths: int64 ``[B]``.
        ref_chosen_logprobs: float32 ``[B]``, the frozen reference policy, or None where the objective needs none.
        ref_rejected_logprobs: float32 ``[B]`` or None.
        stressed_margins: float32 ``[B]``, length-normalised margins at perturbed weights (detached), for GAPO alone.
        gather: concatenates over ranks, for statistics of the batch; every rank holds as many pairs.
    """

    chosen_logprobs: Tensor
    rejected_logprobs: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    ref_chosen_logprobs: Tensor | None = None
    ref_rejected_logprobs: Tensor | None = None
    stressed_margins: Tensor | None = None
    gather: GatherOverRanks = identity_gather


@dataclass(slots=True)
class LabelLossInputs:
    """Inputs of an objective over ``R`` single responses, each labelled desirable or not; log-probs as in ``PairLossInputs``.

    Args:
        logprobs: float32 ``[R]`` nats, the policy's (carries the gradient).
        ref_logprobs: float32 ``[R]``, the frozen reference policy.
        labels: bool ``[R]``, true where the response is desirable.
        mismatched_log_ratios: float32 ``[K]``, log pi - log pi_ref of this rank's responses to other prompts in the whole optimiser step
            (detached).
        gather: concatenates over ranks; ranks may differ in ``R`` and ``K``, so only vectors of one length go through it.
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    labels: Tensor
    mismatched_log_ratios: Tensor
    gather: GatherOverRanks = identity_gather


#: Sums a tensor over all ranks, elementwise, and returns the result; the identity in a single process.
SumOverRanks = Callable[[Tensor], Tensor]


def identity_sum(value: Tensor) -> Tensor:
    """The ``SumOverRanks`` of a single process."""
    return value


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Stack token rows into an int64 tensor ``[len(rows), longest]``, padded on the right (at least one column)."""
    width = max((len(row) for row in rows), default=0) or 1
    out = torch.full((len(rows), width), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return out


def pad_left(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Token rows as int64 ``[B, P]`` padded on the left, and the mask, bool ``[B, P]``."""
    ids = pad_right([row[::-1] for row in rows], value).flip(-1)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    width = ids.shape[1]
    return ids, torch.arange(width) >= width - lengths[:, None]
