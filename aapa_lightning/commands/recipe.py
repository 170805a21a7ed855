"""``aapa recipe``: run a recipe's stages in order, then print its summary."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from aapa_lightning.console import say
from aapa_lightning.files import write_json, write_text
from aapa_lightning.recipe.plan import load_recipe
from aapa_lightning.recipe.runner import Progress, command_line, run_recipe, select
from aapa_lightning.recipe.summary import Summary, plan_summary, summarise, text_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("recipe", help="YAML file with run_dir and stages")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key: --set stages.sft.settings.trainer.max_steps=10"
    )
    parser.add_argument("--from", dest="start", metavar="STAGE", help="discard this stage and all later ones, and run them again")
    parser.add_argument("--only", metavar="STAGE", help="run this stage alone")
    parser.add_argument("--force", action="store_true", help="discard the selected stages first, also finished ones")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")


def run(args: argparse.Namespace) -> int:
    """Run the recipe; the exit code is that of the first stage that fails."""
    recipe = load_recipe(args.recipe, args.set)
    summary = None if recipe.summary is None else plan_summary(recipe)
    if args.dry_run:
        for stage in select(recipe, args.start, args.only):
            say(shlex.join([*(f"{key}={value}" for key, value in stage.env.items()), *command_line(stage)]))
        return 0
    code = run_recipe(recipe, start=args.start, only=args.only, force=args.force)
    if code == 0 and summary is not None and args.only is None:
        _show(recipe.run_dir, summary)
    return code


def _show(run_dir: str, summary: Summary) -> None:
    seconds = {name: entry["seconds"] for name, entry in Progress(run_dir).stages.items()}
    table = summarise(summary, seconds)
    folder = Path(run_dir)
    write_json(folder / "summary.json", table)
    write_text(folder / "summary.md", text_table(table))
    say(f"\n{text_table(table)}\nwritten to {os.path.join(run_dir, 'summary.json')}")
