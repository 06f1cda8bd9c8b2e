"""The detector row by row: against an independent statement of its statistic in numpy, on planted events, on noise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spikepatch import Refused, SpikeDetector
from spikepatch.spikes.detector import news
from spikepatch.spikes.events import BACK, Event
from spikepatch.spikes.statistic import LARGEST, THRESHOLD, level, noise, print_step, threshold
from tests.spikes.curves import Array, fall, flat, hump, observed, ramp, spike
from tests.spikes.simulate import SERIES, baseline, detected, rate

EPS = 2.0**-52


@pytest.mark.parametrize("n", [8, 9, 16, 33, 64])
def test_level_and_noise_are_what_the_docstring_says(n: int) -> None:
    windows = np.random.default_rng(n).normal(3, 1, (20, n)) + np.linspace(-1, 1, 20)[:, None] * np.arange(n)
    levels, scales = baseline(windows)
    for window, at, scale in zip(windows.tolist(), levels, scales, strict=True):
        # The values reach 2 n, and each result takes a few operations on them.
        assert level(window) == pytest.approx(at, abs=8 * EPS * 2 * n)
        assert noise(window) == pytest.approx(scale, abs=16 * EPS * 2 * n)


@pytest.mark.parametrize("slope", [-3.0, -0.1, 0.1, 3.0])
def test_a_trend_does_not_enter_the_noise(slope: float) -> None:
    values = np.random.default_rng(1).normal(0, 1, 64)
    assert noise((values + slope * np.arange(64)).tolist()) == pytest.approx(noise(values.tolist()), rel=1e-12)


def test_a_level_that_changed_hardly_enters_the_noise() -> None:
    values = np.random.default_rng(1).normal(0, 1, 64)
    assert noise((values + 50 * (np.arange(64) > 40)).tolist()) < 1.3 * noise(values.tolist())


def test_the_print_step() -> None:
    assert [print_step(x) for x in (0.23, 2.5, 3.0, 0.1234)] == [0.01, 0.1, 0.1, 1e-4]
    assert print_step(0.12345) == print_step(1 / 3) == print_step(1.2345e-7) == 0
    assert print_step(float(np.float32(0.23))) == 0.01
    assert print_step(3 + 3 * 0.05) == 0.01


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    at=st.integers(40, 250),
    length=st.integers(1, 20),
    sigma=st.sampled_from([0.01, 0.05, 0.2]),
    kind=st.sampled_from(["loss", "gradient_norm"]),
)
def test_every_planted_spike_above_the_threshold_is_found_at_its_onset(
    seed: int, at: int, length: int, sigma: float, kind: str
) -> None:
    """One that is 1 % above what the longest baseline could ask for is found. The noise that the detector knows is up
    to 16 rows old."""
    curve = flat(300, 3.0, sigma, seed)
    known = [curve[max(0, at - 64 - age) : at - age] for age in range(16)]
    scale = max(*(noise(window.tolist()) for window in known), 2.0**-9 * 3.1)
    spiked = curve.copy()
    spiked[at : at + length] = level(curve[:at].tolist()) + 1.01 * threshold(len(known[-1])) * scale
    values = spiked.tolist() if kind == "loss" else np.exp(spiked).tolist()
    detector = observed(values) if kind == "loss" else observed([None] * 300, values)
    (event,) = [e for e in detector.events if e.onset == at + 1]
    assert (event.kind, event.back is not None, event.over) == (kind, True, 1)
    assert length <= event.duration <= length + BACK


def test_a_spike_in_the_steep_fall_of_early_training() -> None:
    losses = fall(300, tau=60)
    losses[119:122] += 4
    (event,) = observed(losses).events
    assert (event.kind, event.onset, event.duration, event.back) == ("loss", 120, 3, 123)


@pytest.mark.parametrize("seed", range(5))
def test_the_first_rows_are_judged_from_the_ninth_on(seed: int) -> None:
    """What an initialisation does there: five rows up, in the fall."""
    losses = fall(300, seed=seed, tau=60)
    losses[9:14] += 5
    event = observed(losses).events[0]
    assert (event.onset, event.back) == (10, 15)
    before = fall(300, seed=seed, tau=60)
    before[3:6] += 12
    exploded = observed(before).events[0]
    assert (exploded.onset, exploded.baseline) == (4, before[0])


SMOOTH: dict[str, Callable[[Array], Array]] = {
    "exponential": lambda t: 2 + 8 * np.exp(-t / 30),
    "slow exponential": lambda t: 2 + 8 * np.exp(-t / 200),
    "power": lambda t: 2 + 8 * (1 + t) ** -0.5,
    "cosine": lambda t: 6 + 4 * np.cos(np.pi * t / 300),
    "plateau and elbow": lambda t: 3 + np.maximum(4 - 0.05 * np.maximum(t - 60, 0), 0),
}


@pytest.mark.parametrize("curve", SMOOTH)
def test_gaussian_noise_around_a_smooth_fall_raises_no_alarm(curve: str) -> None:
    """100 seeds over the curves, both series."""
    for seed in range(20):
        draw = np.random.default_rng([seed, len(curve)])
        smooth = SMOOTH[curve](np.arange(300.0))
        losses = smooth + draw.normal(0, 0.02 * (1 + seed % 5), 300)
        norms = smooth * np.exp(draw.normal(0, 0.2, 300))
        detector = observed(losses, norms.tolist())
        assert detector.events == ()
        assert len(detector.loss.baseline[0].values) == len(detector.gradient_norm.baseline[0].values) == 64


@given(st.lists(st.floats(0, 100, width=32), min_size=40, max_size=120).map(lambda v: sorted(v, reverse=True)))
@example([10.0 - 0.1 * t for t in range(90)] + [1.0] * 60)
@example([1.0] * 100)
@example([0.0] * 100)
def test_a_series_that_never_rises_is_never_flagged(values: list[float]) -> None:
    assert observed(values, values).events == ()


def test_rounded_noise_raises_no_alarm() -> None:
    """A norm that is printed as 0.23, and a loss rounded to its noise: by whatever rounding."""
    draw = np.random.default_rng(0)
    norms = [max(round(float(x), 2), 0.01) for x in draw.normal(0.23, 0.01, 20_000)]
    assert len(set(norms)) < 12
    assert observed([None] * 20_000, norms).events == ()
    for digits, sigma in ((2, 0.01), (2, 0.004), (1, 0.05)):
        losses = [round(float(x), digits) for x in draw.normal(3, sigma, 5_000)]
        assert observed(losses).events == ()


def test_a_loss_rounded_to_bfloat16_has_ties() -> None:
    """Steps of one unit in the last place, seldom enough for the noise to be 0."""
    draw = np.random.default_rng(0)
    losses = np.asarray(2.5 + (draw.random(2000) < 0.1) * 2.0**-6, dtype=np.float64)  # there bfloat16 counts in 1/64
    assert noise(losses[:64].tolist()) == 0
    assert observed(losses).events == ()
    losses[1000] = 3
    assert [e.onset for e in observed(losses).events] == [1001]


@pytest.mark.parametrize("name", [name for name in SERIES if name != "walk alone"])  # which has no level to be at
def test_series_without_events_have_none_of_several_rows(name: str) -> None:
    """Those that the threshold was fixed by, other draws of them."""
    values = SERIES[name](np.random.default_rng(11), 4_000)
    found = detected(values).events
    assert [e for e in found if e.duration > 1] == []
    assert len(found) <= 4


def test_false_alarms_are_as_rare_as_the_module_says() -> None:
    """Gaussian, single rows: at most 1e-8 for any baseline; 7 is the threshold."""
    assert THRESHOLD == 7
    assert max(rate("gaussian", n, 7.0, windows=20_000) for n in (8, 12, 16, 24, 32, 64)) < 2e-8
    assert rate("gaussian", 64, 6.0) > 2e-8
    assert 2e-5 < rate("laplace", 64, 7.0) < 1.5e-4


@pytest.mark.parametrize("height", [3.0, 11.0])
def test_a_slow_rise_is_seen_while_it_rises(height: float) -> None:
    """Over 800 steps, 0.004 to 0.014 of it a step, in noise of 0.05."""
    losses = flat(1500) + ramp(1500, 500, 800, height)
    first = next(i for i in range(501, 1500) if observed(losses[:i]).events)
    assert first < 500 + 800 / 4
    (event,) = observed(losses).events
    assert event.back is None
    assert event.over > 1
    assert 470 <= event.onset <= 560


def test_a_hump_is_seen() -> None:
    (event,) = observed(flat(1500) + hump(1500, 600, 300, 3.0)).events
    assert 595 <= event.onset <= 620
    assert event.back is not None
    assert 880 <= event.back <= 925


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), cut=st.integers(0, 200), strange=st.floats(0, 0.5))
def test_a_state_read_back_goes_on_with_the_same_bits(seed: int, cut: int, strange: float) -> None:
    draw = np.random.default_rng(seed)
    extremes = np.array([math.nan, math.inf, -math.inf, LARGEST, -LARGEST, 0.0, -1.0, 5e-324, 50.0])
    series = draw.normal(2, 0.1, (200, 2))
    odd = draw.random((200, 2)) < strange
    series[odd] = draw.choice(extremes, odd.sum())
    detector = again = SpikeDetector(threshold=4)
    for step, (loss, norm) in enumerate(series.tolist()):
        if step == cut:
            again = SpikeDetector.from_dict(json.loads(json.dumps(again.to_dict(), allow_nan=False)))
        known = None if draw.random() < 0.1 else norm
        detector, again = detector.observe(step, loss, known), again.observe(step, loss, known)
        assert again == detector
    assert SpikeDetector.from_dict(json.loads(json.dumps(detector.to_dict(), allow_nan=False))) == detector


def test_back_is_at_the_level_and_not_below_a_threshold() -> None:
    """A tail of 3 deviations is below any threshold, and above the level: for as long as it lasts the event does."""
    losses = flat(600)
    losses[200:203] += 3
    losses[203:400] += 0.2
    (event,) = observed(losses).events
    assert event.onset == 201
    assert event.back is not None
    assert 385 <= event.back <= 402


def test_no_cap_on_the_length() -> None:
    """Up by 3 nats in 10 steps, decaying with 60; and a new source of data: back 2,000 steps later."""
    decaying = flat(3000) + spike(3000, 600, 3.0, 60.0, rise=10)
    (event,) = observed(decaying).events
    assert event.back is not None
    assert 750 < event.back < 900
    source = 3 - 0.0005 * np.arange(4000) + flat(4000, 0.0) + 1.0 * (np.arange(4000) >= 1000)
    (event,) = observed(source).events
    assert event.onset == 1001
    assert event.back is not None
    assert 2600 < event.back < 3050


def test_an_event_is_under_way_until_five_rows_are_at_the_level() -> None:
    losses = [*flat(100).tolist(), 5.0, *flat(BACK).tolist()]
    before, after = observed(losses[:-2]), observed(losses)
    assert [e.back for e in before.events] == [None]
    assert before.up == before.under_way != ()
    assert [e.back for e in after.events] == [102]
    assert after.under_way == after.up == ()
    assert [e.back for e in news(before, after)] == [102]
    assert news(after, after) == ()
    opened = observed(losses[:101])
    assert [(e.onset, e.back) for e in news(observed(losses[:100]), opened)] == [(101, None)]
    assert opened.flags == ("loss",)


def test_a_level_that_has_changed_for_good_is_not_back_and_becomes_what_is_judged_by() -> None:
    losses = [*flat(100, 2.0).tolist(), *flat(300, 4.0).tolist()]
    losses[350] = 7.0
    detector = observed(losses)
    first, second = detector.events
    assert (first.onset, first.back, first.duration) == (101, None, 300)
    assert (second.onset, second.duration, second.back) == (351, 1, 352)
    assert second.baseline == pytest.approx(4, abs=0.1)
    assert detector.up == ()
    assert detector.under_way == (first,)


def test_a_rise_that_goes_on_is_one_event() -> None:
    """Though its noise hides for a while that it does."""
    (event,) = observed(flat(2000) + ramp(2000, 400, 1500, 6.0)).events
    assert event.back is None
    assert event.height is not None
    assert event.height > 5.5


def test_peaks_that_come_half_way_back_are_more_events() -> None:
    losses = flat(600) + spike(600, 300, 4.0, 12.0) + 0.5 * (np.arange(600) > 300)
    losses += spike(600, 400, 4.0, 12.0)
    assert [e.onset for e in observed(losses).events] == [301, 401]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, 2 * LARGEST])
@pytest.mark.parametrize("where", ["loss", "gradient_norm"])
def test_rows_that_are_not_finite(broken: float, where: str) -> None:
    for length in (1, 12):
        losses, norms = flat(100).tolist(), flat(100, 1.0).tolist()
        series = losses if where == "loss" else norms
        series[5 : 5 + length] = [broken] * length  # before there is a baseline
        detector = observed(losses, norms)
        (event,) = detector.events
        assert event == Event("nonfinite", 6, 6, duration=length, back=6 + length)
        assert observed(losses[: 5 + length], norms[: 5 + length]).flags == ("nonfinite",)
    (event,) = observed([*flat(100).tolist(), *[broken] * 20]).events
    assert (event.onset, event.duration, event.back) == (101, 20, None)


def test_what_is_not_known_is_neither_judged_nor_back() -> None:
    detector = observed([*flat(100).tolist(), 5.0])
    assert detector.flags == ("loss",)
    for step in range(200, 300):
        detector = detector.observe(step, None)
        assert detector.flags == ()
    assert [e.back for e in detector.events] == [None]
    zero = observed(flat(100), [0.0] * 100)
    assert zero.gradient_norm.baseline == ()
    assert zero.events == ()


def test_observe_changes_nothing() -> None:
    detector = observed(flat(100))
    before = detector.to_dict()
    assert detector.observe(101, 5.0).flags == ("loss",)
    assert detector.to_dict() == before
    assert detector.observe(101, np.float32(5.0)).flags == ("loss",)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan])
def test_a_threshold_that_is_none_is_refused(wrong: float) -> None:
    with pytest.raises(Refused, match="remedy: a positive number"):
        SpikeDetector(threshold=wrong)
