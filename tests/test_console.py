"""What is printed: texts from outside are inert and short, and streams that cannot be written end no run."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from aapa_lightning.cli import main
from aapa_lightning.console import guarded, printable, say
from aapa_lightning.errors import LONGEST_MESSAGE, AapaError, ConfigError

ROOT = Path(__file__).parents[1]


def test_what_a_terminal_would_obey_is_spelled_out():
    assert printable("a\x1b[31mb\x07\r\x9b\u202ec\x7f") == r"a\x1b[31mb\x07\r\x9b\u202ec\x7f"
    assert printable("\ud83d") == r"\ud83d"
    kept = "plain\ttext\nwith é, 漢字 and 👩‍👩‍👧"
    assert printable(kept) == kept


def test_a_message_loses_its_middle_and_keeps_its_advice():
    error = ConfigError("where: found '" + "x" * 10_000_000 + "'; do this instead")
    assert len(str(error)) < LONGEST_MESSAGE + 100
    assert str(error).startswith("where: found 'xxx")
    assert str(error).endswith("x'; do this instead")
    assert "characters left out" in str(error)


@pytest.mark.parametrize("words", [["no\x1b[31mcommand"], ["recipe", "no\x1b]0;title\x07.yaml"], ["data", "check", "no\x1b[2J.jsonl"]])
def test_no_message_repeats_an_escape_code(words, capfd):
    assert main(words) == 2
    output = "".join(capfd.readouterr())
    assert "\x1b" not in output
    assert r"\x1b" in output


def test_warnings_and_log_lines_are_escaped(capsys):
    with guarded(output_matters=True):
        warnings.warn("a\x1b[31mb", stacklevel=1)
        handler = logging.StreamHandler(sys.stderr)
        logging.getLogger("aapa_lightning.test").addHandler(handler)
        logging.getLogger("aapa_lightning.test").warning("%s", "c\x1b[31md")
        logging.getLogger("aapa_lightning.test").removeHandler(handler)
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert r"c\x1b[31md" in error


class Broken:
    """A stream on a full disk."""

    encoding = "utf-8"

    def __init__(self, error: OSError) -> None:
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), OSError(5, "Input/output error"), BrokenPipeError(32, "Broken pipe")]
)
def test_a_stream_that_cannot_be_written_ends_no_work(error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Broken(error))
    with guarded(output_matters=False):
        say("working")
        print("a progress bar", flush=True)
    assert f"standard output cannot be written ({error.strerror})" in capsys.readouterr().err


def run(script: str) -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} -m aapa_lightning.cli"
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"}
    return subprocess.run(["bash", "-c", script.replace("AAPA", command)], capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("AAPA --version >&-", 0, ""),
        ("AAPA --version >&- 2>&-", 0, ""),
        ("AAPA --version >/dev/full", 1, "aapa: error: cannot write to standard output: No space left on device\n"),
        (
            "PYTHONIOENCODING=ascii LC_ALL=C AAPA recipe é.yaml",
            2,
            "aapa: error: recipe: cannot read \\xe9.yaml: No such file or directory\n",
        ),
    ],
)
def test_a_closed_full_or_ascii_stream(script, code, said):
    done = run(script)
    assert (done.returncode, done.stderr) == (code, said)


def test_nothing_prints_but_the_console():
    allowed = {"console.py", "progress.py"}
    for path in (ROOT / "aapa_lightning").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"]
        assert not calls or path.name in allowed, path


def test_an_error_without_a_message():
    assert str(AapaError()) == ""
