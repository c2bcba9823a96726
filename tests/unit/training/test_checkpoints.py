"""Checkpoints are pickles, so those that another user may have written are not loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tunery.errors import TuneryError
from tunery.training.checkpoints import last_checkpoint, mark_complete, write_history


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-4"
    (folder / "global_step4").mkdir(parents=True)
    states = folder / "global_step4" / "states.pt"
    states.write_bytes(b"states")
    states.chmod(0o666)
    (folder / "global_step4").chmod(0o777)
    write_history(folder, [{"step": 4.0, "loss": 1.0}])
    mark_complete(tmp_path, 4, "one")
    return folder


def test_other_users_cannot_write_to_a_complete_checkpoint(checkpoint: Path) -> None:
    assert last_checkpoint(checkpoint.parent, "one") == checkpoint
    assert not [path for path in (checkpoint, *checkpoint.rglob("*")) if path.stat().st_mode & 0o022]


@pytest.mark.parametrize("name", ["global_step4/states.pt", "global_step4", "whole"])
def test_checkpoint_that_others_can_write_to_is_not_loaded(checkpoint: Path, name: str) -> None:
    (checkpoint / name).chmod(0o777)
    with pytest.raises(TuneryError, match="another user may have written") as refused:
        last_checkpoint(checkpoint.parent, "one")
    assert Path(name).name in refused.value.message
    assert "mode 777" in refused.value.cause
    assert "chmod -R go-w" in refused.value.remedy


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
def test_checkpoint_of_another_user_is_not_loaded(checkpoint: Path) -> None:
    os.chown(checkpoint / "global_step4" / "states.pt", 12345, 12345)
    with pytest.raises(TuneryError, match=r"states\.pt") as refused:
        last_checkpoint(checkpoint.parent, "one")
    assert "belongs to user 12345, this process is user 0" in refused.value.cause
