import itertools
import math

import numpy as np
import pytest

from realjax.rl.estimates import mean_and_error, pass_at_k, win_rates


def passed(*counts, size):
    """A row for each count of completions that passed."""
    return np.arange(size) < np.array(counts)[:, None]


def test_pass_at_k_is_the_papers_formula():
    size = 7
    for k in range(1, size + 1):
        found = pass_at_k(passed(*range(size + 1), size=size), k)
        wanted = [
            1 - math.comb(size - c, k) / math.comb(size, k) for c in range(size + 1)
        ]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-15)


def test_pass_at_k_is_the_share_of_subsets_with_a_completion_that_passed():
    rows = passed(2, size=5)
    subsets = list(itertools.combinations(rows[0], 3))
    # Of ten subsets one has neither of the two.
    assert pass_at_k(rows, 3) == pytest.approx([np.mean([any(s) for s in subsets])])
    assert pass_at_k(rows, 3) == pytest.approx([0.9])


def test_pass_at_one_is_the_mean_and_order_does_not_matter():
    rows = np.random.default_rng(0).random((20, 6)) < 0.3
    np.testing.assert_allclose(pass_at_k(rows, 1), rows.mean(axis=1))
    shuffled = rows[:, ::-1]
    np.testing.assert_array_equal(pass_at_k(rows, 4), pass_at_k(shuffled, 4))


def test_pass_at_k_has_no_bias():
    """Of many draws with chance p, the mean is 1 - (1 - p)^k."""
    p, k, rng = 0.2, 3, np.random.default_rng(1)
    found = pass_at_k(rng.random((200_000, 5)) < p, k)
    mean, error = mean_and_error(found)
    assert abs(mean - (1 - (1 - p) ** k)) < 4 * error


def test_pass_at_k_of_many_completions_does_not_overflow():
    found = pass_at_k(passed(1, 5000, size=10_000), 100)
    assert found[0] == pytest.approx(0.01) and found[1] == pytest.approx(1.0)


@pytest.mark.parametrize("k", (0, 4))
def test_a_k_that_is_none_is_refused(k):
    with pytest.raises(ValueError, match=rf"pass@{k} of 3 completions"):
        pass_at_k(passed(1, size=3), k)


def test_a_tie_is_half_a_win():
    scores, against = np.array([[1.0], [2.0], [3.0]]), np.array([[2.0], [2.0], [2.0]])
    np.testing.assert_array_equal(win_rates(scores, against), [0.0, 0.5, 1.0])


def test_every_completion_meets_every_other_one():
    # 1 and 3 against 2 and 3: lost, lost, won, tied.
    found = win_rates(np.array([[1.0, 3.0]]), np.array([[2.0, 3.0]]))
    assert found == pytest.approx([(0 + 0 + 1 + 0.5) / 4])


def test_win_rates_of_both_sides_add_to_one():
    rng = np.random.default_rng(2)
    scores, against = rng.integers(0, 3, (2, 9, 4)).astype(float)
    both = win_rates(scores, against) + win_rates(against, scores)
    np.testing.assert_allclose(both, 1.0)
    np.testing.assert_allclose(win_rates(scores, scores), 0.5)


def test_the_standard_error_of_a_mean():
    # Deviations -1, 0, 1: variance 1 over n - 1 = 2, and sqrt(1 / 3).
    assert mean_and_error(np.array([1.0, 2.0, 3.0])) == pytest.approx((2.0, 3**-0.5))
    assert mean_and_error(np.array([5.0])) == (5.0, 0.0)
