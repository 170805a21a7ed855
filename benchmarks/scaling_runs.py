"""The parts that scaling.py measures, each in a process of its own. Prints one JSON object last."""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from anchor_case import Case, make_anchor
from bank import Arithmetic, make_record, watched

from aapa_lightning.anchor import forward
from aapa_lightning.anchor.bank import ExpertBank
from aapa_lightning.anchor.guard import measure
from aapa_lightning.anchor.segment import Segmenter, segment_rollouts
from aapa_lightning.anchor.signal import AnchorOptions, build_signal
from aapa_lightning.data.records import LazyRecords
from aapa_lightning.types import Record, Rollouts, SentenceSpans

PROMPTS, GROUP, TOKENS = 4, 8, 64
Point = dict[str, float]


def take_time(function: Callable[[], Any], repeats: int) -> Point:
    """Least seconds of this process of some calls, and the most anonymous memory that the first one held above what was there, in MiB."""
    # what earlier calls have freed would hide what this one takes
    ctypes.CDLL(None).malloc_trim(0)
    with watched() as peak:
        before = peak[0]
        function()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return {"seconds": min(seconds), "mib": max(peak[0] - before, 0.0)}


def curve(sizes: list[int], make: Callable[[int], Callable[[], Any]], repeats: int = 5) -> list[dict[str, Any]]:
    """One point a size; ``make`` prepares a call."""
    return [{"size": size, **take_time(make(size), repeats)} for size in sizes]


def signal_curves(path: str, quick: bool) -> dict[str, Any]:
    """``AnchorTerm.signal`` with the frozen initial policy as encoder."""
    case, anchor = Case.make(path), make_anchor(path)

    def signal(prompts: int, samples: int, tokens: int) -> Callable[[], Any]:
        rollouts = case.rollouts(prompts, samples, tokens)
        return lambda: anchor.signal(rollouts)

    n, g, length = ([8, 32, 128, 512], [4, 16, 64], [32, 64, 128, 256, 512]) if not quick else ([8, 16], [2, 4], [8, 16])
    return {
        "responses": curve(n, lambda size: signal(size // GROUP, GROUP, TOKENS)),
        "group": curve(g, lambda size: signal(PROMPTS, size, TOKENS)),
        "tokens": curve(length, lambda size: signal(PROMPTS, 2, size)),
    }


def fixed_logits(prompts: int, samples: int, tokens: int) -> tuple[torch.Tensor, SentenceSpans, Rollouts]:
    """Logits of sentences of eight tokens, and rollouts with nothing in them but what an advantage reads."""
    n = prompts * samples
    sentences = math.ceil(tokens / 8)
    index = torch.arange(n).repeat_interleave(sentences)
    token_sentence = torch.arange(n)[:, None] * sentences + torch.arange(tokens) // 8
    spans = SentenceSpans(index, token_sentence.flatten().bincount(), token_sentence, [[(0, 1)] * sentences] * n)
    groups = torch.arange(prompts).repeat_interleave(samples)
    ones = torch.ones(n, tokens, dtype=torch.bool)
    blank = torch.zeros(n, tokens, dtype=torch.int64)
    records = [record for i in range(prompts) for record in [Record(f"p{i}", experts=("An answer.",))] * samples]
    rollouts = Rollouts(blank, ones, blank, ones, torch.zeros(n, dtype=torch.bool), groups, -ones.float(), blank, ["text"] * n, records)
    return torch.randn(len(index), generator=torch.Generator().manual_seed(0)), spans, rollouts


def advantage_curves(quick: bool) -> dict[str, Any]:
    """From logits to advantages, and the guard's measures, without any encoder."""
    options = AnchorOptions()

    def advantages(prompts: int, samples: int, tokens: int) -> Callable[[], Any]:
        inputs = fixed_logits(prompts, samples, tokens)
        return lambda: build_signal(*inputs, options)

    def guard(size: int) -> Callable[[], Any]:
        logits, spans, rollouts = fixed_logits(size // GROUP, GROUP, TOKENS)
        signal = build_signal(logits, spans, rollouts, options)
        rewards = torch.rand(size)
        return lambda: measure(rollouts, signal, rewards, torch.randn(size))

    # larger tensors are mapped anew by every operation, and it is the system's pages that are timed
    n, length = ([1024, 4096, 16384], [1024, 4096, 16384]) if not quick else ([64, 256], [64, 256])
    return {
        "advantages, responses": curve(n, lambda size: advantages(size // GROUP, GROUP, TOKENS)),
        "advantages, group": curve(n, lambda size: advantages(PROMPTS, size // PROMPTS, TOKENS)),
        "advantages, tokens": curve(length, lambda size: advantages(PROMPTS, GROUP, size)),
        "guard, responses": curve(n, guard),
    }


def text_curves(path: str, quick: bool) -> dict[str, Any]:
    """Segmenting and laying out text, and building a bank."""
    encoder = make_anchor(path).discriminator.encoder
    segmenter = Segmenter()
    words = " ".join(make_record(i).experts[0] for i in range(200))

    def segment(size: int) -> Callable[[], Any]:
        texts = [(words * (size // len(words) + 1))[:size]]
        return lambda: [segmenter(text) for text in texts]

    def layout(size: int) -> Callable[[], Any]:
        texts = [(words * (size // len(words) + 1))[:size]]
        spans = [segmenter(text) for text in texts]
        return lambda: encoder.context(["p"], texts, spans)

    def bank(size: int) -> Callable[[], Any]:
        def build() -> None:
            with tempfile.TemporaryDirectory() as folder:
                ExpertBank.build(Path(folder) / "bank", LazyRecords(make_record, size), Arithmetic())

        return build

    chars, rows = ([4096, 16384, 65536, 262144], [2000, 8000, 32000]) if not quick else ([256, 1024], [100, 200])
    return {
        "segmenting, characters": curve(chars, segment),
        "layout, characters": curve(chars, layout),
        "bank, experts": curve(rows, bank, repeats=2),
    }


def step_parts(path: str, quick: bool) -> dict[str, Any]:
    """The anchored step beside the bare one, on the wall, taking turns, and what the anchor's part is made of."""
    case, anchor = Case.make(path), make_anchor(path)
    tokens, rounds = (8, 2) if quick else (TOKENS, 9)
    rollouts = case.rollouts(PROMPTS, GROUP, tokens)
    encoder = anchor.discriminator.encoder
    prompts, texts = [record.prompt for record in rollouts.records], rollouts.texts
    spans = segment_rollouts(rollouts, anchor.segmenter)
    rows = encoder.context(prompts, texts, spans.char_spans)
    given = anchor.signal(rollouts)
    calls: dict[str, Callable[[], Any]] = {
        "bare": lambda: case.step(PROMPTS, GROUP, tokens),
        "anchored": lambda: case.step(PROMPTS, GROUP, tokens, anchor),
        "signal": lambda: anchor.signal(rollouts),
        "segmenting": lambda: segment_rollouts(rollouts, anchor.segmenter),
        "layout": lambda: encoder.context(prompts, texts, spans.char_spans),
        "forward": lambda: list(encoder._forward(rows, range(len(rows)))),
        "advantages": lambda: build_signal(given.logits, spans, rollouts, anchor.options),
        "guard": lambda: anchor.observe(rollouts, given, torch.rand(len(rollouts))),
    }
    ms: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            ms[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in ms.items()}
    return {
        "anchored_over_bare": medians["anchored"] / medians["bare"],
        "signal_over_bare": medians["signal"] / medians["bare"],
        "ms": medians,
        "encoder_tokens": sum(len(row.ids) for row in rows),
        "prompt_tokens": sum(row.head for row in rows),
    }


def by_rows(size: int) -> Callable[..., Any]:
    """Batches as they come, so many rows each."""

    def batches(chosen: Any, lengths: Any, batch_tokens: int, most: int | None = None) -> Any:
        chosen = list(chosen)
        return (chosen[i : i + size] for i in range(0, len(chosen), size))

    return batches


def batching(path: str, quick: bool) -> dict[str, Any]:
    """Rows of like length within a budget of tokens, against rows as they come, on responses of many lengths."""
    case, anchor = Case.make(path), make_anchor(path)
    encoder = anchor.discriminator.encoder
    rollouts = case.rollouts(2, 4, 16) if quick else case.rollouts(8, 8, 256)
    lengths = (torch.rand(len(rollouts), generator=torch.Generator().manual_seed(0)) * 0.95 + 0.05).tolist()
    texts = [text[: int(len(text) * share)] for text, share in zip(rollouts.texts, lengths, strict=True)]
    prompts = [record.prompt for record in rollouts.records]
    spans = [Segmenter()(text) for text in texts]
    counted = {"real": 0, "all": 0}

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs["attention_mask"][:, -kwargs["input_ids"].shape[1] :]
        counted["real"] += int(mask.sum())
        counted["all"] += mask.numel()

    def run() -> torch.Tensor:
        return encoder(prompts, texts, spans).embeddings

    run()  # tries out what the model can do, which is not to be counted
    hook = encoder.model.register_forward_pre_hook(count, with_kwargs=True)
    found, values = {}, {}
    usual, pays = forward._batches, encoder._forward._pays
    plans = {"rows as they come": (by_rows(16), False), "by length": (usual, False), "by length, prompts once": (usual, True)}
    for name, (batches, share) in plans.items():
        forward._batches = batches
        encoder._forward._pays = pays if share else lambda *_: False
        counted.update(real=0, all=0)
        values[name] = run()
        found[name] = {"padding": 1 - counted["real"] / counted["all"], "tokens": counted["all"], **take_time(run, 3)}
    forward._batches = usual
    hook.remove()
    first = values["rows as they come"]
    worst = max(float((value - first).abs().max()) for value in values.values())
    ratio = found["by length, prompts once"]["seconds"] / found["rows as they come"]["seconds"]
    return {"time_over_rows_as_they_come": ratio, "largest_difference": worst, "plans": found}


def weak(path: str, quick: bool) -> dict[str, Any]:
    """Seconds of a rank's signal and GRPO step, on the wall and of the process, with its peers where there are any."""
    import torch.distributed as dist

    world, coupled = int(os.environ["WORLD_SIZE"]), os.environ["COUPLED"] == "1"
    store = dist.FileStore(os.environ["STORE"], world)
    dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=world)
    case, anchor = Case.make(path), make_anchor(path)

    def over_ranks(value: torch.Tensor) -> torch.Tensor:
        if coupled and world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    tokens, rounds = (8, 2) if quick else (TOKENS, 5)
    rollouts = case.rollouts(PROMPTS, GROUP, tokens)
    calls = {
        "signal": lambda: anchor.signal(rollouts, sum_over_ranks=over_ranks),
        "step": lambda: case.step(PROMPTS, GROUP, tokens, anchor, over_ranks=over_ranks),
    }
    found = {}
    for name, call in calls.items():
        call()
        wall, work = [], []
        for _ in range(rounds):
            dist.barrier()
            start, worked = time.perf_counter(), time.process_time()
            call()
            wall.append(time.perf_counter() - start)
            work.append(time.process_time() - worked)
        found |= {name: min(wall), f"{name}, work": min(work)}
    dist.barrier()
    dist.destroy_process_group()
    return found


PARTS: dict[str, Callable[[str, bool], dict[str, Any]]] = {
    "signal": signal_curves,
    "advantages": lambda path, quick: advantage_curves(quick),
    "text": text_curves,
    "step": step_parts,
    "batching": batching,
    "weak": weak,
}


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("policy", help="folder of anchor_case.write_policy")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(PARTS[args.part](args.policy, args.quick)))


if __name__ == "__main__":
    main()
