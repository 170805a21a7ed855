"""``aapa export``: a checkpoint as a folder that ``AutoModelForCausalLM.from_pretrained`` or, of adapters, peft loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from aapa_lightning.console import say
from aapa_lightning.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint, file or folder, or a run folder (its last checkpoint)")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--tokenizer", help="where the tokenizer lies now, if it has moved since training")
    parser.add_argument("--base", help="where the base model of a run with adapters lies now, if it has moved since training")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--merge", action="store_true", help="write a whole model, adapters merged (the default)")
    kind.add_argument("--adapter", action="store_true", help="write the adapters alone, for peft's PeftModel.from_pretrained")


def run(args: argparse.Namespace) -> int:
    """Export the policy."""
    from aapa_lightning.export import export_policy
    from aapa_lightning.runs import last_checkpoint
    from aapa_lightning.sharding.files import is_checkpoint_folder

    given, out = Path(args.checkpoint), Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} already exists; name a new folder, or remove it")
    run_folder = given.is_dir() and not is_checkpoint_folder(given)
    checkpoint = last_checkpoint(given) if run_folder else given
    export_policy(checkpoint, out, tokenizer=args.tokenizer, base=args.base, adapter=args.adapter)
    say(f"written to {out}")
    return 0
