"""Checkpoints in a folder: rows of several ranks, links that are replaced in one step, nothing unpickled."""

from collections import defaultdict, namedtuple

import pytest
import torch
from torch import nn

from aapa_lightning.checkpoint_io import AtomicCheckpointIO
from aapa_lightning.errors import ConfigError
from aapa_lightning.sharding.files import (
    SavedTensor,
    in_memory,
    is_checkpoint_folder,
    map_tensors,
    publish,
    read_checkpoint,
    read_step,
    remove,
    write_folder,
)

WEIGHT = torch.arange(10.0).view(5, 2)


@pytest.fixture
def folder(tmp_path):
    """What two ranks wrote: a tied weight of five rows, and one of a single row that rank 1 has nothing of."""
    path = tmp_path / ".last.ckpt.11111111"
    path.mkdir()
    note = {"__shards__": 0}
    torch.save({"state_dict": {"a": note, "b": note, "c": [{"__shards__": 1}, torch.ones(2)]}, "global_step": 7}, path / "checkpoint.pt")
    for rank, (first, last) in enumerate(((0, 3), (3, 5))):
        row = {"shape": [1], "first": min(rank, 1), "rows": torch.ones(1)[rank:]}
        torch.save([{"shape": [5, 2], "first": first, "rows": WEIGHT[first:last].clone()}, row], path / f"rank{rank}.pt")
    return path


def test_any_rows_can_be_read(folder):
    saved = read_checkpoint(folder)["state_dict"]["a"]
    for first in range(6):
        for last in range(first, 6):
            assert torch.equal(saved.rows(first, last), WEIGHT[first:last])
    assert saved.rows(2, 2).shape == (0, 2)


def test_a_checkpoint_in_memory_is_an_ordinary_one(folder):
    found = in_memory(read_checkpoint(folder))
    assert torch.equal(found["state_dict"]["a"], WEIGHT)
    assert found["state_dict"]["a"] is found["state_dict"]["b"]
    assert torch.equal(found["state_dict"]["c"][0], torch.ones(1))
    again = AtomicCheckpointIO().load_checkpoint(folder)
    assert torch.equal(again["state_dict"]["a"], WEIGHT)
    assert read_step(folder) == again["global_step"] == 7


def test_the_step_of_lightnings_own_folder(tmp_path):
    torch.save({"global_step": 4}, tmp_path / "meta.pt")
    assert read_step(tmp_path) == 4


def test_a_damaged_folder_is_named(folder):
    (folder / "rank1.pt").rename(folder / "aside")
    with pytest.raises(ConfigError, match=r"expected 5 rows of a tensor in its rank files; some are missing"):
        read_checkpoint(folder)
    torch.save([nn.Linear(1, 1)], folder / "rank1.pt")
    with pytest.raises(ConfigError, match=r"rank1.pt is not a checkpoint of tensors and primitives"):
        read_checkpoint(folder)
    (folder / "checkpoint.pt").unlink()
    assert not is_checkpoint_folder(folder)
    with pytest.raises(ConfigError, match=r"found no checkpoint.pt in it"):
        read_checkpoint(folder)
    with pytest.raises(ConfigError, match="no checkpoint at"):
        read_checkpoint(folder / "nowhere")


@pytest.mark.parametrize("before", ["nothing", "file", "folder"])
def test_a_folder_takes_the_place_of_what_was_there(folder, before):
    path = folder.with_name("last.ckpt")
    if before == "file":
        path.write_bytes(b"of another strategy")
    elif before == "folder":
        (path / "inside").mkdir(parents=True)
    publish(folder, path)
    assert path.is_symlink()
    assert read_checkpoint(path)["global_step"] == 7


def test_old_and_unfinished_folders_go_with_the_next(folder):
    path, new = folder.with_name("last.ckpt"), folder.with_name(".last.ckpt.22222222")
    publish(folder, path)
    for name in (".last.ckpt.cccccccc", ".last.ckpt.22222222", ".step=1.ckpt.kept", ".last.ckpt.old.11111111"):
        folder.with_name(name).mkdir()
    folder.with_name(".last.ckpt.cccccccc.link").symlink_to(".last.ckpt.cccccccc")
    torch.save({"global_step": 8}, new / "checkpoint.pt")
    publish(new, path)
    others = [".last.ckpt.old.11111111", ".step=1.ckpt.kept"]
    assert sorted(entry.name for entry in path.parent.iterdir()) == [".last.ckpt.22222222", *others, "last.ckpt"]
    assert read_step(path) == 8
    AtomicCheckpointIO().remove_checkpoint(path)
    assert sorted(entry.name for entry in path.parent.iterdir()) == others
    remove(path)


def test_what_a_rank_writes_is_what_it_held(tmp_path):
    """Sharded over a single rank: DTensors, tied ones once, plain tensors, numbers."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        shards = distribute_tensor(WEIGHT, mesh, [Shard(0)])
        tree = {"state_dict": {"a": shards, "b": shards, "c": torch.ones(3)}, "counts": (1, [2.0, "three"])}
        write_folder(tree, tmp_path / "one", 0, lambda: None)
        with pytest.raises(ConfigError, match="sharded by rows"):
            write_folder({"a": distribute_tensor(WEIGHT, mesh, [Shard(1)])}, tmp_path / "two", 0, lambda: None)
        with pytest.raises(ConfigError, match="sharded by rows"):
            write_folder({"a": distribute_tensor(WEIGHT, mesh, [Replicate()])}, tmp_path / "two", 0, lambda: None)
    finally:
        torch.distributed.destroy_process_group()
    assert len(torch.load(tmp_path / "one" / "rank0.pt", weights_only=True)) == 1
    found = in_memory(read_checkpoint(tmp_path / "one"))
    assert found["counts"] == (1, [2.0, "three"])
    torch.testing.assert_close(found["state_dict"], {"a": WEIGHT, "b": WEIGHT, "c": torch.ones(3)}, rtol=0, atol=0)


def test_tensors_of_a_tree_are_mapped_and_all_else_is_kept():
    saved = SavedTensor((1,), [(0, torch.ones(1))])
    found = map_tensors({"a": [torch.zeros(1), 2, None], "b": (saved,)}, lambda value: type(value).__name__)
    assert found == {"a": ["Tensor", 2, None], "b": ("SavedTensor",)}


def test_trees_of_other_kinds_are_copied_too():
    pair = namedtuple("pair", ["first", "second"])
    tree = {"a": pair(torch.zeros(1), 2), "b": defaultdict(list, c=torch.ones(1))}
    assert map_tensors(tree, lambda value: 5) == {"a": pair(5, 2), "b": {"c": 5}}
