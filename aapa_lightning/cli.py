"""The ``aapa`` command: finds the command's module, runs it, and turns errors into exit codes.

0 is success, 1 a failure, 2 a mistake in the input (one message, no traceback), 130 an interrupt, 141 a reader that left.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import NamedTuple

from aapa_lightning import console
from aapa_lightning.errors import AapaError


class Command(NamedTuple):
    """A row of the table of commands."""

    module: str
    summary: str
    example: str


COMMANDS = {
    "fit": Command(
        "train", "train a policy or a discriminator", "aapa fit --config configs/recipes/grpo.yaml --config configs/anchor.yaml"
    ),
    "validate": Command("train", "measure a run on its validation split", "aapa validate --config runs/grpo/config.yaml"),
    "test": Command("train", "measure a run on its test split", "aapa test --config runs/grpo/config.yaml"),
    "predict": Command("train", "write a policy's responses to a file", "aapa predict --config runs/sft/config.yaml"),
    "recipe": Command("recipe", "run the stages of a recipe in order", "aapa recipe configs/recipes/quickstart.yaml"),
    "ray": Command(
        "ray",
        "run a trainer command on a Ray cluster",
        "aapa ray --workers 2 fit --config configs/debug/base.yaml --config configs/debug/sft.yaml",
    ),
    "bank": Command(
        "bank", "build a bank of expert responses", "aapa bank build --data train.jsonl --discriminator runs/disc/export --out bank"
    ),
    "data": Command("data", "check data, train a tokenizer, write the synthetic world", "aapa data check train.jsonl"),
    "evaluate": Command(
        "evaluate", "count the instructions that responses follow", "aapa evaluate --prompts ifeval.jsonl --responses responses.jsonl"
    ),
    "score": Command(
        "score",
        "score responses and their sentences with a discriminator",
        "aapa score --discriminator runs/disc/export --prompts prompts.jsonl --responses responses.jsonl --out scores.jsonl",
    ),
    "export": Command("export", "write a checkpoint as a Hugging Face folder", "aapa export runs/grpo --out my-model"),
    "doctor": Command("doctor", "show versions, devices and kernels, and run a self-test", "aapa doctor --json"),
}
TRAINER_COMMANDS = tuple(name for name, command in COMMANDS.items() if command.module == "train")
#: Commands that make files; what they print is said beside the work, which does not end because nobody can read it.
MAKERS = (*TRAINER_COMMANDS, "recipe", "ray", "bank", "score", "export")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; those of the process when left out.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    makes = bool(arguments) and arguments[0] in MAKERS and not {"-h", "--help"} & set(arguments)
    with console.guarded(output_matters=not makes):
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    try:
        code = _finish(arguments)
        console.flush()
        return code
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        console.silence(sys.stdout)
        return 141
    except console.NoOutputError as error:
        console.fail(error)
        return 1


def _finish(arguments: list[str]) -> int:
    """The exit code, however the command ends."""
    try:
        return _dispatch(arguments)
    except SystemExit as end:
        return _exit_code(end)
    except KeyboardInterrupt:
        console.say("aapa: interrupted", error=True)
        return 130
    except (BrokenPipeError, console.NoOutputError):
        raise
    except Exception as error:
        if is_users_error(error):
            console.fail(error)
            return 2
        console.say(traceback.format_exc(), error=True, end="")
        return 1


def _exit_code(end: SystemExit) -> int:
    """Of an exit by argparse, which has printed help or what is wrong, or by Lightning: 1 after Ctrl-C, no code after SIGTERM."""
    exceptions = sys.modules.get("lightning.pytorch.utilities.exceptions")
    if exceptions is not None and isinstance(end, exceptions.SIGTERMException):
        console.say("aapa: terminated", error=True)
        return 143
    if isinstance(end.__context__, KeyboardInterrupt):
        console.say("aapa: interrupted", error=True)
        return 130
    return end.code if isinstance(end.code, int) else int(end.code is not None)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        console.say(_help(), end="")
        return 0 if arguments else 2
    name = arguments[0]
    if name == "--version":
        from importlib.metadata import version

        console.say(version("aapa-lightning"))
        return 0
    if name not in COMMANDS:
        console.fail(f"no command {name!r}; expected one of {', '.join(COMMANDS)}")
        return 2
    command = COMMANDS[name]
    module = importlib.import_module(f"aapa_lightning.commands.{command.module}")
    if name in TRAINER_COMMANDS:
        return int(module.run_trainer(arguments))
    parser = argparse.ArgumentParser(
        prog=f"aapa {name}",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.",
        epilog=f"example:\n  {command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(arguments[1:])))


def is_users_error(error: BaseException) -> bool:
    """Whether the error is a mistake in the input; Lightning's own class counts where Lightning is loaded."""
    exceptions = sys.modules.get("lightning.pytorch.utilities.exceptions")
    return isinstance(error, AapaError) or (exceptions is not None and isinstance(error, exceptions.MisconfigurationException))


def _help() -> str:
    lines = ["usage: aapa COMMAND [options]", "", "Post-train language models, anchored to how an expert writes.", ""]
    for name, command in COMMANDS.items():
        lines += [f"  {name:<10}{command.summary}", f"  {'':<10}  {command.example}"]
    return "\n".join([*lines, "", "aapa COMMAND --help lists a command's options.", ""])


if __name__ == "__main__":
    sys.exit(main())
