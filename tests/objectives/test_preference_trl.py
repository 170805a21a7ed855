"""Values and gradients of the preference objectives against TRL's own loss code."""

from collections import defaultdict
from types import MethodType, SimpleNamespace

import pytest
import torch

from aapa_lightning.objectives.preference import PREFERENCES
from aapa_lightning.objectives.sft import sft_loss
from aapa_lightning.reduce import StepCounts, aggregate, count_step
from aapa_lightning.types import LabelLossInputs, PairLossInputs

pytest.importorskip("trl", reason="TRL is the oracle; it comes with the extra `test`")

AGREE = {"rtol": 1e-5, "atol": 1e-6}
PAIRS, WIDTH, VOCABULARY = 5, 7, 11


class Accelerator:
    device = torch.device("cpu")

    def gather(self, value):
        return value

    gather_for_metrics = gather


def agree(ours, theirs, leaf):
    torch.testing.assert_close(ours, theirs, **AGREE)
    our_grad, their_grad = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (ours, theirs))
    assert their_grad.abs().max() > 1e-4
    torch.testing.assert_close(our_grad, their_grad, **AGREE)


def random_rows(seed, rows):
    """Log-probs of responses behind prompts of one to three tokens, 0 elsewhere, as TRL's fused head gives them."""
    g = torch.Generator().manual_seed(seed)
    prompts, lengths = torch.randint(1, 4, (rows, 1), generator=g), torch.randint(1, WIDTH - 2, (rows, 1), generator=g)
    position = torch.arange(WIDTH + 1)
    mask = (position >= prompts) & (position < prompts + lengths)
    logprobs = -3 * torch.rand(rows, WIDTH, generator=g)
    reference = (logprobs + torch.randn(rows, WIDTH, generator=g)).masked_fill(~mask[:, 1:], 0.0).sum(-1)
    return logprobs.masked_fill(~mask[:, 1:], 0.0).requires_grad_(), mask, reference


def fused_model(logprobs_of):
    def forward(input_ids, **kwargs):
        logprobs = logprobs_of(input_ids)
        zeros = torch.zeros_like(logprobs)
        return SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    return forward


def trl_dpo(logprobs, mask, reference, loss_types, weights=(1.0,), beta=0.1, label_smoothing=0.0):
    from trl.trainer.dpo_trainer import DPOTrainer

    stub = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=loss_types,
        loss_weights=weights,
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    ids = torch.zeros_like(mask, dtype=torch.long)
    chosen, rejected = reference.chunk(2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask.long()}
    inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return DPOTrainer._compute_loss(stub, fused_model(lambda _: logprobs), inputs, False), stub._metrics["train"]


def pair_inputs(logprobs, mask, reference=None):
    ref = (None, None) if reference is None else reference.chunk(2)
    return PairLossInputs(*logprobs.sum(-1).chunk(2), *mask.sum(-1).chunk(2), *ref)


CASES = [
    ("dpo", {"beta": 0.3}, "sigmoid", {"beta": 0.3}),
    ("dpo", {"beta": 5.0, "length_normalize": True}, "sigmoid_norm", {"beta": 5.0}),
    ("ipo", {}, "ipo", {"beta": 0.1}),
    ("ipo", {"beta": 2.0}, "ipo", {"beta": 2.0}),
    ("rdpo", {}, "robust", {"beta": 0.1, "label_smoothing": 0.1}),
    ("rdpo", {"beta": 0.5, "label_smoothing": 0.3}, "robust", {"beta": 0.5, "label_smoothing": 0.3}),
]


@pytest.mark.parametrize(("name", "options", "loss_type", "theirs"), CASES)
def test_losses_of_the_dpo_trainer(name, options, loss_type, theirs):
    for seed in range(3):
        rows = random_rows(seed, 2 * PAIRS)
        expected, their_metrics = trl_dpo(*rows, [loss_type], **theirs)
        outputs = PREFERENCES[name].bind(options)(pair_inputs(*rows))
        agree(outputs.losses.mean(), expected, rows[0])
        if not (name == "ipo" or "length_normalize" in options):
            for ours, metric in (("chosen_reward", "chosen"), ("rejected_reward", "rejected"), ("accuracy", "accuracies")):
                assert outputs.metrics[ours].mean().item() == pytest.approx(their_metrics[f"rewards/{metric}"][0], rel=1e-5)


def test_conservative_dpo_is_their_label_smoothing():
    # Of the losses with a reference only `aot` smooths labels as cDPO does; with one pair its sorting changes nothing.
    for seed in range(4):
        rows = random_rows(seed, 2)
        expected, _ = trl_dpo(*rows, ["aot"], beta=0.4, label_smoothing=0.2)
        agree(PREFERENCES["cdpo"].bind({"beta": 0.4, "label_smoothing": 0.2})(pair_inputs(*rows)).losses.mean(), expected, rows[0])


def test_rpo_is_their_sigmoid_plus_sft():
    row = PREFERENCES["rpo"]
    for seed in range(3):
        logprobs, mask, reference = random_rows(seed, 2 * PAIRS)
        expected, _ = trl_dpo(logprobs, mask, reference, ["sigmoid", "sft"], weights=(1.0, 0.005), beta=0.01)
        chosen, chosen_mask = logprobs[:PAIRS], mask[:PAIRS, 1:]
        nll = aggregate(sft_loss(chosen, chosen_mask).losses, chosen_mask, "dapo", StepCounts.from_tensor(count_step(chosen_mask)))
        ours = row.bind({})(pair_inputs(logprobs, mask, reference)).losses.mean() + row.sft_weight * nll
        agree(ours, expected, logprobs)


@pytest.mark.parametrize("drift", [1.0, -1.0])
def test_kto(drift):
    from trl.trainer.kto_trainer import KTOTrainer

    options = {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.8}
    for seed in range(3):
        logprobs, mask, reference = random_rows(seed, 6)
        mismatched, other_mask, _ = random_rows(seed + 10, 6)
        other_reference = mismatched.detach().sum(-1) - drift * torch.rand(6)
        labels = torch.tensor([True, False, False, True, True, False])
        stub = SimpleNamespace(
            model=SimpleNamespace(training=True),
            accelerator=Accelerator(),
            calculate_KL=True,
            aux_loss_enabled=False,
            precompute_ref_logps=True,
            loss_type="kto",
            _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0,
            _tp_size=1,
            **options,
        )
        stub._compute_kl_logps = MethodType(KTOTrainer._compute_kl_logps, stub)
        ids, ones = torch.zeros_like(mask, dtype=torch.long), torch.ones_like(mask, dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": ones, "completion_mask": mask.long(), "label": labels, "ref_logps": reference}
        batch |= {
            "KL_input_ids": ids + 1,
            "KL_attention_mask": ones,
            "KL_completion_mask": other_mask.long(),
            "ref_KL_logps": other_reference,
        }
        model = fused_model(lambda ids, pair=(logprobs, mismatched): pair[int(ids[0, 0])])
        expected = KTOTrainer._compute_loss(stub, model, batch, False)
        inputs = LabelLossInputs(logprobs.sum(-1), reference, labels, mismatched.sum(-1) - other_reference)
        outputs = PREFERENCES["kto"].bind(options)(inputs)
        assert outputs.metrics["kl"][0].item() == pytest.approx(stub._metrics["train"]["kl"][0], rel=1e-5)
        assert (outputs.metrics["kl"][0] > 0) == (drift > 0)
        agree(outputs.losses.mean(), expected, logprobs)


def logits_batch(seed, prompt):
    """Logits of a concatenated batch, and its columns, with prompts of equal length."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2 * PAIRS, WIDTH, VOCABULARY, generator=g).requires_grad_()
    ids = torch.randint(VOCABULARY, (2 * PAIRS, WIDTH), generator=g)
    lengths = torch.randint(1, WIDTH - prompt + 1, (2 * PAIRS, 1), generator=g)
    lengths[0] = lengths[PAIRS] = WIDTH - prompt
    attended = torch.arange(WIDTH) < prompt + lengths
    mask = attended & (torch.arange(WIDTH) >= prompt)
    columns = {"input_ids": ids, "attention_mask": attended.long(), "labels": ids.masked_fill(~mask, -100)}
    batch = {f"{side}_{name}": value.chunk(2)[i] for i, side in enumerate(("chosen", "rejected")) for name, value in columns.items()}
    return logits, ids, mask, batch


def trl_loss_of_logits(trainer, logits, batch, **settings):
    stub = SimpleNamespace(
        accelerator=Accelerator(), is_encoder_decoder=False, aux_loss_enabled=False, pad_token_id=0, padding_value=0, **settings
    )
    stub.concatenated_inputs, stub.get_batch_logps = trainer.concatenated_inputs, trainer.get_batch_logps
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer, name):
            setattr(stub, name, MethodType(getattr(trainer, name), stub))
    return trainer.get_batch_loss_metrics(stub, lambda *args, **kwargs: SimpleNamespace(logits=logits), batch)


def token_logprobs(logits, ids, mask):
    picked = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    return picked.masked_fill(~mask[:, 1:], 0.0), mask


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_simpo_equals_their_cpo_trainer(label_smoothing):
    from trl.experimental.cpo import CPOTrainer

    for seed in range(3):
        logits, ids, mask, batch = logits_batch(seed, prompt=2)
        settings = {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 2.5 * 0.55, "cpo_alpha": 0, "alpha": 0.0}
        expected, _ = trl_loss_of_logits(CPOTrainer, logits, batch, label_smoothing=label_smoothing, **settings)
        loss = PREFERENCES["simpo"].bind({"label_smoothing": label_smoothing})
        agree(loss(pair_inputs(*token_logprobs(logits, ids, mask))).losses.mean(), expected, logits)


@pytest.mark.parametrize("prompt", [1, 3])
def test_orpo(prompt):
    from trl.experimental.orpo import ORPOTrainer

    row = PREFERENCES["orpo"]
    for seed in range(3):
        logits, ids, mask, batch = logits_batch(seed, prompt)
        expected, metrics = trl_loss_of_logits(ORPOTrainer, logits, batch, beta=0.1)
        logprobs, _ = token_logprobs(logits, ids, mask)
        outputs = row.bind({})(pair_inputs(logprobs, mask))
        assert outputs.metrics["margin"].mean().item() == pytest.approx(metrics["log_odds_chosen"], rel=1e-4)
        # Their NLL spans prompt and response but no first token: behind a prompt of one token it is the response's.
        nll = aggregate(sft_loss(logprobs[:PAIRS], mask[:PAIRS, 1:]).losses, mask[:PAIRS, 1:], "bnpo", StepCounts(1.0, 1.0))
        if prompt == 1:
            agree(outputs.losses.mean() + row.sft_weight * nll, expected, logits)
        else:
            assert outputs.losses.mean().item() == pytest.approx(expected.item() - metrics["nll_loss"], abs=1e-5)
            assert abs(nll.item() - metrics["nll_loss"]) > 1e-3
