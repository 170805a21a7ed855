"""Time of log-probs, forward and backward, from packed rows against padded ones, by how far the lengths of a batch are spread.

Run: OMP_NUM_THREADS=1 python benchmarks/packing.py [--quick] [--repeats 3] [--json] [--write]
A GRPO micro-step's work on one device: response_logprobs and the backward pass of a random Qwen3 (hidden 256, 4 layers, vocabulary 1,024),
prompts padded on the left, responses on the right, lengths lognormal with median 40 (prompts) and 96 (responses), cut at 80 and 384. Paths
take turns in one process: `padded`, `packed` (bins about as wide as the longest row) and `one_row` (all rows behind each other, as under
flash attention; under SDPA its mask is quadratic in all tokens). Before, values and gradients are held to the padded
ones. Time: seconds of the process, the least of the repeats; on CUDA the wall around a synchronised device, in bfloat16, with the flash
attention that `auto` finds, where `packed` is `one_row`.

Predicted before the first run, and printed beside each ratio: cost is tokens x (24 H^2-like products of the layers + attention over the
width of the row), so packed over padded = cells after / cells before x that; 1.0 without spread; one_row loses on long batches.
--write replaces benchmarks/results/packing.json and docs/results/packing.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timing
import torch
from torch import Tensor

from aapa_lightning.attention import use_flash_attention
from aapa_lightning.logprobs import packing, response_logprobs, set_packing
from aapa_lightning.logprobs.inputs import uses_flash

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"head_dim": 64, "vocab_size": 1024, "tie_word_embeddings": True}
SPREADS = (0.0, 0.5, 1.0)
ROWS, PROMPT, RESPONSE, LONGEST_PROMPT, LONGEST = 16, 40, 96, 80, 384
Batch = list[Tensor]


def lengths(spread: float, median: int, longest: int, rows: int, generator: torch.Generator) -> Tensor:
    """int64 ``[N]``: lognormal, of at least one token."""
    drawn = median * torch.exp(spread * torch.randn(rows, generator=generator))
    return drawn.long().clamp(1, longest)


def make_batch(spread: float, rows: int, device: str) -> Batch:
    """Prompts padded on the left, responses on the right, and their masks."""
    g = torch.Generator().manual_seed(0)
    before, after = lengths(spread, PROMPT, LONGEST_PROMPT, rows, g), lengths(spread, RESPONSE, LONGEST, rows, g)
    width, length = int(before.max()), int(after.max())
    prompts, responses = (torch.randint(3, SIZES["vocab_size"], (rows, size), generator=g) for size in (width, length))
    parts = prompts, torch.arange(width) >= width - before[:, None], responses, torch.arange(length) < after[:, None]
    return [part.to(device) for part in parts]


def make_model(device: str) -> Any:
    """A random Qwen3, in bfloat16 with flash attention on CUDA."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **SIZES), dtype=dtype).to(device)
    use_flash_attention(model, dtype)
    return model


@contextmanager
def path(model: Any, name: str) -> Iterator[None]:
    """Compute log-probs in one of the three ways."""
    bins = packing._bins
    set_packing(model, name != "padded")
    packing._bins = (lambda lengths, hidden: packing._one_row(lengths)) if name == "one_row" else bins
    try:
        yield
    finally:
        packing._bins = bins


def step(model: Any, batch: Batch) -> Tensor:
    """Log-probs ``[N, L]``; their mean's gradient stays on the model."""
    model.zero_grad()
    logprobs, _ = response_logprobs(model, *batch)
    (logprobs.sum() / batch[3].sum()).backward()
    return logprobs.detach()


def check(model: Any, batch: Batch, names: list[str]) -> dict[str, float]:
    """Largest difference of log-probs, and of gradients by their norm, from the padded ones: no figures of another computation."""
    made = {}
    for name in names:
        with path(model, name):
            values = step(model, batch)
        made[name] = values.double(), torch.cat([p.grad.double().flatten() for p in model.parameters()])
    right = made["padded"]
    limit = 1e-4 if values.device.type == "cpu" else 0.05
    found = {}
    for name, (values, gradient) in made.items():
        found[name] = max(float((values - right[0]).abs().max()), float((gradient - right[1]).norm() / right[1].norm()))
        if not found[name] <= limit:
            sys.exit(f"{name} differs from padded by {found[name]:.3g}, more than {limit}: no figures")
    return found


def cost(rows: int, width: int) -> float:
    """Products of a forward pass over ``rows`` of ``width`` tokens, in arbitrary units."""
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    heads, keys = (SIZES[name] * SIZES["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    layer = 2 * hidden * heads + 2 * hidden * keys + 3 * hidden * inner
    return rows * width * (SIZES["num_hidden_layers"] * (layer + 2 * heads * width) + hidden * SIZES["vocab_size"])


def shapes(batch: Batch) -> dict[str, tuple[int, int]]:
    """Rows and width of what the model is called with."""
    tokens = (batch[1].sum(1) + batch[3].sum(1)).tolist()
    _, used = packing._bins(tokens, SIZES["hidden_size"])
    padded = (batch[0].shape[0], batch[0].shape[1] + batch[2].shape[1])
    return {"padded": padded, "packed": (len(used), max(used)), "one_row": (1, sum(tokens))}


def seconds(model: Any, batch: Batch) -> float:
    """Of one step."""
    clock: Callable[[], float] = time.perf_counter if timing.cuda() else time.process_time
    start = clock()
    step(model, batch)
    if timing.cuda():
        torch.cuda.synchronize()
    return clock() - start


def measure(model: Any, spread: float, rows: int, repeats: int) -> dict[str, Any]:
    """All paths on one batch, in turns."""
    batch = make_batch(spread, rows, model.device.type)
    names = ["padded", "packed"] if uses_flash(model) else ["padded", "packed", "one_row"]
    errors, sizes = check(model, batch, names), shapes(batch)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            with path(model, name):
                times[name].append(seconds(model, batch))
    tokens, cells = sizes["one_row"][1], sizes["padded"][0] * sizes["padded"][1]
    found: dict[str, Any] = {"spread": spread, "rows": rows, "tokens": tokens, "padding_share": 1 - tokens / cells, "errors": errors}
    found["paths"] = {
        name: {"rows": sizes[name][0], "width": sizes[name][1], "time": min(values), "median_time": statistics.median(values)}
        for name, values in times.items()
    }
    for name in names[1:]:
        found[f"{name}_over_padded_time"] = min(times[name]) / min(times["padded"])
        found[f"{name}_over_padded_predicted"] = cost(*sizes[name]) / cost(*sizes["padded"])
    return found


def line(case: dict[str, Any]) -> str:
    """A row of the table."""
    ratios = [f"{case[f'{name}_over_padded_time']:.2f} ({case[f'{name}_over_padded_predicted']:.2f})" for name in list(case["paths"])[1:]]
    sizes = [f"{part['rows']} x {part['width']:,}, {part['time']:.2f} s" for part in case["paths"].values()]
    return "| " + " | ".join([f"{case['spread']:g}", f"{case['padding_share']:.0%}", *ratios, *sizes]) + " |"


def report(found: dict[str, Any]) -> str:
    """The page."""
    names = list(found["cases"][0]["paths"])
    heads = ["Spread", "Padding", *(f"{name} over padded (predicted)" for name in names[1:]), *names]
    machine, worst = found["machine"], max(max(case["errors"].values()) for case in found["cases"])
    table = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *(line(case) for case in found["cases"])]
    return "\n".join(
        [
            "# Packed rows against padded ones: time",
            "",
            f"Generated by `OMP_NUM_THREADS={machine['threads']} python benchmarks/packing.py --write`.",
            "",
            "Log-probs of responses, forward and backward, of a random Qwen3 (hidden 256, 4 layers). Spread is the deviation of the",
            "logarithm of lengths; padding is the share of cells in the padded batch that hold none of its tokens. How packing works:",
            "[packing.md](../packing.md).",
            "",
            *table,
            "",
            "`packed` fills bins about as wide as the longest row, which is what `packing: true` does under SDPA and eager attention.",
            "`one_row` lays all rows behind each other under SDPA: its mask and its attention grow with the square of all tokens; only a",
            "flash attention with kernels for rows of different lengths does this well. Predicted: products of the layers plus attention",
            "over the width of a row, both times its cells, written down before the first run. A quick run of three rows had shown that",
            "bins exactly as wide as the longest row waste cells, and bins have been chosen by that cost since.",
            "",
            f"Time: seconds of the process, the least of {found['repeats']}. Largest difference from padded rows, values or gradients:",
            f"{worst:.1e}. {machine['device']}, {machine['threads']} thread, torch {machine['versions']['torch']}, load of the machine "
            f"{machine['load']:.1f} before and {found['load_at_the_end']:.1f} after.",
            "",
        ]
    )


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--write", action="store_true", help="replace the kept figures and the table")
    args = parser.parse_args()
    model = make_model("cuda" if timing.cuda() else "cpu")
    found: dict[str, Any] = {"machine": timing.machine(), "attention": model.config._attn_implementation, "repeats": args.repeats}
    found["cases"] = [
        measure(model, spread, 3 if args.quick else ROWS, args.repeats) for spread in (SPREADS[-1:] if args.quick else SPREADS)
    ]
    last = found["cases"][-1]
    found |= {key: last[key] for key in ("packed_over_padded_time", "packed_over_padded_predicted", "padding_share")}
    found = timing.rounded(found | {"load_at_the_end": os.getloadavg()[0]})
    print(report(found))
    if args.write:
        (ROOT / "benchmarks" / "results" / "packing.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        (ROOT / "docs" / "results" / "packing.md").write_text(report(found), encoding="utf-8")
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
