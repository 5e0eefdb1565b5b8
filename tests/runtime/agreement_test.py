"""With one process an agreement is a call; several are in tests/processes."""

import pytest

from realjax.runtime.agreement import Agreement


def test_one_process_agrees_with_itself():
    one = Agreement("test")
    assert one.decide(lambda: (1, "a")) == (1, "a")
    assert one.gather(lambda: 2) == [2]
    assert one.together(lambda: 3) == 3


def test_its_error_is_raised_as_it_is():
    error = OSError(28, "No space left")

    def fail():
        raise error

    for settle in (Agreement("test").decide, Agreement("test").together):
        with pytest.raises(OSError) as caught:
            settle(fail)
        assert caught.value is error
