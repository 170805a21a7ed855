"""Encoder, head and discriminators: context, pooling, unseen sentences, files and the errors around them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from aapa_lightning.anchor.base import Discriminator
from aapa_lightning.anchor.classifier import SequenceClassifierDiscriminator
from aapa_lightning.anchor.context import Encoding
from aapa_lightning.anchor.encoder import Embedded, FrozenEncoder
from aapa_lightning.anchor.encoder_head import EncoderHeadDiscriminator, fold_of, pick_reference
from aapa_lightning.anchor.head import StackedHead, feature_size, fill_unseen, response_means, sentence_features
from aapa_lightning.anchor.load import load_discriminator
from aapa_lightning.anchor.segment import Segmenter, segment_texts
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Record

TEXTS = ["The boats rest calmly. The gulls call.", "abc def. 😀 ghi! \ud800 jkl", ""]
PROMPTS = ["Describe the harbor.", ({"role": "user", "content": "abc"},), "x"]


def bert_folder(folder, hidden_size=16, seed=0, labels=None):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz.!?", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(8)  # as all-MiniLM ships it; must not reach us
    tokenizer.enable_padding()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("bert", vocab_size=len(words), max_position_embeddings=128, initializer_range=0.3, **sizes)
    torch.manual_seed(seed)
    if labels is None:
        AutoModel.from_config(config, add_pooling_layer=False).save_pretrained(folder)
    else:
        config.num_labels = labels
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return bert_folder(tmp_path_factory.mktemp("bert"))


def records(n=3, experts=("abc. def.", "The gulls rest. The boats call.")):
    return [Record(prompt, experts=experts, source=f"data.jsonl:{i + 1}") for i, prompt in enumerate(PROMPTS[:n])]


def judge_of(path, features=("sentence", "response"), folds=1, **encoding):
    encoder = FrozenEncoder(path, Encoding(**encoding))
    head = StackedHead(folds, feature_size(features, encoder.hidden_size), hidden_units=8, seed=1)
    head.floor.copy_(torch.linspace(-5, -4, folds))
    return EncoderHeadDiscriminator(encoder, head, features)


def by_hand(path, prompt_text, text, spans, *, pair):
    """Sentence means by the tokenizer's own pair encoding, in a batch of one."""

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    if pair:
        plain = {"return_tensors": "pt", "padding": False, "truncation": False}
        inputs = tokenizer(prompt_text, text, return_offsets_mapping=True, return_token_type_ids=True, **plain)
        belongs = [s == 1 for s in inputs.encodings[0].sequence_ids]
        offsets = inputs.pop("offset_mapping")[0].tolist()
    else:
        first = tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
        second = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        belongs = [False] * len(first) + [True] * len(second["input_ids"])
        offsets = [(0, 0)] * len(first) + second["offset_mapping"]
        inputs = {"input_ids": torch.tensor([first + second["input_ids"]])}
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state[0]
    rows = []
    for start, end in spans:
        mine = [
            i for i, (a, b) in enumerate(offsets)
            if belongs[i] and start <= a + len(text[a:b]) - len(text[a:b].lstrip()) < end
        ]  # fmt: skip
        rows.append(hidden[mine].mean(0))
    return torch.stack(rows)


def test_encoder_sees_prompt_and_response_as_a_pair(bert):
    encoder, spans = FrozenEncoder(bert, Encoding()), Segmenter()(TEXTS[0])
    found = encoder(["describe it."] * 2, [TEXTS[0], "abc."], [spans, [(0, 4)]])
    torch.testing.assert_close(found.embeddings[:2], by_hand(bert, "describe it.", TEXTS[0], spans, pair=True))
    assert found.response_index.tolist() == [0, 0, 1]


def test_causal_encoder_sees_its_chat_template(tiny_model_dir, tiny_tokenizer):
    encoder, spans = FrozenEncoder(str(tiny_model_dir), Encoding()), Segmenter()(TEXTS[0])
    turns = [{"role": "user", "content": "Hi"}]
    rendered = tiny_tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    found = encoder(["Hi", tuple(turns)], [TEXTS[0]] * 2, [spans] * 2).embeddings
    expected = by_hand(tiny_model_dir, rendered, TEXTS[0], spans, pair=False)
    torch.testing.assert_close(found, torch.cat([expected, expected]), atol=1e-5, rtol=1e-4)
    system = FrozenEncoder(str(tiny_model_dir), Encoding(system_prompt="Be calm."))(["Hi"], [TEXTS[0]], [spans]).embeddings
    assert not torch.allclose(system, expected)


def test_causal_encoder_without_template_and_layers(tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    spans = Segmenter()(TEXTS[0])
    found = FrozenEncoder(str(folder), Encoding())(["Hi "], [TEXTS[0]], [spans]).embeddings
    torch.testing.assert_close(found, by_hand(folder, "Hi ", TEXTS[0], spans, pair=False), atol=1e-5, rtol=1e-4)
    middle = FrozenEncoder(str(folder), Encoding(layers=(1,)))(["Hi "], [TEXTS[0]], [spans]).embeddings
    assert not torch.allclose(middle, found)


def test_likelihood_needs_a_language_model(bert):
    with pytest.raises(ConfigError, match="causal language model"):
        FrozenEncoder(bert, Encoding(likelihood=True))


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("kind", ["bert", "causal"])
def test_batching_and_order_do_not_matter(kind, prompt, bert, tiny_model_dir):
    path = bert if kind == "bert" else str(tiny_model_dir)
    spans = segment_texts(TEXTS, Segmenter()).char_spans
    whole = FrozenEncoder(path, Encoding(prompt=prompt))(PROMPTS, TEXTS, spans)
    small = FrozenEncoder(path, Encoding(prompt=prompt, batch_tokens=1))(PROMPTS, TEXTS, spans)
    turned = FrozenEncoder(path, Encoding(prompt=prompt))(PROMPTS[::-1], TEXTS[::-1], spans[::-1])
    order = [i for n in (2, 1, 0) for i in torch.nonzero(whole.response_index == n).flatten().tolist()]
    torch.testing.assert_close(whole.embeddings, small.embeddings, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(whole.embeddings[order], turned.embeddings, atol=1e-5, rtol=1e-4)
    assert whole.counts.tolist()[-1] == 0
    assert bool((whole.counts[:-1] > 0).all())


def test_prompt_is_cut_before_the_response(bert):
    text = "abc. " * 6
    spans = Segmenter()(text)
    found = FrozenEncoder(bert, Encoding(max_length=40))(["z " * 100], [text], [spans])
    assert found.counts.tolist() == [4, 4, 4, 4, 4, 4]  # a ##b ##c .
    cut = FrozenEncoder(bert, Encoding(max_length=24))(["z " * 100], [text], [spans])
    assert cut.counts.tolist() == [4, 4, 4, 3, 0, 0]  # 24 - 3 special - 6 of the prompt = 15
    assert FrozenEncoder(bert, Encoding(max_length=9999)).context.max_length == 128


def test_bfloat16_pools_in_float32(bert):
    spans = segment_texts(TEXTS, Segmenter()).char_spans
    exact = FrozenEncoder(bert, Encoding())(PROMPTS, TEXTS, spans).embeddings
    rough = FrozenEncoder(bert, Encoding(dtype="bfloat16"))(PROMPTS, TEXTS, spans).embeddings
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.1, rtol=0.1)


def test_features_and_unseen_sentences():
    embedded = Embedded(torch.tensor([[1.0, 0], [0, 2], [0, 0], [3, 4]]), torch.tensor([3, 1, 0, 2]), torch.tensor([0, 0, 1, 2]), 3)
    torch.testing.assert_close(response_means(embedded), torch.tensor([[0.75, 0.5], [0, 0], [3, 4]]))
    reference = Embedded(torch.tensor([[9.0, 9], [0, 5], [4, 0], [0, 0]]), torch.tensor([1, 1, 1, 0]), torch.tensor([0, 1, 1, 2]), 3)
    found = sentence_features(["reference"], embedded, reference, [1, 0, 2])
    expected = torch.tensor([[4, 0, 3, 0, 1.0], [0, 5, 0, 3, 1], [9, 9, 9, 9, 0], [0, 0, 0, 0, 0]])
    torch.testing.assert_close(found, expected)
    logits = torch.tensor([[1.0, 3.0, 7.0, 2.0]])
    assert fill_unseen(logits, embedded, torch.tensor([-4.0])).tolist() == [[1, 3, -4, 2]]
    cut = Embedded(embedded.embeddings, torch.tensor([3, 0, 0, 2]), torch.tensor([0, 0, 0, 1]), 2)
    assert fill_unseen(logits, cut, torch.tensor([-4.0])).tolist() == [[1, 1, 1, 2]]
    with pytest.raises(ConfigError, match="distinct names"):
        feature_size(["sentence", "mood"], 4)


@pytest.mark.parametrize("hidden", [0, 8])
def test_heads_equal_separate_networks(hidden):
    head = StackedHead(3, 5, hidden, seed=2).eval()
    x = torch.randn(7, 5) * 3 + 1
    head.fit_scale(x)
    normal = (x - x.mean(0)) / x.std(0, correction=0)
    for k in range(3):
        y = normal
        if hidden:
            y = torch.nn.functional.gelu(y @ head.hidden_weight[k] + head.hidden_bias[k])
        torch.testing.assert_close(head(x)[k], (y @ head.weight[k] + head.bias[k]).squeeze(-1))
    assert not torch.equal(head(x)[0], head(x)[1])


@pytest.mark.parametrize("features", [("sentence",), ("sentence", "response", "reference")])
@pytest.mark.parametrize("folds", [1, 3])
def test_scores_save_and_load(features, folds, bert, tmp_path):
    judge = judge_of(bert, features, folds)
    assert isinstance(judge, Discriminator)
    assert judge.needs_experts == ("reference" in features)
    spans = segment_texts(TEXTS, Segmenter())
    scores = judge.score(TEXTS, records(), spans)
    assert scores.shape == spans.response_index.shape
    assert not scores.requires_grad
    assert float(scores[-1]) == pytest.approx(float(judge.head.floor[fold_of(PROMPTS[-1], folds)]))  # the empty response
    judge.save(tmp_path / "d")
    again = load_discriminator(tmp_path / "d")
    assert torch.equal(again.score(TEXTS, records(), spans), scores)
    assert again.fingerprint() == judge.fingerprint()
    assert again.segmenter == judge.segmenter


def test_held_out_scores_come_from_the_prompts_fold(bert):
    judge = judge_of(bert, folds=3)
    spans = segment_texts(TEXTS, Segmenter())
    everything = judge._logits(TEXTS, records(), spans, strict=False)
    found = judge.score_held_out(TEXTS, records(), spans)
    for s, n in enumerate(spans.response_index.tolist()):
        assert float(found[s]) == float(everything[fold_of(PROMPTS[n], 3), s])
    assert torch.equal(judge.score(TEXTS, records(), spans), found)  # rollouts and experts are judged alike
    assert judge.cross_fitted
    assert not judge_of(bert).cross_fitted


def test_nothing_to_score(bert):
    assert judge_of(bert).score([], [], segment_texts([], Segmenter())).shape == (0,)


def test_reference_is_another_expert(bert):
    record = records(1)[0]
    assert pick_reference("abc. def.", record, strict=True) == "The gulls rest. The boats call."
    assert pick_reference("something else", record, strict=True) == "abc. def."
    assert pick_reference("x", Record("p", experts=("<think>a</think>b",)), strict=True) == "b"
    alone = Record("p", experts=("abc.",), source="data.jsonl:7")
    assert pick_reference("abc.", alone, strict=False) == "abc."
    with pytest.raises(DataError, match=r"data.jsonl:7.*another expert"):
        pick_reference("abc.", alone, strict=True)
    with pytest.raises(DataError, match=r"data.jsonl:8.*an expert response"):
        judge_of(bert, ("reference",)).score(["a."], [Record("p", source="data.jsonl:8")], segment_texts(["a."], Segmenter()))


def test_fingerprint_names_weights_and_settings(bert, tmp_path):
    judge = judge_of(bert)
    assert judge.fingerprint() == judge_of(bert).fingerprint() == judge_of(bert, batch_tokens=64).fingerprint()
    assert len({judge.fingerprint(), judge_of(bert, prompt=False).fingerprint(), judge_of(bert, ("sentence",)).fingerprint()}) == 3
    assert judge_of(bert_folder(tmp_path / "other", seed=5)).fingerprint() != judge.fingerprint()
    copied = shutil.copytree(bert, tmp_path / "copy")
    assert judge_of(str(copied)).fingerprint() == judge.fingerprint()
    assert not any(p.requires_grad for p in [*judge.head.parameters(), *judge.encoder.model.parameters()])
    assert not judge.encoder.model.training


def test_encoder_inside_the_folder_moves_with_it(bert, tmp_path):
    folder = tmp_path / "d"
    shutil.copytree(bert, folder / "encoder")
    judge_of(str(folder / "encoder")).save(folder)
    assert json.loads((folder / "discriminator.json").read_text())["encoder"] == "encoder"
    moved = shutil.move(folder, tmp_path / "elsewhere")
    load_discriminator(moved)


@pytest.fixture
def saved(bert, tmp_path):
    judge_of(bert).save(tmp_path / "d")
    return tmp_path / "d"


def edit(folder, **changes):
    file = folder / "discriminator.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_discriminator_that_does_not_fit_its_encoder(saved, tmp_path):
    with pytest.raises(ConfigError, match="expected hidden size 16, found 8"):
        load_discriminator(saved, encoder=bert_folder(tmp_path / "small", hidden_size=8))
    with pytest.raises(ConfigError, match=r"expected fingerprint [0-9a-f]{64}, found [0-9a-f]{64}"):
        load_discriminator(saved, encoder=bert_folder(tmp_path / "other", seed=9))
    with pytest.raises(ConfigError, match=r"does not fit its encoder.*16 columns.*expects 99"):
        EncoderHeadDiscriminator(load_discriminator(saved).encoder, StackedHead(1, 99), ("sentence",))


def test_damaged_folders(saved, tmp_path):
    with pytest.raises(ConfigError, match="no discriminator at"):
        load_discriminator(tmp_path / "nowhere")
    edit(saved, encoder="gone/away")
    with pytest.raises(ConfigError, match="cannot load the encoder 'gone/away'"):
        load_discriminator(saved)
    (saved / "discriminator.json").write_text('{"class": "encoder_head"}')
    with pytest.raises(ConfigError, match=r"damaged or of another version: KeyError: 'encoder'"):
        load_discriminator(saved)
    (saved / "discriminator.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        load_discriminator(saved)


def test_damaged_head(saved, bert):
    head = saved / "head.safetensors"
    other = judge_of(bert)
    other.head.bias.data += 1
    other.save(saved.parent / "other")
    good = head.read_bytes()
    shutil.copy(saved.parent / "other" / head.name, head)
    with pytest.raises(ConfigError, match="fingerprints differ"):
        load_discriminator(saved)
    head.write_bytes(good[:-9])
    with pytest.raises(ConfigError, match="damaged"):
        load_discriminator(saved)
    head.unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        load_discriminator(saved)


class Own:
    """A discriminator of one's own."""

    @classmethod
    def load(cls, folder, *, encoder=None, trust_remote_code=False):
        return cls()


def test_a_folder_does_not_choose_code(tmp_path):
    (tmp_path / "discriminator.json").write_text('{"class": "os.system"}')
    with pytest.raises(ConfigError, match=r"'os.system' is not one of"):
        load_discriminator(tmp_path)
    (tmp_path / "discriminator.json").write_text('{"class": "no_such.Thing"}')
    with pytest.raises(ConfigError, match="cannot import"):
        load_discriminator(tmp_path, allow=["no_such.Thing"])


def test_own_class_when_allowed(tmp_path, monkeypatch):
    import sys
    import types

    module = types.ModuleType("my_judges")
    module.Own = Own
    monkeypatch.setitem(sys.modules, "my_judges", module)
    (tmp_path / "discriminator.json").write_text('{"class": "my_judges.Own"}')
    assert isinstance(load_discriminator(tmp_path, allow=["my_judges.Own"]), Own)


def test_unfit_encoders(tmp_path, bert):
    tensors = tmp_path / "lacking"
    shutil.copytree(bert, tensors)
    from safetensors.torch import load_file, save_file

    weights = load_file(tensors / "model.safetensors")
    weights.pop(sorted(weights)[-1])
    save_file(weights, tensors / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lacks the weights"):
        FrozenEncoder(str(tensors), Encoding())
    t5 = tmp_path / "t5"
    shutil.copytree(bert, t5)
    small = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 60}
    AutoModel.from_config(AutoConfig.for_model("t5", **small)).save_pretrained(t5)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        FrozenEncoder(str(t5), Encoding())


@pytest.mark.parametrize("labels", [1, 2])
def test_sequence_classifier(labels, tmp_path):
    path = bert_folder(tmp_path / "m", labels=labels)
    judge = SequenceClassifierDiscriminator(path, "{prompt} : {reference} : {response}", temperature=2.0, batch_size=2)
    assert judge.whole_response
    assert judge.needs_experts
    texts = ["The {prompt} boats. Two.", "abc", "a longer one here. ok"]
    rows = records()
    spans = segment_texts(texts, Segmenter())
    scores = judge.score(texts, rows, spans)
    expected = []
    for text, prompt in zip(texts, ["Describe the harbor.", "abc", "x"], strict=True):
        inputs = judge.tokenizer(f"{prompt} : abc. def. : {text}", return_tensors="pt")
        with torch.no_grad():
            out = judge.model(**inputs).logits[0]
        expected.append(float(out[-1] - (out[0] if labels == 2 else 0)) / 2)
    torch.testing.assert_close(scores, torch.tensor([expected[i] for i in spans.response_index.tolist()]), atol=1e-5, rtol=1e-4)
    judge.save(tmp_path / "d")
    assert torch.equal(load_discriminator(tmp_path / "d").score(texts, rows, spans), scores)
    with pytest.raises(ConfigError, match="expected weights with fingerprint"):
        load_discriminator(tmp_path / "d", encoder=bert_folder(tmp_path / "o", seed=3, labels=labels))


def test_sequence_classifier_refuses(tmp_path, tiny_model_dir):
    with pytest.raises(ConfigError, match="3 outputs"):
        SequenceClassifierDiscriminator(bert_folder(tmp_path / "m", labels=3))
    with pytest.raises(ConfigError, match="lacks the weights"):
        SequenceClassifierDiscriminator(str(tiny_model_dir))
    with pytest.raises(ConfigError, match="template"):
        SequenceClassifierDiscriminator("x", "{prompt}")


def test_causal_judge_over_an_exported_policy(tiny_model_dir):
    judge = judge_of(str(tiny_model_dir))
    before = {name: value.clone() for name, value in judge.encoder.model.state_dict().items()}
    spans = segment_texts(TEXTS, Segmenter())
    first = judge.score(TEXTS, records(), spans)
    assert torch.equal(judge.to("cpu").score(TEXTS, records(), spans), first)
    assert all(torch.equal(before[name], value) for name, value in judge.encoder.model.state_dict().items())
    full = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert sum(p.numel() for p in judge.encoder.model.parameters()) <= sum(p.numel() for p in full.parameters())
