import numpy as np
import pytest

from recflow.evaluation.significance import bootstrap_ratios, codes_of, percentile_interval


def test_interval_of_a_mean_agrees_with_the_normal_approximation() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.6, 0.2, size=2000)
    ones = np.ones((2000, 1))
    replicates = bootstrap_ratios(values[:, None], ones, 4000, np.random.default_rng(1))
    low, high = percentile_interval(replicates[:, 0], 0.95) or (np.nan, np.nan)
    error = values.std() / np.sqrt(2000)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_clusters_of_equal_rows_widen_the_interval_by_the_root_of_their_size() -> None:
    rng = np.random.default_rng(2)
    of_users = rng.normal(size=400)
    rows = np.repeat(of_users, 9)
    naive = bootstrap_ratios(rows[:, None], np.ones((3600, 1)), 2000, np.random.default_rng(3))
    whole = bootstrap_ratios(
        9 * of_users[:, None], np.full((400, 1), 9.0), 2000, np.random.default_rng(3)
    )
    assert whole.std() / naive.std() == pytest.approx(3.0, rel=0.08)


def test_pairing_cancels_what_all_scorers_find_hard() -> None:
    rng = np.random.default_rng(4)
    hardness = rng.normal(size=500)
    both = np.stack([hardness, hardness + 0.1 + 0.01 * rng.normal(size=500)], axis=1)
    drawn = bootstrap_ratios(both, np.ones((500, 2)), 1000, np.random.default_rng(5))
    difference = drawn[:, 1] - drawn[:, 0]
    assert difference.std() < 0.02 * drawn[:, 0].std()
    assert difference.mean() == pytest.approx(0.1, abs=0.002)


def test_ratio_weighs_clusters_by_their_denominator() -> None:
    above, below = np.array([[3.0], [1.0]]), np.array([[3.0], [4.0]])
    drawn = bootstrap_ratios(above, below, 500, np.random.default_rng(6))[:, 0]
    # Two draws of two clusters: first twice, one each, second twice.
    assert set(drawn.round(12)) == {1.0, round(4 / 7, 12), 0.25}


def test_same_seed_same_draws_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(7).normal(size=(30, 3))
    ones = np.ones((30, 3))
    whole = bootstrap_ratios(values, ones, 50, np.random.default_rng(8))
    monkeypatch.setattr("recflow.evaluation.significance._CELLS_AT_ONCE", 64)
    again = bootstrap_ratios(values, ones, 50, np.random.default_rng(8))
    np.testing.assert_allclose(whole, again, atol=1e-12)


def test_a_resample_without_a_row_is_left_out() -> None:
    above, below = np.array([[2.0], [0.0]]), np.array([[4.0], [0.0]])
    drawn = bootstrap_ratios(above, below, 200, np.random.default_rng(9))[:, 0]
    assert np.isnan(drawn).any()
    assert percentile_interval(drawn, 0.9) == (0.5, 0.5)
    assert percentile_interval(np.full(5, np.nan), 0.9) is None


def test_codes_number_the_clusters() -> None:
    codes, count = codes_of(["b", "a", "b"])
    assert codes.tolist() == [1, 0, 1]
    assert count == 2
