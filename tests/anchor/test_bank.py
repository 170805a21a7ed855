"""The expert bank: what it stores, how it is keyed, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from aapa_lightning.anchor.bank import ExpertBank
from aapa_lightning.anchor.segment import Segmenter
from aapa_lightning.data.records import prompt_hash
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Record


class CountingJudge:
    """Logit of a sentence: its length in characters; held out: its negative."""

    needs_experts = False
    whole_response = False
    cross_fitted = True

    def __init__(self, name="judge"):
        self.name = name
        self.calls = []

    def score(self, responses, records, spans):
        return torch.tensor([float(end - start) for row in spans.char_spans for start, end in row])

    def score_held_out(self, responses, records, spans):
        self.calls.append(len(responses))
        return -self.score(responses, records, spans)

    def fingerprint(self):
        return self.name


def record(i, *experts):
    return Record(f"prompt {i}", experts=experts or (f"One {i}. Two.",), source=f"data.jsonl:{i + 1}")


@pytest.fixture
def bank(tmp_path):
    records = [record(0, "A boat. Cat.", "Longer here."), *(record(i) for i in range(1, 10)), record(0, "X.")]
    judge = CountingJudge()
    built = ExpertBank.build(tmp_path / "bank", records, judge, batch_size=4)
    assert judge.calls == [5, 4, 3]  # streamed
    return built


def test_look_up(bank):
    assert len(bank) == 11
    assert bank.experts(record(3)) == ["One 3. Two."]
    assert bank.expert_logits(record(3)).tolist() == [-7, -4]
    assert bank.experts(record(0)) == ["A boat. Cat.", "Longer here.", "X."]  # both records with this prompt
    assert bank.expert_logits(record(0)).tolist() == [-8, -4, -12, -2]


def test_an_unknown_prompt_has_nothing(bank):
    assert bank.experts(record(77)) == []
    assert bank.expert_logits(record(77)) is None


def test_equal_prefixes_are_told_apart(bank, monkeypatch):
    """The index holds 15 digits of a hash, the rows all of it."""
    twin = prompt_hash("prompt 3")[:15] + "0" * 49
    monkeypatch.setattr("aapa_lightning.anchor.bank.prompt_hash", lambda prompt: twin)
    assert bank.experts(record(3)) == []


def test_opens_again_and_checks_the_discriminator(bank):
    again = ExpertBank(bank.folder, "judge")
    assert torch.equal(again.expert_logits(record(5)), bank.expert_logits(record(5)))
    assert again.cross_fitted
    assert again.fingerprint == "judge"
    with pytest.raises(ConfigError, match=r"built with the discriminator judge, but the one in use is other"):
        ExpertBank(bank.folder, "other")


def test_a_bank_of_an_earlier_version_is_refused(bank):
    stamp = bank.folder / "bank.json"
    stamp.write_text(json.dumps({key: value for key, value in json.loads(stamp.read_text()).items() if key not in ("sha256", "index")}))
    with pytest.raises(ConfigError, match=r"of an earlier version.*build the bank again"):
        ExpertBank(bank.folder)


def test_thinking_and_whole_responses(tmp_path):
    records = [record(0, "<think>A. B.</think>C d. E.")]
    judge = CountingJudge()
    assert ExpertBank.build(tmp_path / "a", records, judge).experts(records[0]) == ["C d. E."]
    assert ExpertBank.build(tmp_path / "b", records, judge, score_thinking=True).experts(records[0]) == ["<think>A. B.</think>C d. E."]
    judge.whole_response = True
    assert ExpertBank.build(tmp_path / "c", records, judge, Segmenter()).expert_logits(records[0]).tolist() == [-7]


def test_rebuild_replaces_a_bank_and_nothing_else(bank, tmp_path):
    assert len(ExpertBank.build(bank.folder, [record(1)], CountingJudge("new"))) == 1
    assert ExpertBank(bank.folder, "new").experts(record(1)) == ["One 1. Two."]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="is no expert bank"):
        ExpertBank.build(tmp_path / "mine", [record(1)], CountingJudge())
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_failed_build_leaves_the_old_bank(bank):
    with pytest.raises(DataError, match=r"data.jsonl:8: no expert response"):
        ExpertBank.build(bank.folder, [record(1), Record("p", source="data.jsonl:8")], CountingJudge("new"))
    assert len(ExpertBank(bank.folder, "judge")) == 11
    with pytest.raises(DataError, match="no records"):
        ExpertBank.build(bank.folder, [], CountingJudge())


def test_damage(bank, tmp_path):
    with pytest.raises(ConfigError, match="no expert bank at"):
        ExpertBank(tmp_path / "nowhere")
    stamp = bank.folder / "bank.json"
    good = stamp.read_text()
    stamp.write_text(json.dumps(json.loads(good) | {"rows": 5}))
    with pytest.raises(ConfigError, match="damaged"):
        ExpertBank(bank.folder)
    stamp.write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        ExpertBank(bank.folder)
    stamp.write_text(good)
    (bank.folder / "experts.arrow").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"experts.arrow is damaged"):
        ExpertBank(bank.folder)
    (bank.folder / "index.arrow").unlink()
    with pytest.raises(ConfigError, match=r"index.arrow is missing"):
        ExpertBank(bank.folder)


def test_every_flipped_bit_is_found_at_the_latest_when_it_is_touched(bank):
    """Every place of every file: on opening, or when the record is looked up whose batch holds it."""
    for name in ("bank.json", "index.arrow", "experts.arrow"):
        path = bank.folder / name
        whole = path.read_bytes()
        for place in range(0, len(whole), 13):
            content = bytearray(whole)
            content[place] ^= 1 << place % 8
            path.write_bytes(content)
            with pytest.raises(ConfigError, match=rf"{name} is damaged.*build the bank again"):
                look_at_all(ExpertBank(bank.folder))
        path.write_bytes(whole)
    assert look_at_all(ExpertBank(bank.folder)) == 10


def look_at_all(bank):
    return sum(bool(bank.experts(record(i))) and bank.expert_logits(record(i)) is not None for i in range(10))


def test_a_look_up_checks_what_it_touches_and_nothing_else(tmp_path):
    bank = ExpertBank.build(tmp_path / "bank", [record(i) for i in range(12)], CountingJudge(), batch_size=4)
    content = bytearray((bank.folder / "experts.arrow").read_bytes())
    content[content.rindex(b"One 11.")] ^= 1
    (bank.folder / "experts.arrow").write_bytes(content)
    again = ExpertBank(bank.folder)
    assert again.experts(record(3)) == ["One 3. Two."]
    for _ in range(2):  # damaged stays damaged
        with pytest.raises(ConfigError, match=r"experts.arrow is damaged: bytes \d+ to \d+ are not those that were written"):
            again.expert_logits(record(9))


def test_rows_stay_on_disk(tmp_path):
    import pyarrow as pa

    text = "word " * 20000
    before = pa.total_allocated_bytes()
    bank = ExpertBank.build(tmp_path / "bank", [record(i, text) for i in range(64)], CountingJudge(), batch_size=8)
    assert (tmp_path / "bank" / "experts.arrow").stat().st_size > 64 * len(text)
    assert bank.experts(record(40)) == [text]
    assert pa.total_allocated_bytes() - before < 10 * len(text)
