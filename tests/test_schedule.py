"""Learning rates over a run."""

import pytest

from sppnet_jax.training.schedule import Schedule


def rate(schedule, step, errors=()):
    return schedule.rate(
        step, steps_per_epoch=10, total_steps=100, validation_errors=errors
    )


def test_drops_at_given_epochs():
    schedule = Schedule(0.01, "epochs", drop_epochs=(3.0, 5.0))
    rates = [rate(schedule, 10 * epoch) for epoch in range(7)]
    expected = [0.01, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4]
    assert rates == pytest.approx(expected)


def test_the_paper_divides_by_10_twice_when_the_error_plateaus():
    schedule = Schedule(0.01, "plateau", plateau_epochs=2)
    falling = [0.9, 0.8, 0.7]
    assert rate(schedule, 30, falling) == 0.01
    assert rate(schedule, 40, [*falling, 0.7]) == 0.01
    assert rate(schedule, 50, [*falling, 0.7, 0.7]) == pytest.approx(1e-3)
    assert rate(schedule, 60, [*falling, 0.7, 0.7, 0.6, 0.6]) == pytest.approx(1e-3)
    assert rate(schedule, 90, falling + [0.7] * 20) == pytest.approx(1e-4)


def test_improvements_below_the_threshold_do_not_count():
    schedule = Schedule(kind="plateau", plateau_epochs=3, plateau_improvement=0.01)
    assert schedule.plateaus([0.5, 0.499, 0.498, 0.497]) == 1
    assert schedule.plateaus([0.5, 0.48, 0.46, 0.44]) == 0


def test_cosine_falls_from_the_full_rate_to_zero():
    schedule = Schedule(0.01, "cosine")
    assert rate(schedule, 0) == 0.01
    assert rate(schedule, 50) == pytest.approx(0.005)
    assert rate(schedule, 100) == pytest.approx(0)


@pytest.mark.parametrize("kind", ["epochs", "plateau", "cosine", "constant"])
def test_warmup_rises_linearly_to_the_full_rate(kind):
    schedule = Schedule(0.01, kind, warmup_epochs=2)
    rises = [rate(schedule, step + 1) - rate(schedule, step) for step in range(20)]
    assert rises == pytest.approx([0.01 / 21] * 20)
    assert rate(schedule, 20) == pytest.approx(0.01)
