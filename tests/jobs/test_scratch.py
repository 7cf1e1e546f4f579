"""Checkpoints on their way to the store: a folder for each process, and none is left of those that were killed."""

from __future__ import annotations

import tempfile

from jobs.training.worker import _scratch


def test_each_worker_has_a_folder_of_its_own_and_those_of_dead_workers_go(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    one = _scratch()
    dead = one.with_name("dead")
    (dead / "checkpoint").mkdir(parents=True)
    dead.with_suffix(".lock").touch()
    (one / "checkpoint").mkdir()
    two = _scratch()
    assert one != two
    assert (one / "checkpoint").exists()  # another run of the same version, at the same time
    assert not list(two.iterdir())
    assert sorted(path.name for path in one.parent.iterdir() if path.is_dir()) == sorted([one.name, two.name])
    assert not dead.with_suffix(".lock").exists()
    assert one.parent.parent.stat().st_mode & 0o077 == 0
