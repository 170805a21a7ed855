import warnings
from dataclasses import replace

import lightning as L
import pytest
import torch
from scipy.stats import wasserstein_distance

from aapa_lightning.chat_templates import CHATML
from aapa_lightning.data.datamodule import AapaDataModule
from aapa_lightning.data.encode import PromptFormat, encode_demonstration, encode_prompt
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.loop.evaluate import EvalLoader
from aapa_lightning.modules.inference import InferenceModule
from aapa_lightning.modules.sft import SFTModule
from aapa_lightning.policy import PolicySpec
from aapa_lightning.rewards.base import Reward
from aapa_lightning.rollout.base import RolloutRequest, SamplingParams
from aapa_lightning.rollout.transformers_engine import TransformersEngine
from aapa_lightning.seeds import derive_seed
from aapa_lightning.types import Record

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SAMPLING = SamplingParams(max_new_tokens=5, temperature=0.8)
RECORDS = [
    Record("Describe the harbor.", ("The boats rest.", "never read"), key="k0"),
    Record("abc", ("The gulls call calmly.",)),
    Record("def"),
    Record(({"role": "user", "content": "ghi"},), ("jkl",)),
    Record("0123", ("x",)),
]


class Length(Reward):
    name = "length"

    def __call__(self, responses, records):
        return [float(len(response)) for response in responses]


class Noisy(Length):
    """Draws from torch's generator, as a reward model with dropout would."""

    name = "noisy"
    calls = 0

    def __call__(self, responses, records):
        self.calls += 1
        return torch.rand(len(responses))


class OnlyShort(Length):
    name = "short"

    def skip_reason(self, record):
        return "a chat" if not isinstance(record.prompt, str) else None


class Judge(Length):
    name = "judged"

    def __call__(self, responses, records):
        return [float(len(str(record.prompt))) for record in records]


@pytest.fixture
def build(tiny_model_dir):
    def make(**kwargs) -> InferenceModule:
        settings = {"sampling": SAMPLING, "rewards": [Length()], "reward_weights": [0.5], "judges": [Judge()], "seed": 3} | kwargs
        return InferenceModule(PolicySpec(str(tiny_model_dir)), **{"eval_samples": 2, "eval_batch_size": 2} | settings)

    return make


@pytest.fixture
def trainer(tmp_path):
    def make(**kwargs) -> L.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        return L.Trainer(**{"accelerator": "cpu", "default_root_dir": tmp_path, "use_distributed_sampler": False} | quiet | kwargs)

    return make


def expected_figures(module: InferenceModule, records: list[Record], samples: int = 2, temperature: float = 0.8) -> dict[str, float]:
    """The figures by their definitions: all responses in one go, each expert in a forward of its own."""
    engine = TransformersEngine(module.model, module.tokenizer, module.engine.eos_ids)
    requests = [
        RolloutRequest(encode_prompt(module.tokenizer, record, PromptFormat()), record, i, samples) for i, record in enumerate(records)
    ]
    params = replace(SAMPLING, temperature=temperature)
    drawn = engine.generate(requests, params, seed=derive_seed("evaluate", 3, str(temperature)), window=0)
    lengths = [len(text) for text in drawn.texts]
    logprobs, expert_lengths = [], []
    for record in records:
        for expert in record.experts[:1]:
            row = encode_demonstration(module.tokenizer, record, expert, PromptFormat(), module.eos_token_id)
            ids = torch.tensor(row.input_ids)
            with torch.no_grad():
                values = module.model(ids[None]).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            learned = torch.tensor(row.response_mask[1:])
            logprobs += values[learned].tolist()
            expert_lengths.append(int(learned.sum()))
    return {
        "reward": 0.5 * sum(lengths) / len(lengths),
        "rewards/length": sum(lengths) / len(lengths),
        "judged": sum(len(str(record.prompt)) for record in records) / len(records),
        "response_length": drawn.lengths.float().mean().item(),
        "truncated": drawn.truncated.float().mean().item(),
        "expert_logprob": sum(logprobs) / len(logprobs),
        "length_distance": wasserstein_distance(drawn.lengths.tolist(), expert_lengths),
    }


@pytest.mark.parametrize("stage", ["test", "val"])
def test_the_figures_are_what_they_say(build, trainer, stage: str) -> None:
    module = build()
    data = AapaDataModule(**{stage: RECORDS})
    run = trainer()
    (figures,) = run.test(module, data, verbose=False) if stage == "test" else run.validate(module, data, verbose=False)
    expected = {f"{stage}/{name}": value for name, value in expected_figures(module, RECORDS).items()}
    assert {name: value for name, value in figures.items() if name != "step"} == pytest.approx(expected, rel=1e-5)


def test_the_figures_do_not_depend_on_batches_or_rows(build, trainer) -> None:
    found = [
        trainer().test(build(eval_batch_size=size, rollout_rows=rows), AapaDataModule(test=RECORDS), verbose=False)[0]
        for size, rows in ((1, None), (8, 3))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_evaluation_has_its_own_temperature(build, trainer) -> None:
    module = build(eval_temperature=0.0)
    (figures,) = trainer().test(module, AapaDataModule(test=RECORDS), verbose=False)
    assert figures["test/response_length"] == pytest.approx(expected_figures(module, RECORDS, temperature=0.0)["response_length"])


def test_without_samples_only_the_experts_likelihood_is_measured(build, trainer, monkeypatch) -> None:
    monkeypatch.setattr(TransformersEngine, "generate", lambda *args, **kwargs: pytest.fail("nothing is to be generated"))
    module = build(eval_samples=0)
    (figures,) = trainer().test(module, AapaDataModule(test=RECORDS), verbose=False)
    assert set(figures) == {"test/expert_logprob"}
    monkeypatch.undo()
    assert figures["test/expert_logprob"] == pytest.approx(expected_figures(module, RECORDS)["expert_logprob"], rel=1e-5)


def test_without_experts_or_rewards_the_rest_is_measured(build, trainer) -> None:
    module = build(rewards=None, reward_weights=None, judges=None)
    (figures,) = trainer().test(module, AapaDataModule(test=[RECORDS[2]]), verbose=False)
    assert set(figures) == {"test/response_length", "test/truncated"}


def test_two_ranks_cover_all_prompts_with_the_same_responses(build, trainer) -> None:
    module = build(predict_samples=2)
    run = trainer()
    whole = [row for rows in run.predict(module, AapaDataModule(test=RECORDS)) for row in rows]
    assert len(whole) == 10
    shares = [row for rank in (0, 1) for step in EvalLoader(RECORDS, 2, rank=rank, world_size=2) for row in module.predict_step(step, 0)]

    def key(row: dict) -> tuple:
        return str(row["prompt"]), row["sample"]

    assert sorted(shares, key=key) == sorted(whole, key=key)


def test_an_empty_batch_gives_no_rows(build, trainer) -> None:
    module = build()
    module.configure_model()
    (*_, last) = EvalLoader(RECORDS[:1], 1, rank=1, world_size=2)
    assert last.records == []
    assert module.predict_step(last, 0) == []


def test_predicted_rows(build, trainer, tiny_tokenizer) -> None:
    module = build(predict_temperatures=(0.5, 1.5), predict_samples=2)
    rows = [row for batch in trainer().predict(module, AapaDataModule(train=RECORDS)) for row in batch]
    assert len(rows) == 20
    first = [row for row in rows if row["prompt"] == "Describe the harbor."]
    assert [(row["key"], row["temperature"], row["sample"]) for row in first] == [
        ("k0", 0.5, 0),
        ("k0", 0.5, 1),
        ("k0", 1.5, 0),
        ("k0", 1.5, 1),
    ]
    assert len({row["response"] for row in first}) > 2
    assert {str(row["prompt"]) for row in rows} == {"Describe the harbor.", "abc", "def", "0123", "[{'role': 'user', 'content': 'ghi'}]"}
    assert all(isinstance(row["response"], str) and isinstance(row["truncated"], bool) for row in rows)
    assert any(row["truncated"] for row in rows)


def test_records_that_a_reward_leaves_out_are_not_evaluated(build, trainer) -> None:
    module = build(rewards=[OnlyShort()], reward_weights=None)
    (figures,) = trainer().test(module, AapaDataModule(test=RECORDS), verbose=False)
    texts = [record for record in RECORDS if isinstance(record.prompt, str)]
    assert figures["test/judged"] == pytest.approx(expected_figures(module, texts)["judged"])


def test_what_is_too_long_is_found_before_anything_is_generated(build, trainer, monkeypatch) -> None:
    monkeypatch.setattr(TransformersEngine, "generate", lambda *args, **kwargs: pytest.fail("too late"))
    long = [*RECORDS, Record("abc " * 200, source="file.jsonl:6")]
    with pytest.raises(DataError, match=r"file\.jsonl:6: the prompt has \d+ tokens, the limit is 60"):
        trainer().test(build(prompt_format=PromptFormat(max_prompt_tokens=60)), AapaDataModule(test=long), verbose=False)


def test_what_is_too_long_can_be_left_out(build, trainer) -> None:
    long = [*RECORDS, Record("abc " * 200), Record("fits", ("too long " * 50,))]
    module = build(prompt_format=PromptFormat(max_prompt_tokens=60, max_response_tokens=60, overlong="drop"))
    (figures,) = trainer().test(module, AapaDataModule(test=long), verbose=False)
    expected = expected_figures(module, [*RECORDS, Record("fits")])
    assert figures == pytest.approx({f"test/{name}": value for name, value in expected.items()}, rel=1e-5)


def test_an_expert_that_the_template_refuses_is_found_before_anything_is_generated(build, trainer, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(TransformersEngine, "generate", None)
    template = tmp_path / "strict.jinja"
    template.write_text("{%- for turn in messages if 'forbidden' in turn.content %}{{ raise_exception('no') }}{%- endfor %}" + CHATML)
    records = [*RECORDS, Record("abc", ("forbidden",), source="data.jsonl:6")]
    for overlong in ("drop", "error"):
        module = build(prompt_format=PromptFormat(overlong=overlong))
        module.policy = replace(module.policy, chat_template=str(template))
        with pytest.raises(DataError, match=r"data\.jsonl:6: the chat template refuses the turns"):
            trainer().test(module, AapaDataModule(test=records), verbose=False)


def test_earlier_turns_are_no_part_of_the_experts_response(build, trainer) -> None:
    chat = Record(
        ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}), ("The boats rest.",)
    )
    found = [
        trainer().test(build(prompt_format=PromptFormat(assistant_turns=turns)), AapaDataModule(test=[chat]), verbose=False)[0]
        for turns in ("last", "all")
    ]
    assert found[0] == found[1]


def test_the_policy_is_loaded_once_and_late(build) -> None:
    module = build()
    assert not hasattr(module, "model")
    module.configure_model()
    model = module.model
    module.configure_model()
    assert module.model is model
    assert model.training


def test_the_seed_is_lightnings_unless_given(build, monkeypatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert build(seed=None).seed == 17
    assert build(seed=0).seed == 0


def test_validation_changes_nothing_in_training(tiny_model_dir, trainer) -> None:
    spec = PolicySpec(str(tiny_model_dir), config={"attention_dropout": 0.5}, disable_dropout=False)
    train = [record for record in RECORDS if record.experts]

    judge = Noisy()

    def weights(data: AapaDataModule, seed: int = 0, **kwargs) -> dict[str, torch.Tensor]:
        module = SFTModule(
            spec,
            batch_size=2,
            sampling=SAMPLING,
            judges=[judge],
            eval_batch_size=2,
            seed=seed,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )
        trainer(max_steps=3, accumulate_grad_batches=2, **kwargs).fit(module, data)
        return {name: value.clone() for name, value in module.state_dict().items()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bare = weights(AapaDataModule(train))
        assert judge.calls == 0
        validated = weights(AapaDataModule(train, val=RECORDS), val_check_interval=1)
        assert judge.calls > 6  # after the sanity check and between the micro-steps of a step
        other = weights(AapaDataModule(train), seed=1)
    assert all(torch.equal(bare[name], validated[name]) for name in bare)
    assert not all(torch.equal(bare[name], other[name]) for name in bare)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_precision_that_rounds_log_probs_is_refused(build, trainer, precision: str) -> None:
    with pytest.raises(ConfigError, match=r"32-true with policy\.dtype"):
        trainer(precision=precision).validate(build(), AapaDataModule(val=[Record("a", source="r")]), verbose=False)
