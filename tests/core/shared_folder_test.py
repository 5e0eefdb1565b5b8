import threading

import pytest

from realjax.core import shared_folder
from realjax.core.shared_folder import wait_to_see


def test_a_path_may_come_late(tmp_path):
    threading.Timer(0.2, (tmp_path / "late").mkdir).start()
    wait_to_see(tmp_path / "late")
    assert (tmp_path / "late").exists()


def test_a_path_that_does_not_show_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_folder, "SHARED_SECONDS", 0.0)
    with pytest.raises(FileNotFoundError, match=r"Process 0 does not see .*/missing"):
        wait_to_see(tmp_path / "missing")
