"""Work spread over devices: the order of the items, what fails, and that no process outlives the one that started it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from aapa_lightning.commands.devices import on_devices, pick_devices
from aapa_lightning.errors import ConfigError, DataError

ROOT = Path(__file__).parents[1]


def work(folder, device):
    """Tells of itself in ``folder``, then doubles numbers; the larger the slower."""
    (folder / f"{os.getpid()}.{device}").touch()
    if device == "broken":
        raise ConfigError("broken: expected another device")

    def double(number):
        time.sleep(0.02 * number)
        if number == 13:
            raise DataError("data.jsonl:13: expected another number")
        if number == 66:
            os._exit(1)
        if number == 99:
            time.sleep(600)
        return 2 * number, os.getpid()

    return double


def test_one_device_needs_no_other_process(tmp_path):
    with on_devices(partial(work, tmp_path), ["cpu"]) as spread:
        assert list(spread(iter([3, 0]))) == [(6, os.getpid()), (0, os.getpid())]


def test_several_give_results_in_order(tmp_path):
    read = []

    def numbers():
        for number in [9, *range(12)]:
            read.append(number)
            yield number

    with on_devices(partial(work, tmp_path), ["a", "b"]) as spread:
        results = spread(numbers())
        first = next(results)
        assert len(read) <= 5  # not all of a long file at once
        found = [first, *results]
    assert [value for value, _ in found] == [18, *range(0, 24, 2)]
    told = dict(name.name.split(".") for name in tmp_path.iterdir())
    assert sorted(told.values()) == ["a", "b"]
    assert {str(pid) for _, pid in found} == told.keys()
    assert not any(alive(int(pid)) for pid in told)


@pytest.mark.parametrize(
    ("numbers", "devices", "error", "message"),
    [
        ([1, 13, 99, 99], ["a", "b"], DataError, "data.jsonl:13"),
        ([1], ["broken", "broken"], ConfigError, "another device"),
        ([1, 66, 2], ["a", "b"], RuntimeError, "has died; the system may have run out of memory.*--resume"),
    ],
)
def test_a_failure_ends_all_of_it(tmp_path, numbers, devices, error, message):
    began = time.monotonic()
    with pytest.raises(error, match=message), on_devices(partial(work, tmp_path), devices) as spread:
        list(spread(numbers))
    assert time.monotonic() - began < 300  # of the 600 seconds that an item would have taken
    assert not any(alive(int(path.name.split(".")[0])) for path in tmp_path.iterdir())


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes where Linux lists them")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_first(tmp_path, number):
    code = "import sys; sys.path.insert(0, sys.argv[1]); from test_devices import endless\nif __name__ == '__main__': endless(sys.argv[2])"
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    script = tmp_path / "script.py"
    script.write_text(code)
    (tmp_path / "told").mkdir()
    command = [sys.executable, script, Path(__file__).parent, tmp_path / "told"]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(found := list((tmp_path / "told").iterdir())) < 2:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -number
    assert errors.count("Traceback") == (number == signal.SIGINT)  # of the interrupt, which the command line turns into a word
    while any(alive(int(path.name.split(".")[0])) for path in found):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def endless(folder):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    with on_devices(partial(work, Path(folder)), ["a", "b"]) as spread:
        list(spread([99, 99]))


def test_devices_are_picked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_devices("auto", 1) == ["cpu"]
    assert pick_devices("cpu", 2) == ["cpu", "cpu"]
    with pytest.raises(ConfigError, match="finds no GPU; use --device cpu"):
        pick_devices("cuda", 1)
    with pytest.raises(ConfigError, match="expected auto, cpu or cuda:N, found 'tpu9'"):
        pick_devices("tpu9", 1)
    with pytest.raises(ConfigError, match="--devices: expected a whole number above 0, found 0"):
        pick_devices("auto", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_devices("auto", 1) == ["cuda:0"]
    assert pick_devices("cuda:3", 1) == ["cuda:3"]
    assert pick_devices("cuda", 3) == ["cuda:0", "cuda:1", "cuda:2"]
    for name, count in (("cuda:4", 1), ("auto", 5)):
        with pytest.raises(ConfigError, match="this machine has 4 GPUs, cuda:0 to cuda:3"):
            pick_devices(name, count)
    with pytest.raises(ConfigError, match="names one GPU, --devices asks for 2"):
        pick_devices("cuda:1", 2)


COMMAND = "from aapa_lightning.cli import main\nimport sys\nif __name__ == '__main__': sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
def test_commands_write_what_one_process_writes(tmp_path, tiny_model_dir, monkeypatch):
    """``aapa score`` and ``aapa bank build`` on two processes, with a real discriminator."""
    from aapa_lightning.anchor.bank import ExpertBank
    from aapa_lightning.anchor.context import Encoding
    from aapa_lightning.anchor.encoder import FrozenEncoder
    from aapa_lightning.anchor.encoder_head import EncoderHeadDiscriminator
    from aapa_lightning.anchor.head import StackedHead, feature_size
    from aapa_lightning.cli import main
    from aapa_lightning.types import Record

    encoder = FrozenEncoder(str(tiny_model_dir), Encoding(max_length=40))
    head = StackedHead(1, feature_size(("sentence", "reference"), encoder.hidden_size), hidden_units=4, seed=1)
    EncoderHeadDiscriminator(encoder, head, ("sentence", "reference")).save(tmp_path / "disc")
    rows = [{"prompt": f"Prompt {k}", "experts": ["The boats rest. " * (1 + k % 3), "Gulls call."]} for k in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": f"Prompt {k}", "response": "The gulls call. " * (k % 4)} for k in range(7)]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = ["score", "--prompts", "prompts.jsonl", "--responses", "responses.jsonl", "--batch-size", "2", "--out"]
    build = ["bank", "build", "--data", "prompts.jsonl", "--batch-size", "1", "--out"]
    common = ["--discriminator", "disc", "--device", "cpu", "--devices", "2"]
    (tmp_path / "script.py").write_text(COMMAND)
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    for words in ([*score, "two.jsonl"], [*build, "two"]):
        done = subprocess.run(
            [sys.executable, "script.py", *words, *common], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    assert main([*score, "one.jsonl", *common[:4]]) == main([*build, "one", *common[:4]]) == 0
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    one, two = ExpertBank(tmp_path / "one"), ExpertBank(tmp_path / "two")
    assert len(one) == len(two) == 40
    for k in range(40):
        assert torch.equal(one.expert_logits(Record(f"Prompt {k}")), two.expert_logits(Record(f"Prompt {k}")))
