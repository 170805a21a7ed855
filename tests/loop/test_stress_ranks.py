"""The stress test on two ranks, copies (DDP) or shards (fully_shard): the same answers and gradients as one process on the whole batch."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

KIT = Path(__file__).with_name("stress_kit.py")
JOBS = {
    f"{strategy} {name}": {"strategy": strategy, **options}
    for strategy in ("ddp", "fully_shard")
    for name, options in {"all": {}, "upper": {"layer": 1, "reduce_always": True}, "noise": {"direction": "gaussian"}}.items()
}
JOBS |= {"fully_shard gathered": {"strategy": "fully_shard", "layer": 1, "stay_gathered": True}}
MIXED = {"fully_shard mixed": {"strategy": "fully_shard", "mixed": True}}


@pytest.fixture(scope="module")
def kit():
    source = importlib.util.spec_from_file_location("stress_kit", KIT)
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """``two_ranks[job]``: what each rank saw."""
    folder = tmp_path_factory.mktemp("stress")
    (folder / "jobs.json").write_text(json.dumps(JOBS | MIXED))
    done = run_ranks(KIT, folder / "jobs.json", folder, timeout=120)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return {name: [torch.load(folder / f"{name}.rank{rank}", weights_only=True) for rank in (0, 1)] for name in JOBS | MIXED}


@pytest.mark.parametrize("name", JOBS)
def test_ranks_answer_as_one_process_on_the_whole_batch(two_ranks, kit, name):
    alone = kit.run(JOBS[name] | {"strategy": "none"}, 0, 1)
    zero, one = two_ranks[name]
    for i in (0, 1):
        assert zero["seen"][i].keys() == alone["seen"][i].keys()
        for key, value in alone["seen"][i].items():
            torch.testing.assert_close(zero["seen"][i][key], value, rtol=1e-4, atol=1e-6)
            assert torch.equal(zero["seen"][i][key], one["seen"][i][key])
        together = torch.cat((zero["margins"][i], one["margins"][i]))
        torch.testing.assert_close(together, alone["margins"][i], rtol=1e-4, atol=1e-5)
        clean = kit.margins(kit.make_model(), next(iter(kit.micro_steps(0, 1))))
        assert (together - clean).abs().max() > 1e-2
    torch.testing.assert_close(zero["gradient"], alone["gradient"], rtol=1e-3, atol=1e-5)
    assert zero["metrics"] == pytest.approx(alone["metrics"], rel=1e-3)
    assert zero["metrics"] == one["metrics"]


@pytest.mark.parametrize("name", JOBS | MIXED)
def test_nothing_is_left_of_it(two_ranks, name):
    """The gradients are those of a fresh model that is told the answers; the weights come back, after errors too."""
    for rank in two_ranks[name]:
        assert rank["intact"]
        assert rank["after errors"] == [True, True]
        assert any(value.any() for value in rank["gradient"].values())
        torch.testing.assert_close(rank["gradient"], rank["undisturbed"], rtol=0, atol=0)
