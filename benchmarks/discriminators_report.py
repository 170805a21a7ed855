"""The page and the pictures of benchmarks/discriminators.py, from its result alone.

Run: python benchmarks/discriminators_report.py   (after benchmarks/discriminators.py --write; measures nothing)
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEPT, PAGE, IMAGES = "benchmarks/results/discriminators.json", "docs/results/discriminators.md", "docs/images"
MEASURES = {"sentence_auroc": "sentence AUROC", "response_auroc": "response AUROC", "paired_accuracy": "paired accuracy"}
TARGETS = {"sentence_auroc": 0.92, "response_auroc": 0.88, "paired_accuracy": 0.88}
MAIN, ALLOWED_DROP = "qwen2.5-0.5b", 0.05
TITLES = {
    MAIN: "gpt-4o over qwen2.5-0.5b",
    "qwen2.5-1.5b": "gpt-4o over qwen2.5-1.5b",
    "qwen2.5-7b": "gpt-4o over qwen2.5-7b, which no head was trained on",
    "claude-3.5-sonnet": "gpt-4o over claude-3.5-sonnet, an expert that no head was trained on: 0.5 is right",
    "unseen expert over 0.5b": "claude-3.5-sonnet over qwen2.5-0.5b",
}
WIDTH, HEIGHT, SIDE, TOP = 960, 430, 320, 60
STYLE = (
    "text{font-family:sans-serif;fill:#4a5568}.title{font-size:14px;font-weight:bold}.label{font-size:12px}.middle{text-anchor:middle}"
    ".end{text-anchor:end}.axis{stroke:#718096;fill:none}.even{stroke:#a0aec0;stroke-dasharray:5 4}.dot{fill:#2b6cb0;fill-opacity:.75}"
)


def interval(figures: dict[str, Any], name: str) -> str:
    """A figure with its interval."""
    value = f"{figures[name]:.3f}"
    return f"{value} [{figures[f'{name}_low']:.3f}, {figures[f'{name}_high']:.3f}]" if f"{name}_low" in figures else value


def lines_of(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def name_of(row: dict[str, Any]) -> str:
    """What tells a row from the others."""
    layers = "last layer" if row["layers"] == [-1] else f"layers {', '.join(map(str, row['layers']))}"
    return f"{layers}; {' + '.join(row['features'])}"


def table(result: dict[str, Any]) -> str:
    """One table for each pair."""
    parts = []
    for pair, title in TITLES.items():
        rows = [
            [name_of(row), *(interval(row["figures"][pair], name) for name in MEASURES)] for row in result["rows"] if pair in row["figures"]
        ]
        if rows:
            parts.append(f"**{title}**\n\n" + lines_of(["layers; features", *MEASURES.values()], rows))
    return "\n\n".join(parts)


def cost_table(result: dict[str, Any]) -> str:
    """Calibration error, temperature and time of every row."""
    rows = []
    for row in result["rows"]:
        found = row["calibration"]
        figures = [found["before"]["ece"], found["after"]["ece"], found["temperature"]]
        rows.append([name_of(row), *(f"{value:.3f}" for value in figures), f"{row['cpu_seconds']:.0f}", f"{row['seconds']:.0f}"])
    return lines_of(["layers; features", "ECE before", "ECE after", "temperature", "CPU seconds", "wall seconds"], rows)


def strata_table(row: dict[str, Any]) -> str:
    """Figures within each fifth of the lengths, and how far they lie from those of all responses together."""
    overall, rows = row["figures"][MAIN], []
    names = list(MEASURES)[:2]
    for one in row["strata"]:
        cells = [text for name in names for text in (interval(one, name), f"{one[name] - overall[name]:+.3f}")]
        rows.append([f"{one['shortest']} to {one['longest']}", str(one["experts"]), str(one["others"]), *cells])
    means = {name: statistics.mean(one[name] for one in row["strata"]) for name in names}
    cells = [text for name in names for text in (f"{means[name]:.3f}", f"{means[name] - overall[name]:+.3f}")]
    head = [text for name in names for text in (MEASURES[name], "against all")]
    return lines_of(["characters", "gpt-4o", "qwen2.5-0.5b", *head], [*rows, ["mean of the five", "", "", *cells]])


def targets_text(row: dict[str, Any]) -> str:
    """What was asked for, and whether it is there."""
    figures = row["figures"][MAIN]
    parts = [
        f"{MEASURES[name]} {figures[name]:.3f} ({'at least' if figures[name] >= least else 'MISSES'} {least})"
        for name, least in TARGETS.items()
    ]
    return "Against qwen2.5-0.5b: " + ", ".join(parts) + "."


def strata_text(row: dict[str, Any]) -> str:
    """Which fifths fall short, and why."""
    overall = row["figures"][MAIN]
    text = []
    for name in list(MEASURES)[:2]:
        drops = {f"{one['shortest']} to {one['longest']} characters": overall[name] - one[name] for one in row["strata"]}
        short = [f"{label} ({drop:.3f} less)" for label, drop in drops.items() if drop > ALLOWED_DROP]
        mean = statistics.mean(drops.values())
        where = f"worse than all together by more than {ALLOWED_DROP}: {'; '.join(short) or 'none'}"
        side = f"{abs(mean):.3f} {'below' if mean > 0 else 'above'}"
        text.append(f"- {MEASURES[name]}: the mean of the five lies {side} the figure of all together; {where}.")
    return "\n".join(text)


def page(result: dict[str, Any]) -> str:
    """docs/results/discriminators.md."""
    best, machine = result["rows"][-1], result["machine"]
    weak_auroc, unseen_auroc, over_weak = (
        best["figures"][name]["response_auroc"] for name in ("qwen2.5-7b", "claude-3.5-sonnet", "unseen expert over 0.5b")
    )
    place = f"{machine['threads']} thread(s) of {machine['machine']} ({machine['device']})"
    return f"""# Discriminators on real text

```bash
AAPA_DATA=path/to/data {result["command"]}
```

This page is written by that command (figures: `{KEPT}`). A head on a frozen all-MiniLM-L6-v2
learns gpt-4o's answers against those of qwen2.5-0.5b and 1.5b to {result["prompts"]} IFEval prompts. Prompt and answer are encoded
together, up to {result["max_length"]} tokens. Cross-validation by prompt, {result["folds"]} folds, {result["epochs"]} epochs: every
answer is judged by the head that saw no answer to its prompt. The `reference` feature compares with the answer of claude-3.5-sonnet,
and claude's own with gpt-4o's: an expert is never its own reference. The score of a response is the mean logit of its sentences.
In brackets, 95% intervals over prompts, from {result["resamples"]} bootstrap resamples.

## Figures

{table(result)}

{targets_text(best)}

How to read this, for the last row:

- The heads know the *small* models' faults. Against qwen2.5-7b, which they never saw, the response AUROC is {weak_auroc:.3f}:
  better text than the negatives is told from an expert's much less surely. Take the policy's own rollouts as negatives, and renew
  them when it has moved.
- claude-3.5-sonnet must not look like a negative, and does not: the response AUROC of gpt-4o over claude is {unseen_auroc:.3f} (below 0.5,
  claude scores higher), that of claude over qwen2.5-0.5b {over_weak:.3f}. Claude is new to the heads as an answer only: its answers
  to other prompts were references in training, and its own reference is gpt-4o's answer, so rows without `reference` are the harder test.
- One data set, one encoder, one seed; layers, features and epochs were chosen while looking at these prompts, so expect a little
  less elsewhere.

## Length

Answers to the same prompt differ in length; length alone has a response AUROC of {best["figures"][MAIN]["length_auroc"]:.3f}.
Within each fifth of the lengths of both models' answers:

{strata_table(best)}

{strata_text(best)}

A short answer has one or two sentences, often a list or a single word that anybody would write, so it carries little evidence; the
head cannot know more than the text says. Trust the anchor least where answers are short.

## Calibration

{cost_table(result)}

ECE: expected calibration error of sentences, both classes weighing the same, gpt-4o against qwen2.5-0.5b and 1.5b. A temperature
above 1 says that the heads were surer than right on prompts that they had not seen; the library divides their logits by it. *After*
judges each fold at the temperature fitted to the other folds. Seconds: from cached encodings to fitted heads, all
{result["folds"]} of them, on {place}, which other work
shared, so wall seconds are an upper bound (aim: under 300).

![Reliability before and after the temperature](../images/discriminators-reliability.svg)

![Scores of five models' answers](../images/discriminators-scores.svg)

Scores are mean log-odds of a response after the temperature, each by the head that left the prompt out.
"""


def drawing(body: list[str], label: str) -> str:
    """An SVG of the common size."""
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{label}">'
    return "\n".join([head, f"<style>{STYLE}</style>", f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>', *body, "</svg>"]) + "\n"


def reliability(row: dict[str, Any]) -> str:
    """Share of experts against probability, before and after; the area of a dot is the weight of its bin."""
    body = []
    for number, when in enumerate(("before", "after")):
        left, bottom = 90 + 460 * number, TOP + SIDE
        (others, other_sums), (experts, expert_sums) = row["calibration"][when]["sums"]
        body.append(
            f'<text x="{left}" y="{TOP - 24}" class="title">{when} the temperature: ECE {row["calibration"][when]["ece"]:.3f}</text>'
        )
        body.append(f'<rect x="{left}" y="{TOP}" width="{SIDE}" height="{SIDE}" class="axis"/>')
        body.append(f'<line x1="{left}" y1="{bottom}" x2="{left + SIDE}" y2="{TOP}" class="even"/>')
        for tick in (0.0, 0.5, 1.0):
            body.append(f'<text x="{left + tick * SIDE}" y="{bottom + 18}" class="label middle">{tick:g}</text>')
            body.append(f'<text x="{left - 8}" y="{bottom - tick * SIDE + 4}" class="label end">{tick:g}</text>')
        body.append(f'<text x="{left + SIDE / 2}" y="{bottom + 34}" class="label middle">probability of an expert sentence</text>')
        middle = TOP + SIDE / 2
        turned = f'x="{left - 38}" y="{middle}" transform="rotate(-90 {left - 38} {middle})"'
        body.append(f'<text {turned} class="label middle">share of expert sentences</text>')
        for a, b, sum_a, sum_b in zip(others, experts, other_sums, expert_sums, strict=True):
            if a + b:
                x, y = left + SIDE * (sum_a + sum_b) / (a + b), bottom - SIDE * b / (a + b)
                body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3 + 18 * (a + b) ** 0.5:.1f}" class="dot"/>')
    return drawing(body, "reliability of the probabilities")


def histograms(row: dict[str, Any]) -> str:
    """Scores of each model's answers, one under the other."""
    left, right, step = 170, 930, (HEIGHT - 80) / len(row["histograms"])
    body = ['<text x="20" y="24" class="title">mean log-odds of a response (trained on: gpt-4o, qwen2.5-0.5b and 1.5b)</text>']
    shown = [name for name in ("gpt-4o", "claude-3.5-sonnet", "qwen2.5-7b", "qwen2.5-1.5b", MAIN) if name in row["histograms"]]
    for number, model in enumerate(shown):
        counts, base = row["histograms"][model], 40 + step * (number + 1)
        width = (right - left) / len(counts)
        colour = "#718096" if model.startswith("qwen") else "#2b6cb0"
        body.append(f'<text x="{left - 10}" y="{base - 4:.1f}" class="label end">{model}</text>')
        for i, count in enumerate(counts):
            height = (step - 12) * count / max(counts)
            body.append(
                f'<rect x="{left + i * width:.1f}" y="{base - height:.1f}" width="{width - 1:.1f}" height="{height:.1f}" fill="{colour}"/>'
            )
        body.append(f'<line x1="{left}" y1="{base:.1f}" x2="{right}" y2="{base:.1f}" class="axis"/>')
    for tick in (-6, -4, -2, 0, 2, 4, 6):
        label = f"{'≤ ' if tick == -6 else '≥ ' if tick == 6 else ''}{tick}"
        body.append(f'<text x="{left + (tick + 6) / 12 * (right - left):.1f}" y="{HEIGHT - 18}" class="label middle">{label}</text>')
    return drawing(body, "scores of five models")


def write(root: Path, result: dict[str, Any]) -> None:
    """Keep the result, its page and its pictures."""
    best = result["rows"][-1]
    texts = {
        KEPT: json.dumps(result, indent=2) + "\n",
        PAGE: page(result),
        f"{IMAGES}/discriminators-reliability.svg": reliability(best),
        f"{IMAGES}/discriminators-scores.svg": histograms(best),
    }
    for name, text in texts.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(ROOT, json.loads((ROOT / KEPT).read_text(encoding="utf-8")))
