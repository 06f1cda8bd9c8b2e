"""The detector against an independent statement of its statistic in numpy, on planted spikes and on noise alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spikepatch import Refused, SpikeDetector
from spikepatch.training.spikes import LARGEST, QUIET, Event, judged, news, noise

Array = npt.NDArray[np.float64]
EPS = 2.0**-52


def observed(losses: Iterable[float | None], norms: Iterable[float | None] | None = None) -> SpikeDetector:
    detector = SpikeDetector()
    losses = list(losses)
    for step, (loss, norm) in enumerate(zip(losses, norms or [None] * len(losses), strict=True), start=1):
        detector = detector.observe(step, loss, norm)
    return detector


def fall(steps: int, sigma: float, seed: int, tau: float = 100.0) -> Array:
    """A loss: an exponential fall from 8 to 2 with Gaussian noise."""
    return 2 + 6 * np.exp(-np.arange(steps) / tau) + np.random.default_rng(seed).normal(0, sigma, steps)


def statistic(windows: Array) -> tuple[Array, Array]:
    """Level and scale (without resolution) of each row, for the value that comes next."""

    def slope_and_newer(x: Array) -> tuple[Array, Array]:
        half, apart = x.shape[1] // 2, x.shape[1] - x.shape[1] // 2
        newer = np.median(x[:, apart:], axis=1)
        return (newer - np.median(x[:, :half], axis=1)) / apart, newer

    n = windows.shape[1]
    residuals = []
    for part in (windows[:, : n // 2], windows[:, n // 2 :]):
        slope, _ = slope_and_newer(part)
        flat = part - slope[:, None] * np.arange(part.shape[1])
        residuals.append(np.abs(flat - np.median(flat, axis=1, keepdims=True)))
    scale = 1.4826 * n / (n - 4) * np.median(np.concatenate(residuals, axis=1), axis=1)
    slope, newer = slope_and_newer(windows)
    return newer + np.maximum(slope, 0) * (n // 2 + 1) / 2, scale


@pytest.mark.parametrize("n", [8, 32, 33, 34, 35, 127, 128])
def test_the_statistic_is_what_the_docstring_says(n: int) -> None:
    windows = np.random.default_rng(n).normal(3, 1, (20, n)) + np.linspace(-1, 1, 20)[:, None] * np.arange(n)
    levels, scales = statistic(windows)
    assert (levels > windows[:, -1]).any()
    assert (levels < windows[:, -1]).any()
    for window, level, scale in zip(windows.tolist(), levels, scales, strict=True):
        x = float(level + 7 * scale)
        found, score = judged(window, x, relative=False)
        # The values reach 2 n, each result takes a few operations on them, and the scale is of order 1.
        assert found == pytest.approx(level, abs=8 * EPS * 2 * n)
        assert noise(window) == pytest.approx(scale, abs=16 * EPS * 2 * n)
        assert score == pytest.approx(7, abs=64 * EPS * 2 * n / scale)
        assert judged(window, float(level) - 1e-6, relative=False)[1] == 0


@pytest.mark.parametrize("n", [32, 128])
@pytest.mark.parametrize("slope", [-3.0, -0.1, 0.0, 0.1, 3.0])
def test_a_trend_hardly_enters_the_scale(slope: float, n: int) -> None:
    """The medians of a steep trend are means of two values, n / 4 apart, with variance 1/2 each: an error of the slope
    of up to 4 / n. Over +- n / 4 that adds up to 1/3 to the variance of residuals: a factor of up to sqrt(4/3)."""
    scales = [noise((np.random.default_rng(s).normal(0, 1, n) + slope * np.arange(n)).tolist()) for s in range(400)]
    error = 4 * np.std(scales) / math.sqrt(len(scales))
    assert 1 - error < np.mean(scales) < math.sqrt(4 / 3) + error


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    at=st.integers(40, 250),
    length=st.integers(1, 20),
    sigma=st.sampled_from([0.01, 0.05, 0.2]),
    tau=st.sampled_from([20.0, 60.0, 300.0]),
    kind=st.sampled_from(["loss", "gradient_norm"]),
)
def test_every_planted_spike_above_the_threshold_is_found_at_its_onset(
    seed: int, at: int, length: int, sigma: float, tau: float, kind: str
) -> None:
    """One that is 1 % above the threshold is found, and one that is 1 % below is not."""
    curve = fall(300, sigma, seed, tau)
    threshold = SpikeDetector().threshold
    level, scale = (float(v[0]) for v in statistic(curve[None, max(0, at - 128) : at]))
    scale = max(scale, 2.0**-9 * (abs(level) if kind == "loss" else 1))
    for factor, found in ((1.01, True), (0.99, False)):
        spiked = curve.copy()
        spiked[at : at + length] = level + factor * threshold * scale
        spiked[at] = np.nextafter(spiked[at], np.inf)  # the first is the peak
        values = spiked.tolist() if kind == "loss" else np.exp(spiked).tolist()
        detector = observed(values) if kind == "loss" else observed([None] * 300, values)
        events = [e for e in detector.events if e.onset == at + 1]
        assert len(events) == found
        assert not [e for e in detector.events if e.onset <= at]
        if found:
            (event,) = events
            assert (event.kind, event.onset, event.outcome) == (kind, at + 1, "recovered")
            assert event.duration >= length
            assert event.value is not None
            assert event.value >= values[at]
            assert event.score == pytest.approx(factor * threshold, rel=0.05 * length)


def test_a_spike_in_the_steep_fall_of_early_training() -> None:
    losses = fall(300, 0.02, 0, tau=60)
    losses[119:122] += 4
    (event,) = observed(losses.tolist()).events
    assert (event.kind, event.onset, event.duration, event.outcome) == ("loss", 120, 3, "recovered")


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
    steps = 300
    for seed in range(20):
        draw = np.random.default_rng([seed, len(curve)])
        smooth = SMOOTH[curve](np.arange(float(steps)))
        losses = smooth + draw.normal(0, 0.02 * (1 + seed % 5), steps)
        norms = smooth * np.exp(draw.normal(0, 0.2, steps))
        detector = observed(losses.tolist(), norms.tolist())
        assert detector.events == ()
        assert len(detector.loss.baseline) == len(detector.gradient_norm.baseline) == 128


@given(st.lists(st.floats(0, 100, width=32), min_size=40, max_size=120).map(lambda v: sorted(v, reverse=True)))
@example([10.0 - 0.1 * t for t in range(90)] + [1.0] * 60)
@example([1.0] * 100)
@example([0.0] * 100)
def test_a_series_that_never_rises_is_never_flagged(values: list[float]) -> None:
    assert observed(values, values).events == ()


def _upper_tail_of_t5(x: Array) -> Array:
    """Abramowitz and Stegun 26.7.3, five degrees of freedom."""
    angle = np.arctan(x / math.sqrt(5))
    sine, cosine = np.sin(angle), np.cos(angle)
    return np.asarray(0.5 - (angle + sine * (cosine + 2 / 3 * cosine**3)) / math.pi)


TAILS: dict[str, tuple[Callable[[np.random.Generator, tuple[int, ...]], Array], Callable[[Array], Array]]] = {
    "gaussian": (lambda draw, shape: draw.normal(size=shape), lambda x: np.vectorize(math.erfc)(x / math.sqrt(2)) / 2),
    "laplace": (lambda draw, shape: draw.laplace(size=shape), lambda x: np.exp(-np.maximum(x, 0)) / 2),
    "t5": (lambda draw, shape: draw.standard_t(5, size=shape), _upper_tail_of_t5),
}


def rate(name: str, n: int, threshold: float, windows: int) -> float:
    """Chance of an alarm per value: baselines are simulated, and the tail beyond each one's threshold is exact."""
    draw, tail = TAILS[name]
    level, scale = statistic(draw(np.random.default_rng([n, windows]), (windows, n)))
    return float(tail(level + threshold * scale).mean())


def poisson_interval(mean: float) -> tuple[int, int]:
    """Counts between the 0.5 % and the 99.5 % quantile."""
    below, low, k, term = 0.0, None, 0, math.exp(-mean)
    while True:
        below += term
        if low is None and below >= 0.005:
            low = k
        if below >= 0.995:
            assert low is not None
            return low, k
        k += 1
        term *= mean / k


@pytest.mark.parametrize("threshold", [5.0, SpikeDetector().threshold])
@pytest.mark.parametrize("name", ["laplace", "t5"])
def test_heavy_tails_raise_as_many_alarms_as_simulated(name: str, threshold: float) -> None:
    steps = 15_000
    draw = TAILS[name][0](np.random.default_rng(7), (2, steps))
    losses, norms = (20 + draw[0]).tolist(), np.exp(0.1 * draw[1]).tolist()
    detector, alarms = SpikeDetector(threshold=threshold), 0
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        detector = detector.observe(step, loss, norm)
        alarms += len(detector.flags)
    low, high = poisson_interval(2 * steps * rate(name, 128, threshold, windows=10_000))
    assert low <= alarms <= high
    if threshold == 5:
        assert low > 20


def test_the_threshold_is_the_least_integer_with_one_false_alarm_in_100000_runs() -> None:
    """Both series, up to a million steps: the values that fill the window, and those of a full one."""
    sizes = [32, 36, 40, 48, 64, 96, 128]
    alarms = {}
    for threshold in (9.0, 10.0):
        rates = [rate("gaussian", n, threshold, windows=20_000) for n in sizes]
        steps = np.arange(32, 128)
        filling = np.exp(np.interp(steps, sizes, np.log(rates))).sum()
        alarms[threshold] = 2 * (filling + 1e6 * rates[-1])
    assert alarms[10.0] < 1e-5 < alarms[9.0]
    assert SpikeDetector().threshold == 10


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), cut=st.integers(0, 200), strange=st.floats(0, 0.5))
def test_a_state_read_back_goes_on_with_the_same_bits(seed: int, cut: int, strange: float) -> None:
    draw = np.random.default_rng(seed)
    extremes = np.array([math.nan, math.inf, -math.inf, LARGEST, -LARGEST, 0.0, -1.0, 5e-324, 50.0])
    series = draw.normal(2, 0.1, (200, 2))
    odd = draw.random((200, 2)) < strange
    series[odd] = draw.choice(extremes, odd.sum())
    detector = again = SpikeDetector(window=24, warmup=8, threshold=5)
    for step, (loss, norm) in enumerate(series.tolist()):
        if step == cut:
            again = SpikeDetector.from_dict(json.loads(json.dumps(again.to_dict(), allow_nan=False)))
        known = None if draw.random() < 0.1 else norm
        detector, again = detector.observe(step, loss, known), again.observe(step, loss, known)
        assert again == detector
    assert SpikeDetector.from_dict(json.loads(json.dumps(detector.to_dict(), allow_nan=False))) == detector


def flat(steps: int, level: float = 2.0, seed: int = 0) -> list[float]:
    return [level + x for x in np.random.default_rng([seed, steps]).normal(0, 0.05, steps).tolist()]


def test_echoes_within_ten_steps_are_one_event() -> None:
    for gap, count in ((QUIET, 1), (QUIET + 1, 2)):
        losses = flat(200)
        losses[100] = losses[100 + gap] = 5.0
        events = observed(losses).events
        assert [e.onset for e in events] == [101, 101 + gap][:count]
        assert events[0].duration == (gap + 1 if count == 1 else 1)
        assert {e.outcome for e in events} == {"recovered"}


def test_an_event_is_ongoing_until_ten_steps_are_quiet() -> None:
    losses = [*flat(100), 5.0, *flat(QUIET)]
    before, after = observed(losses[:-1]), observed(losses)
    assert [e.outcome for e in before.events] == ["ongoing"]
    assert before.closed == ()
    assert [e.outcome for e in after.events] == ["recovered"]
    assert after.under_way == ()
    assert [e.outcome for e in news(before, after)] == ["recovered"]
    assert news(after, after) == ()


def test_a_level_that_has_changed_for_good_diverges_and_becomes_the_level() -> None:
    losses = [*flat(100), *flat(300, level=4.0)]
    losses[350] = 7.0
    detector = observed(losses)
    first, second = detector.events
    assert (first.onset, first.duration, first.outcome) == (101, 129, "diverged")
    assert (second.onset, second.duration, second.outcome) == (351, 1, "recovered")
    assert second.baseline == pytest.approx(4, abs=0.1)
    assert detector.diverged
    assert not observed(losses[:220]).diverged


def test_a_gradient_norm_that_changed_for_good_is_no_divergence() -> None:
    norms = [*np.exp(flat(100)), *np.exp(flat(300, level=4.0))]
    detector = observed([None] * 400, norms)
    (event,) = detector.events
    assert (event.kind, event.outcome) == ("gradient_norm", "diverged")
    assert event.baseline == pytest.approx(math.exp(2), rel=0.1)
    assert not detector.diverged


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, 2 * LARGEST])
@pytest.mark.parametrize("where", ["loss", "gradient_norm"])
def test_steps_that_are_not_finite(broken: float, where: str) -> None:
    for length, outcome in ((1, "recovered"), (QUIET, "recovered"), (QUIET + 1, "diverged")):
        losses, norms = flat(100), flat(100, level=1.0)
        series = losses if where == "loss" else norms
        series[5 : 5 + length] = [broken] * length  # long before there is a baseline
        detector = observed(losses, norms)
        (event,) = detector.events
        assert event == Event("nonfinite", 6, 6, duration=length, outcome=outcome)  # type: ignore[arg-type]
        assert detector.diverged == (outcome == "diverged")
        assert len(detector.loss.baseline) == 100 - (length if where == "loss" else 0)


def test_what_is_not_known_is_neither_judged_nor_quiet() -> None:
    detector = observed([*flat(100), 5.0])
    assert detector.flags == ("loss",)
    for step in range(200, 300):
        detector = detector.observe(step, None)
        assert detector.flags == ()
    assert [e.outcome for e in detector.events] == ["ongoing"]
    zero = observed(flat(100), [0.0] * 100)
    assert zero.gradient_norm.baseline == ()
    assert zero.events == ()


def test_a_loss_rounded_to_bfloat16_has_ties() -> None:
    """Steps of one unit in the last place, seldom enough for MAD to be 0."""
    draw = np.random.default_rng(0)
    losses = 2.5 + (draw.random(2000) < 0.1) * 2.0**-6  # between 2 and 4 bfloat16 counts in 1/64
    assert noise(losses[:128].tolist()) == 0
    assert observed(losses.tolist()).events == ()
    losses[1000] = 3
    assert [e.onset for e in observed(losses.tolist()).events] == [1001]


def test_observe_changes_nothing() -> None:
    detector = observed(flat(100))
    before = detector.to_dict()
    assert detector.observe(101, 5.0).flags == ("loss",)
    assert detector.to_dict() == before
    assert detector.observe(101, np.float32(5.0)).flags == ("loss",)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"warmup": 7}, {"window": 16}, {"threshold": 0}, {"threshold": math.nan}])
def test_settings_without_a_meaning_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(Refused, match="8 <= warmup <= window"):
        SpikeDetector(**wrong)  # type: ignore[arg-type]


def test_many_values_are_sequences_of_any_kind() -> None:
    window: Sequence[float] = tuple(flat(32))
    assert judged(window, 9.0, relative=True) == judged(list(window), 9.0, relative=True)
