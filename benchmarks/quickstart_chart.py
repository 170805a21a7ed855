"""The quickstart's figures as a picture: bars are the mean over seeds, dots the seeds. Writes docs/images/quickstart.svg.

Run: python benchmarks/quickstart_chart.py   (after benchmarks/quickstart_seeds.py)
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS = {"sft": "SFT (start)", "grpo": "GRPO", "grpo_kl": "GRPO + KL", "aapa_grpo": "AAPA-GRPO"}
PANELS = {
    "constraint_accuracy": "constraint accuracy (the reward)",
    "well_formedness": "well-formedness (no reward sees it)",
    "true_success": "true success (both, in full)",
}
WIDTH, HEIGHT, PANEL, TOP, BOTTOM = 960, 300, 320, 50, 250


def bar(x: float, values: list[float], label: str, strong: bool) -> str:
    """One row of one panel."""
    mean = statistics.mean(values)
    y = BOTTOM - mean * (BOTTOM - TOP)
    colour = "#2b6cb0" if strong else "#718096"
    parts = [
        f'<rect x="{x}" y="{y:.1f}" width="46" height="{BOTTOM - y:.1f}" fill="{colour}"/>',
        f'<text x="{x + 23}" y="{BOTTOM - 10}" class="value">{mean:.2f}</text>',
        f'<text x="{x + 23}" y="{BOTTOM + 18}" class="label">{label}</text>',
    ]
    dots = (BOTTOM - value * (BOTTOM - TOP) for value in values)
    parts += [f'<circle cx="{x + 10 + 13 * i}" cy="{dot:.1f}" r="3" class="dot"/>' for i, dot in enumerate(dots)]
    return "\n".join(parts)


def chart(seeds: dict[str, dict[str, dict[str, float]]]) -> str:
    """The whole picture as SVG."""
    body = []
    for number, (column, title) in enumerate(PANELS.items()):
        left = number * PANEL + 20
        body.append(f'<text x="{left}" y="24" class="title">{title}</text>')
        body.append(f'<line x1="{left}" y1="{BOTTOM}" x2="{left + 285}" y2="{BOTTOM}" class="axis"/>')
        for i, (row, label) in enumerate(ROWS.items()):
            values = [summary[row][column] for summary in seeds.values()]
            body.append(bar(left + 8 + 71 * i, values, label, row == "aapa_grpo"))
    style = (
        "text{font-family:sans-serif;fill:#4a5568}.title{font-size:14px;font-weight:bold}.value{font-size:14px;text-anchor:middle;fill:#fff;font-weight:bold}"
        ".label{font-size:11px;text-anchor:middle}.axis{stroke:#718096}.dot{fill:#fff;stroke:#1a202c;stroke-width:1.2}"
    )
    drawing = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    background = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    return "\n".join([drawing, f"<style>{style}</style>", background, *body, "</svg>"]) + "\n"


if __name__ == "__main__":
    results = json.loads((ROOT / "benchmarks" / "results" / "quickstart.json").read_text(encoding="utf-8"))
    out = ROOT / "docs" / "images" / "quickstart.svg"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(chart(results["seeds"]), encoding="utf-8")
