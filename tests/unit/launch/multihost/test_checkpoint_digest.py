"""The digest of a checkpoint tells checkpoints apart without reading weights, wherever they lie."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launch.multihost.checkpoint_digest import digest_checkpoint
from tprt.errors import CheckpointError

HEADER = b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(len(HEADER).to_bytes(8, "little") + HEADER + bytes(8))
    return folder


def test_a_copy_has_the_same_digest(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    assert digest_checkpoint(str(copy)) == digest_checkpoint(str(checkpoint))


def test_another_configuration_header_or_file_name_has_another_digest(checkpoint: Path) -> None:
    found = {digest_checkpoint(str(checkpoint))}
    (checkpoint / "config.json").write_text('{"vocab_size": 3}')
    found.add(digest_checkpoint(str(checkpoint)))
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"F32", b"I32"))
    found.add(digest_checkpoint(str(checkpoint)))
    file.rename(checkpoint / "model-1.safetensors")
    found.add(digest_checkpoint(str(checkpoint)))
    assert len(found) == 4


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: No such file"):
        digest_checkpoint(str(tmp_path))
