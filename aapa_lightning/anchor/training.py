"""The pure part of training a discriminator: examples -> features, weights and loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from aapa_lightning.anchor.calibration import TEMPERATURES, calibrate, fit_offset, fit_temperature  # noqa: F401 - part of training
from aapa_lightning.anchor.encoder import Embedded, FrozenEncoder
from aapa_lightning.anchor.encoder_head import embed_references, fold_of, pick_reference
from aapa_lightning.anchor.head import Feature, sentence_features
from aapa_lightning.anchor.segment import Segmenter, segment_texts
from aapa_lightning.data.examples import Example, prompt_key, text_key
from aapa_lightning.errors import DataError
from aapa_lightning.thinking import ScoreThinking, as_thinking


@dataclass(slots=True)
class EncodedExamples:
    """Features of ``N`` examples with ``S`` sentences, on the CPU.

    Args:
        features: float32 ``[S, F]``.
        response_index: int64 ``[S]``.
        seen: bool ``[S]``; sentences that the encoder did not see are not trained on.
        labels: bool ``[N]``, written by an expert.
        groups: int64 ``[N]``, equal for equal prompts, in every split.
        texts: int64 ``[N]``, equal for equal texts, in every split.
        folds: int64 ``[N]``, cross-fitting fold of the prompt.
        lengths: int64 ``[N]``, characters.
    """

    features: Tensor
    response_index: Tensor
    seen: Tensor
    labels: Tensor
    groups: Tensor
    texts: Tensor
    folds: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def sentences_of(self, responses: Tensor) -> tuple[Tensor, Tensor]:
        """Seen sentences of responses int64 ``[B]``: their rows int64 ``[s]``, and for each its place in ``responses``."""
        place = torch.full((len(self),), -1, dtype=torch.int64)
        place[responses] = torch.arange(len(responses))
        rows = torch.nonzero((place[self.response_index] >= 0) & self.seen).squeeze(-1)
        return rows, place[self.response_index[rows]]

    def judged_sentences(self) -> Tensor:
        """Rows int64 of the seen sentences, and of one sentence of each response of which nothing is seen.

        Figures leave out the rest, whose logits are filled in from their response.
        """
        blank = torch.bincount(self.response_index[self.seen], minlength=len(self)) == 0
        first = torch.ones_like(self.seen)
        first[1:] = self.response_index[1:] != self.response_index[:-1]
        return torch.nonzero(self.seen | (first & blank[self.response_index])).squeeze(-1)

    def held_out(self, logits: Tensor) -> Tensor:
        """Of logits ``[K, S]``, those of the head of the prompt's fold: ``[S]`` (the only head's, without cross-fitting)."""
        return logits.gather(0, self.folds[self.response_index][None])[0]

    def met_in(self, others: EncodedExamples, chosen: Tensor | None = None) -> Tensor:
        """Responses bool ``[N]`` whose prompt or text is among other examples, or among those of them in bool ``chosen``."""
        rows = torch.ones(len(others), dtype=torch.bool) if chosen is None else chosen
        return torch.isin(self.groups, others.groups[rows]) | torch.isin(self.texts, others.texts[rows])

    def unseen_as_embedded(self) -> Embedded:
        """The shape that ``fill_unseen`` takes."""
        return Embedded(self.features, self.seen.long(), self.response_index, len(self))


def encode_examples(
    encoder: FrozenEncoder,
    segmenter: Segmenter,
    names: Sequence[Feature],
    examples: Sequence[Example],
    *,
    folds: int,
    score_thinking: ScoreThinking = False,
) -> EncodedExamples:
    """Encode every example once.

    Raises:
        DataError: ``reference`` is among the features and a record has no other expert response to compare with.
    """
    texts = as_thinking(score_thinking).answers([example.text for example in examples], [example.prompt_end for example in examples])
    records = [example.record for example in examples]
    embedded = encoder([record.prompt for record in records], texts, segment_texts(texts, segmenter).char_spans)
    references: Embedded | None = None
    reference_of: list[int] = []
    if "reference" in names:
        # turns go round within each class, so that the identity of the reference does not tell the label
        chosen = [
            (record, pick_reference(text, record, strict=True, turn=i)) for i, (record, text) in enumerate(zip(records, texts, strict=True))
        ]
        references, reference_of = embed_references(encoder, segmenter, chosen)
    return EncodedExamples(
        features=sentence_features(names, embedded, references, reference_of).cpu(),
        response_index=embedded.response_index.cpu(),
        seen=(embedded.counts > 0).cpu(),
        labels=torch.tensor([example.kind == "expert" for example in examples]),
        groups=torch.tensor([prompt_key(record) for record in records]),
        texts=torch.tensor([text_key(text) for text in texts]),
        folds=torch.tensor([fold_of(record.prompt, folds) for record in records]),
        lengths=torch.tensor([len(text) for text in texts]),
    )


def response_weights(labels: Tensor, folds: Tensor, count: int, texts: Tensor | None = None) -> Tensor:
    """Weight of each response for each head: both classes sum to the same, what a head must not have seen weighs nothing.

    With equal class weights the optimal logit is the log density ratio: no prior offset is left in it.

    Args:
        labels: bool ``[N]``.
        folds: int64 ``[N]``.
        count: number of folds ``K``; 1 trains on everything.
        texts: int64 ``[N]``, equal for equal texts; see ``trained_on``. All differ by default.

    Returns:
        float32 ``[K, N]``, mean 1 over ``N`` for each head that has both classes.
    """
    used = trained_on(folds, count, texts)
    out = torch.zeros_like(used)
    for side in (labels, ~labels):
        share = used * side
        out += share * len(labels) / (2 * share.sum(1, keepdim=True).clamp_min(1))
    return out


def prompt_weights(labels: Tensor, groups: Tensor, folds: Tensor, count: int, texts: Tensor | None = None) -> Tensor:
    """Weight of each response's prompt for each head: prompts with a pair weigh the same, what a head must not have seen nothing.

    Args:
        labels: bool ``[N]``.
        groups: int64 ``[N]``, number of the prompt.
        folds: int64 ``[N]``.
        count: number of folds ``K``; 1 trains on everything.
        texts: int64 ``[N]``, equal for equal texts; see ``trained_on``. All differ by default.

    Returns:
        float32 ``[K, N]``, mean 1 over the prompts with a pair for each head that has any.
    """
    numbers, place = groups.unique(return_inverse=True)
    used = trained_on(folds, count, texts)

    def paired(mask: Tensor) -> Tensor:
        ours, theirs = (mask.new_zeros(len(mask), len(numbers)).index_add(1, place, mask * side) for side in (labels, ~labels))
        return ((ours > 0) & (theirs > 0)).float()

    prompts = paired(used)
    everyone = paired(torch.ones_like(used[:1])).sum()
    return (prompts * everyone / prompts.sum(1, keepdim=True).clamp_min(1))[:, place] * used


def trained_on(folds: Tensor, count: int, texts: Tensor | None = None) -> Tensor:
    """1 where head k trains on a response, float32 ``[K, N]``: 0 in its own fold, and for every text that occurs there with any prompt.

    So no head has seen a prompt or a text of its own fold, whatever the label that it bore elsewhere.

    Args:
        folds: int64 ``[N]``, of the prompts.
        count: number of folds ``K``; 1 trains on everything.
        texts: int64 ``[N]``, equal for equal texts; all differ by default.
    """
    if count == 1:
        return torch.ones(1, len(folds))
    own = functional.one_hot(folds, count).float()
    if texts is not None:
        numbers, place = texts.unique(return_inverse=True)
        own = own.new_zeros(len(numbers), count).index_add(0, place, own)[place]
    return (own == 0).float().T.contiguous()


def check_heads(weights: Tensor, labels: Tensor) -> None:
    """Raise DataError for a head that is left without an expert's or without another response.

    Args:
        weights: ``[K, N]``.
        labels: bool ``[N]``.
    """
    for k, row in enumerate(weights):
        experts, others = (int((row[side] > 0).sum()) for side in (labels, ~labels))
        if not (experts and others):
            raise DataError(
                f"folds={len(weights)}: head {k} is trained without the prompts and texts of fold {k}, which leaves {experts} expert "
                f"responses and {others} others; expected some of each: too few prompts, or the same texts for most prompts; set folds: 1"
            )


def discriminator_loss(logits: Tensor, place: Tensor, labels: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor:
    """Binary cross-entropy in which responses count equally, however many sentences they have.

    ``L = (1 / K B) sum_k sum_i w_ki (1 / n_i) sum_{s in i} BCE(l_ks, y_i)``, y smoothed towards 1/2.

    Args:
        logits: ``[K, S]``.
        place: int64 ``[S]``, the sentence's response in the batch.
        labels: bool ``[B]``.
        weights: ``[K, B]``.
        smoothing: label smoothing in [0, 1).

    Returns:
        Scalar in nats.
    """
    targets = labels.float() * (1 - smoothing) + smoothing / 2
    losses = functional.binary_cross_entropy_with_logits(logits, targets[place].expand_as(logits), reduction="none")
    counts = torch.bincount(place, minlength=len(labels)).clamp_min(1)
    return (losses * (weights / counts)[:, place]).sum() / weights.numel()


def bradley_terry_loss(logits: Tensor, place: Tensor, labels: Tensor, groups: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor:
    """Bradley-Terry: for every prompt, an expert's response should beat each of the other responses to it.

    ``L = (1 / K P) sum_k sum_p w_kp mean_{(i, j) in p} -log sigma(l_ki - l_kj)``, i an expert's response and j another one, l the mean
    logit of a response's sentences. Whatever all responses to a prompt have in common cancels, the head's bias too.

    Args:
        logits: ``[K, S]``.
        place: int64 ``[S]``, the sentence's response in the batch; responses without a sentence form no pair.
        labels: bool ``[B]``.
        groups: int64 ``[B]``, number of the prompt; a batch holds all responses to the prompts in it.
        weights: ``[K, B]``, of each response's prompt; a response of weight 0 forms no pair for that head.
        smoothing: label smoothing in [0, 1).

    Returns:
        Scalar in nats, float32 at least; ``P`` counts the prompts with a pair. A zero with a graph when there is none.

    Reference:
        Ye et al. 2025, Black-Box On-Policy Distillation of Large Language Models, arXiv 2511.10643, whose pairs hold one expert response.
    """
    counts = torch.bincount(place, minlength=len(labels))
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    means = exact.new_zeros(len(logits), len(labels)).index_add(1, place, exact) / counts.clamp_min(1)
    seen = counts > 0
    ours, theirs = torch.nonzero((labels & seen)[:, None] & (~labels & seen) & (groups[:, None] == groups), as_tuple=True)
    numbers, prompts = groups[ours].unique(return_inverse=True)
    prompts_with_a_pair = len(numbers)
    live = ((weights[:, ours] > 0) & (weights[:, theirs] > 0)).to(exact)
    pairs = live.new_zeros(len(live), prompts_with_a_pair).index_add(1, prompts, live)
    gaps = means[:, ours] - means[:, theirs]
    losses = functional.binary_cross_entropy_with_logits(gaps, torch.full_like(gaps, 1 - smoothing / 2), reduction="none")
    return (losses * weights[:, ours] * live / pairs[:, prompts].clamp_min(1)).sum() / (len(logits) * max(prompts_with_a_pair, 1))
