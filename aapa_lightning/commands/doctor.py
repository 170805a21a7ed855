"""``aapa doctor``: what is installed, what the machine has, which kernels run, and a self-test."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aapa_lightning.console import say

PACKAGES = ("aapa-lightning", "torch", "lightning", "transformers", "jsonargparse", "datasets", "torchmetrics", "triton")
#: Optional packages, what each is for, and the extra that brings it.
OPTIONAL = {
    "tensorboard": "a second log: pip install 'aapa-lightning[tensorboard]'",
    "peft": "adapters in the place of weights (LoRA): pip install 'aapa-lightning[peft]'",
    "bitsandbytes": "quantised weights under adapters (QLoRA): pip install 'aapa-lightning[qlora]'",
    "flash-attn-4": "faster attention on Hopper and Blackwell: pip install 'aapa-lightning[flash]'",
    "flash-attn": "faster attention on other GPUs, compiled for hours: pip install flash-attn --no-build-isolation",
    "vllm": "rollouts from vLLM: pip install 'aapa-lightning[vllm]'",
    "ray": "runs on a Ray cluster: pip install 'aapa-lightning[ray]'",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 when the self-test fails."""
    report = examine()
    say(json.dumps(report, indent=2) if args.json else "\n".join(_lines(report)))
    return 0 if all(result == "ok" for result in report["self_test"].values()) else 1


def examine() -> dict[str, Any]:
    """Versions, devices, optional packages, kernels and the self-test's results, as plain values."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "optional": {name: _version(name) or f"not installed; {use}" for name, use in OPTIONAL.items()},
        "devices": _devices(),
        "kernels": _kernels(),
        "self_test": {name: _result(test) for name, test in (("sentence_pool", _test_pool), ("policy_loss", _test_loss))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    found = [f"cpu, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}")
    return found


def _kernels() -> dict[str, str]:
    """Each operator and what runs it on the best device here, and why."""
    import torch

    import aapa_kernels
    from aapa_kernels.dispatch import explain

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folders = sorted(file.parent.name for file in Path(aapa_kernels.__path__[0]).glob("*/fused.py"))
    return {name: explain(device) for name in folders}


def _result(test: Any) -> str:
    try:
        test()
    except Exception as error:  # whatever breaks is the finding
        return f"{type(error).__name__}: {error}"
    return "ok"


def _test_pool() -> None:
    """Means of two sentences, one of them of a single token, against numbers worked out by hand."""
    import torch

    from aapa_kernels import sentence_pool

    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.tensor([[[1.0], [3.0], [5.0]]], device=device)
    pooled = sentence_pool(hidden, torch.tensor([0, 2], device=device), torch.tensor([2, 1], device=device))
    torch.testing.assert_close(pooled.flatten().cpu(), torch.tensor([2.0, 5.0]))


def _test_loss() -> None:
    """The clipped surrogate at ratio 1 is minus the advantage, and its gradient too."""
    import torch

    from aapa_lightning.objectives.surrogate import clipped_surrogate
    from aapa_lightning.types import TokenLossInputs

    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    outputs = clipped_surrogate(TokenLossInputs(logprobs, logprobs.detach(), mask, torch.tensor([[0.5, -0.25]])))
    outputs.losses.sum().backward()
    torch.testing.assert_close(outputs.losses.detach(), torch.tensor([[-0.5, 0.25]]))
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-0.5, 0.25]]))


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [f"python {report['python']} on {report['platform']}"]
    lines += [f"{name} {found or 'not installed'}" for name, found in report["packages"].items()]
    lines += [f"optional: {name} {found}" for name, found in report["optional"].items()]
    lines += [f"device: {device}" for device in report["devices"]]
    lines += [f"kernel: {name}: {how}" for name, how in report["kernels"].items()]
    return lines + [f"self-test: {name}: {result}" for name, result in report["self_test"].items()]
