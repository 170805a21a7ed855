"""``--score-thinking`` and ``--thinking-tags``: what of a response a command judges."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aapa_lightning.thinking import Thinking


def add_thinking_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--score-thinking", action="store_true", help="judge the thinking before an answer too, as score_thinking does")
    parser.add_argument("--thinking-tags", nargs=2, metavar=("OPEN", "CLOSE"), help="tags around thinking (default: <think> and </think>)")


def parse_thinking(args: argparse.Namespace) -> Thinking:
    """The rule that the options ask for. Raises ConfigError for tags that are empty or the same."""
    from aapa_lightning.thinking import Thinking

    return Thinking(args.score_thinking, *(args.thinking_tags or ()))
