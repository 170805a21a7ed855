"""What was written is what is read: digests of checkpoints, JSON and folders."""

from __future__ import annotations

import hashlib
import io
import json
import random
import zipfile

import pytest
import torch

from aapa_lightning import digests
from aapa_lightning.checkpoint_io import AtomicCheckpointIO
from aapa_lightning.digests import (
    Digesting,
    check_digests,
    check_sealed,
    file_digest,
    read_sealed_json,
    write_digests,
    write_sealed_json,
)
from aapa_lightning.errors import ConfigError
from aapa_lightning.sharding.files import check_checkpoint, is_checkpoint_folder, publish, read_checkpoint, read_step, write_folder

CHECKPOINT = {"state_dict": {"a": torch.arange(50.0), "b": torch.ones(3, dtype=torch.bfloat16)}, "global_step": 7, "names": ["x", "é"]}


def flip(path, place, bit=0):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_the_digest_of_a_file_in_blocks_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "BLOCK", 10)
    content = bytes(range(35))
    path = tmp_path / "file"
    path.write_bytes(content)
    blocks = b"".join(hashlib.sha256(content[i : i + 10]).digest() for i in range(0, 35, 10))
    assert file_digest(path) == hashlib.sha256(blocks).hexdigest()
    assert file_digest(path, 30) == hashlib.sha256(blocks[:96]).hexdigest()
    for pieces in ([35], [1] * 35, [10, 10, 15], [7, 21, 7], [0, 30, 0, 5]):
        buffer, start = io.BytesIO(), 0
        sealed = Digesting(buffer)
        for size in pieces:
            assert sealed.write(content[start : start + size]) == size
            start += size
        sealed.seal()
        assert buffer.getvalue() == content + b"\naapa-sha256 " + file_digest(path).encode() + b"\n"
    for empty in (b"", content[:30]):  # a last block that is full or missing
        buffer = io.BytesIO()
        sealed = Digesting(buffer)
        sealed.write(empty)
        sealed.seal()
        path.write_bytes(buffer.getvalue())
        check_sealed(path, "")


def test_every_bit_of_a_checkpoint_matters(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, path)
    whole = path.read_bytes()
    assert zipfile.ZipFile(path).testzip() is None  # still a zip file, which torch reads by itself
    assert torch.load(str(path), weights_only=True, mmap=True)["names"] == CHECKPOINT["names"]
    found = AtomicCheckpointIO().load_checkpoint(path)
    assert found["names"] == CHECKPOINT["names"]
    torch.testing.assert_close(found["state_dict"], CHECKPOINT["state_dict"], rtol=0, atol=0)
    for place in range(len(whole)):
        flip(path, place, place % 8)
        with pytest.raises(ConfigError, match=r"last.ckpt is .*damaged"):
            check_checkpoint(path)
        path.write_bytes(whole)
    check_checkpoint(path)
    assert read_step(path) == 7


def test_all_readers_of_a_checkpoint_look(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, path)
    place = path.read_bytes().index(CHECKPOINT["state_dict"]["a"].numpy().tobytes()) + 40
    flip(path, place, 6)
    for reader in (AtomicCheckpointIO().load_checkpoint, read_checkpoint):
        with pytest.raises(
            ConfigError, match=r"last.ckpt is damaged: its bytes are not those that were written \(SHA-256\); copy it again"
        ):
            reader(path)
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "step=4.ckpt")
    with pytest.raises(ConfigError, match=r"go on from another one with --ckpt_path: .*step=4.ckpt"):
        read_checkpoint(path)


@pytest.mark.parametrize("cut", [1, 3, 40, 77, 78, 79, 500])
def test_a_checkpoint_that_is_cut_short(tmp_path, cut):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, path)
    path.write_bytes(path.read_bytes()[:-cut])
    if cut == 78:  # all of the digest and nothing else: what torch wrote is whole
        torch.testing.assert_close(read_checkpoint(path)["state_dict"], CHECKPOINT["state_dict"], rtol=0, atol=0)
        return
    with pytest.raises(ConfigError, match="damaged"):
        read_checkpoint(path)


def test_files_of_other_writers_are_checked_by_their_crc(tmp_path):
    path = tmp_path / "lightning.ckpt"
    torch.save(CHECKPOINT, path)
    torch.testing.assert_close(read_checkpoint(path)["state_dict"], CHECKPOINT["state_dict"], rtol=0, atol=0)
    flip(path, path.read_bytes().index(CHECKPOINT["state_dict"]["a"].numpy().tobytes()) + 40)
    with pytest.raises(ConfigError, match=r"lightning.ckpt is damaged.*CRC of lightning/data/0"):
        read_checkpoint(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"is not a checkpoint of tensors and primitives"):
        read_checkpoint(path)


def test_every_file_of_a_folder_matters(tmp_path):
    folder, path = tmp_path / ".last.ckpt.11111111", tmp_path / "last.ckpt"
    write_folder(CHECKPOINT, folder, 0, lambda: None)
    assert is_checkpoint_folder(folder)
    publish(folder, path)
    for name in ("checkpoint.pt", "rank0.pt"):
        whole = (folder / name).read_bytes()
        for place in random.Random(0).sample(range(len(whole)), 60):
            flip(folder / name, place)
            with pytest.raises(ConfigError, match=rf"last.ckpt/{name} is .*damaged"):
                read_checkpoint(path)
            (folder / name).write_bytes(whole)
        flip(folder / name, 100)
        for rank in range(2):  # each at its share of the files
            if (sorted(["checkpoint.pt", "rank0.pt"])[rank]) == name:
                with pytest.raises(ConfigError, match=name):
                    check_checkpoint(path, rank, 2)
            else:
                check_checkpoint(path, rank, 2)
        (folder / name).write_bytes(whole)


def test_a_folder_of_deepspeeds_has_digests_beside_it(tmp_path):
    folder = tmp_path / "last.ckpt"
    (folder / "checkpoint").mkdir(parents=True)
    torch.save({"module": {"a": torch.ones(2)}, "global_step": 3, "dp_world_size": 2}, folder / "checkpoint" / "mp_rank_00_model_states.pt")
    (folder / "checkpoint" / "optim_states.pt").write_bytes(b"pickled")
    (folder / "latest").write_text("checkpoint")
    with pytest.raises(ConfigError, match=r"cannot read .*digests.json"):
        read_checkpoint(folder)
    write_digests(folder, "digests.json")
    assert read_checkpoint(folder)["global_step"] == 3
    for name in ("checkpoint/mp_rank_00_model_states.pt", "checkpoint/optim_states.pt", "latest", "digests.json"):
        whole = (folder / name).read_bytes()
        for place in range(0, len(whole), max(len(whole) // 20, 1)):
            flip(folder / name, place, 3)
            with pytest.raises(ConfigError, match=rf"{name} is damaged"):
                read_checkpoint(folder)
            (folder / name).write_bytes(whole)
    (folder / "latest").unlink()
    with pytest.raises(ConfigError, match="latest is damaged or missing"):
        check_digests(folder, "digests.json", "")


def test_every_bit_of_sealed_json_matters(tmp_path):
    path, value = tmp_path / "bank.json", {"fingerprint": "ab", "rows": 3, "é": [1.5, None, True], "sha": ""}
    write_sealed_json(path, value)
    whole = path.read_bytes()
    assert read_sealed_json(path, "") == value
    assert json.loads(whole)["sha256"] == hashlib.sha256(json.dumps(value, indent=2, ensure_ascii=False).encode()).hexdigest()
    for place in range(len(whole)):
        for bit in (place % 8, 5):
            flip(path, place, bit)
            with pytest.raises(ConfigError, match=r"bank.json is damaged or of an earlier version.*build it again"):
                read_sealed_json(path, "build it again")
            path.write_bytes(whole)
    for other in (b"", b"[]", b"{}", b"nonsense", whole + b" ", whole[:-1]):
        path.write_bytes(other)
        with pytest.raises(ConfigError, match="damaged"):
            read_sealed_json(path, "")
    path.unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        read_sealed_json(path, "")
