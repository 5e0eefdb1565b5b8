import json
import os
import signal
import subprocess
import sys

import pytest

from realjax.runtime.workdir import WorkdirError, claim_workdir

FINGERPRINT = {"algorithm": "ppo", "hp": {"kl_coef": 0.1, "epochs": 1}, "seed": 0}


def test_the_first_claim_writes_what_later_ones_must_equal(tmp_path):
    workdir = tmp_path / "runs" / "a"
    claim_workdir(workdir, FINGERPRINT).close()
    assert json.loads((workdir / "run.json").read_text()) == FINGERPRINT
    with claim_workdir(workdir, FINGERPRINT) as claim:
        assert claim.workdir == workdir


def test_tuples_equal_the_lists_that_json_makes_of_them(tmp_path):
    claim_workdir(tmp_path, {"sizes": (1, 2)}).close()
    claim_workdir(tmp_path, {"sizes": (1, 2)}).close()


def test_another_run_is_refused_with_what_differs(tmp_path):
    claim_workdir(tmp_path, FINGERPRINT).close()
    other = FINGERPRINT | {"hp": {"kl_coef": 0.2, "epochs": 1}, "model": "llama"}
    with pytest.raises(WorkdirError) as caught:
        claim_workdir(tmp_path, other)
    text = str(caught.value)
    assert f"{tmp_path} holds another run" in text
    assert "hp.kl_coef was 0.1 and is 0.2 now" in text
    assert 'model was null and is "llama" now' in text
    assert "epochs" not in text and "another work folder" in text
    # The refusal leaves the folder to the run it belongs to.
    claim_workdir(tmp_path, FINGERPRINT).close()


def test_a_run_that_left_nothing_gives_way_to_another(tmp_path):
    claim_workdir(tmp_path, FINGERPRINT).close()
    other = FINGERPRINT | {"seed": 1}
    claim_workdir(tmp_path, other, has_begun=lambda: False).close()
    assert json.loads((tmp_path / "run.json").read_text()) == other
    with pytest.raises(WorkdirError, match="seed was 1 and is 0 now"):
        claim_workdir(tmp_path, FINGERPRINT, has_begun=lambda: True)


def test_a_live_run_is_not_replaced_though_it_has_saved_nothing(tmp_path):
    with claim_workdir(tmp_path, FINGERPRINT), pytest.raises(WorkdirError, match="use"):
        claim_workdir(tmp_path, {"seed": 1}, has_begun=lambda: False)
    assert json.loads((tmp_path / "run.json").read_text()) == FINGERPRINT


def test_a_folder_that_cannot_be_made_is_named():
    # Nobody can make one there, the superuser included.
    with pytest.raises(WorkdirError, match=r"fdinfo/run cannot be written \("):
        claim_workdir("/proc/self/fdinfo/run", FINGERPRINT)


def test_many_differences_are_counted(tmp_path):
    claim_workdir(tmp_path, {str(i): i for i in range(9)}).close()
    with pytest.raises(WorkdirError, match="and 4 more"):
        claim_workdir(tmp_path, {str(i): -1 - i for i in range(9)})


def test_a_live_claim_keeps_others_out(tmp_path):
    claim = claim_workdir(tmp_path, FINGERPRINT)
    with pytest.raises(WorkdirError, match=rf"in use by process {os.getpid()} on "):
        claim_workdir(tmp_path, FINGERPRINT)
    claim.close()
    claim.close()  # A second time does nothing.
    claim_workdir(tmp_path, FINGERPRINT).close()


def test_a_killed_process_leaves_no_lock(tmp_path):
    program = (
        "import sys, time\n"
        "from realjax.runtime.workdir import claim_workdir\n"
        "claim = claim_workdir(sys.argv[1], {'seed': 0})\n"
        "print('claimed', flush=True)\n"
        "time.sleep(600)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None and owner.stdout.readline() == "claimed\n"
    with pytest.raises(WorkdirError, match=f"in use by process {owner.pid} "):
        claim_workdir(tmp_path, {"seed": 0})
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    claim_workdir(tmp_path, {"seed": 0}).close()


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(NotADirectoryError, match="run is a file"):
        claim_workdir(tmp_path / "run", FINGERPRINT)


def test_a_broken_run_file_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{oops")
    with pytest.raises(WorkdirError, match=r"run\.json is not JSON"):
        claim_workdir(tmp_path, FINGERPRINT)
