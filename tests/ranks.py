"""Runs a file on several ranks: ``run_ranks`` starts them, and as a script this is what each of them runs."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_ranks(file: str | Path, *arguments: str | Path, ranks: int = 2, timeout: float = 300, **environment: str):
    """Run ``file`` as ``__main__`` in processes of its own, with these variables beside the environment's; the ``CompletedProcess``.

    A rank that failed makes the exit code other than 0; ranks that wait for each other raise ``subprocess.TimeoutExpired``.
    """
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, *launcher, __file__, str(file), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | own | environment, capture_output=True, text=True, timeout=timeout, check=False)


if __name__ == "__main__":
    sys.argv.pop(0)
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    # Past the interpreter's end: gloo's threads may free tensors later than that, which aborts the process (pytorch/pytorch#190489).
    os._exit(0)
