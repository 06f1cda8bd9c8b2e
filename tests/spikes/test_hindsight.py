"""Whole curves: every kind of event by its synthetic twin, the verdict's words, and where hindsight differs."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from spikepatch.spikes.conclusion import PASSED, Conclusion, conclude, norm_line
from spikepatch.spikes.hindsight import Curve, with_hindsight
from tests.spikes.curves import (
    Array,
    curve_of,
    edge_of_stability,
    events,
    fall,
    flat,
    hump,
    means,
    observed,
    ramp,
    spike,
    thinned,
)
from tests.spikes.simulate import smooth


def concluded(losses: Array | list[float], every: int = 1, **more: int) -> Conclusion:
    curve = curve_of(losses, every)
    return conclude(curve, with_hindsight(curve), **more)


FORMS = {
    "blip": flat(600) + spike(600, 300, 2.0, 0.1),
    "spike": fall(600) + spike(600, 300, 3.0, 8.0, rise=3),
    "long spike": flat(1500) + spike(1500, 600, 3.0, 60.0, rise=10),
    "hump": flat(1500) + hump(1500, 600, 300, 3.0),
    "slow rise": flat(1500) + ramp(1500, 600, 800, 8.0),
    "level shift": flat(900) + 1.0 * ((np.arange(900) >= 400) & (np.arange(900) < 700)),
    "not back": flat(420) + spike(420, 400, 5.0, 12.0),
    "non-finite": np.where(np.arange(300) >= 200, math.nan, flat(300)),
}
VERDICTS = {
    "blip": "blips only", "spike": "spikes", "long spike": "spikes", "hump": "spikes", "slow rise": "not back",
    "level shift": "spikes", "not back": "not back", "non-finite": "not back",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_its_name_and_its_verdict(form: str) -> None:
    (event,) = events(FORMS[form])
    assert event.form == form
    assert concluded(FORMS[form]).verdict == VERDICTS[form]


# What was wrong, an example each.


def test_back_is_back_however_long_it_takes_and_up_for_good_is_not_back() -> None:
    decaying = concluded(flat(3000) + spike(3000, 600, 3.0, 60.0, rise=10))
    assert decaying.verdict == "spikes"
    assert decaying.text.startswith("1 long spike, back: longest ")
    source = 3 - 0.0005 * np.arange(4000) + flat(4000, 0.0) + 1.0 * (np.arange(4000) >= 1000)
    shifted = concluded(source)
    assert shifted.text.startswith("1 level shift, back: longest ")
    stays = concluded(fall(1000) + 3.0 * (np.arange(1000) >= 500))
    assert stays.verdict == "not back"
    assert stays.text.startswith("not back since step 501: it stays on another level, from 2.0")


def test_slow_rises_and_humps_are_seen() -> None:
    for height in (3.0, 11.0):
        assert concluded(flat(1500) + ramp(1500, 500, 800, height)).verdict == "not back"
    seen = concluded(flat(1500) + hump(1500, 600, 300, 3.0))
    assert seen.verdict == "spikes"
    assert "1 hump, back" in seen.text


@pytest.mark.parametrize("seed", range(3))
def test_thin_logs_are_not_called_free_of_spikes(seed: int) -> None:
    """13 spikes of 20 to 40 steps."""
    losses = edge_of_stability(seed)
    assert len([e for e in events(losses) if e.kind == "loss"]) == 13
    for few in (thinned(losses, 10), means(losses, 10)):
        found = [e for e in with_hindsight(curve_of(few, 10)) if e.kind == "loss"]
        assert len(found) >= 9
        assert concluded(few, 10).verdict not in PASSED
    assert concluded(thinned(fall(2150), 10), 10, shortest=20).text.startswith(
        "no spike of 20 steps or more in steps 90 "
    )
    assert concluded(thinned(fall(2150), 60), 60).text == "cannot tell: 27 rows are judged, 32 are needed"


def test_rounded_values_make_no_events() -> None:
    draw = np.random.default_rng(0)
    rounded = [round(float(x), 2) for x in draw.normal(3, 0.01, 20_000)]
    norms = [max(round(float(x), 2), 0.01) for x in draw.normal(0.23, 0.01, 20_000)]
    assert with_hindsight(Curve(range(20_000), rounded, norms)) == ()


def test_the_gradient_norm_decides_nothing() -> None:
    losses, norms = fall(1000), np.exp(np.random.default_rng(1).normal(0, 0.2, 1000))
    norms[[300, 500, 700]] *= 40
    losses[703:706] += 4
    curve = Curve(range(1, 1001), losses.tolist(), norms.tolist())
    found = with_hindsight(curve)
    assert [(e.onset, e.trace) for e in found if e.kind == "gradient_norm"] == [(301, False), (501, False), (701, True)]
    line = norm_line(found)
    assert line is not None
    assert line.startswith("gradient norm: 3 events, 1 with and 2 without a trace in the loss; highest ")
    assert norm_line([]) is None
    calm = dataclasses.replace(curve, losses=fall(1000).tolist())
    assert conclude(calm, with_hindsight(calm)).verdict == "healthy"


def test_the_first_rows_are_judged_and_the_range_is_told() -> None:
    assert concluded(fall(300)).text.startswith("no spike in steps 9 to 300; largest excess ")
    early = fall(300, tau=60)
    early[9:14] += 5
    assert concluded(early).verdict == "spikes"
    assert concluded(flat(39)).verdict == "cannot tell"
    assert concluded(flat(40)).verdict == "healthy"
    assert concluded(flat(60), after=40).text == "cannot tell: 20 rows after the warm-up are judged, 32 are needed"
    assert concluded([]).text == "cannot tell: 0 rows are judged, 32 are needed"


def test_a_verdict_has_a_size() -> None:
    small = concluded(flat(400, 2.77, 0.01) + spike(400, 200, 0.09, 4.0, rise=2))
    large = concluded(flat(400, 2.4, 0.01) + spike(400, 200, 12.1, 4.0, rise=2))
    assert small.verdict == large.verdict == "spikes"
    assert small.largest == pytest.approx(0.09, abs=0.03)
    assert large.largest == pytest.approx(12.1, abs=0.05)
    assert "highest +0.0" in small.text
    assert "highest +12.1 nats at step 20" in large.text
    assert "nats x steps in all" in large.text


# Words.


def test_unstable_is_said_of_a_stretch_that_does_not_find_its_level() -> None:
    draw = np.random.default_rng(3)
    losses = flat(1200)
    for i in range(14):
        losses += spike(1200, 500 + 12 * i, float(draw.uniform(2, 6)), 5.0, rise=2)
    found = concluded(losses)
    assert found.verdict == "unstable"
    first, last = (int(word) for word in found.text.partition(":")[0].split() if word.isdigit())
    assert abs(first - 500) < 6
    assert 640 < last < 720


def test_a_run_that_is_not_finite_for_a_while() -> None:
    losses = flat(300)
    losses[150:153] = math.nan
    found = concluded(losses)
    assert (found.verdict, found.text) == (
        "spikes", "1 non-finite stretch, back: longest 3 rows from step 151",
    )  # fmt: skip
    assert concluded(np.full(50, math.nan)).text == "not back since step 1: not finite, 50 rows"


def test_what_stands_beside_what_is_not_back() -> None:
    losses = flat(900) + spike(900, 300, 4.0, 6.0, rise=2) + 3.0 * (np.arange(900) >= 800)
    found = concluded(losses)
    assert found.verdict == "not back"
    assert "; 1 spike, back: " in found.text
    assert found.judged == (9, 900)
    assert found.rows == 892


# Hindsight.


def test_where_hindsight_and_the_detector_differ() -> None:
    """The onset of what only means could show; a valley; what is faint and recurs; what crept up. Else the same."""
    rising = flat(1500) + ramp(1500, 600, 800, 8.0)
    online, (later,) = observed(rising).events, events(rising)
    assert later.over > 1
    assert abs(later.onset - 610) < 20
    assert later.onset != online[0].onset

    twice = flat(600) + spike(600, 300, 4.0, 3.0) + spike(600, 309, 4.0, 3.0)
    assert len(observed(twice).events) == 1
    assert [e.onset for e in events(twice)] == [301, 310]

    faint = flat(4000)
    faint[200::200] = 3 + 0.05 * 6.4
    seen = [e for e in observed(faint).events if e.kind == "loss"]
    found = events(faint)
    assert len(seen) < 8 < len(found)
    assert {e.form for e in found} == {"blip"}
    rare = flat(4000)
    rare[[500, 1500]] = 3 + 0.05 * 6.4
    assert len(events(rare)) == len(observed(rare).events)

    early = flat(300, 2.0, 0.02) + ramp(300, 8, 24, 1.0)
    assert observed(early).events == ()
    (crept,) = events(early)
    assert (crept.back, crept.onset < 20) == (None, True)

    plain = fall(600) + spike(600, 300, 3.0, 8.0, rise=3)
    (first,), (second,) = observed(plain).events, events(plain)
    assert (first.onset, first.peak, first.back) == (second.onset, second.peak, second.back)


def test_at_the_end_of_the_log() -> None:
    """A row that is up at the very end may be a blip; two are not back; a row at the level after them is enough."""
    for last, verdict in (([2.0], "blips only"), ([2.0, 2.0], "not back"), ([2.0, 2.0, 0.0], "spikes")):
        losses = fall(300)
        losses[-len(last) :] += last
        assert concluded(losses).verdict == verdict
        assert observed(losses).up
    dips = fall(300) + 3.0 * (np.arange(300) >= 200)
    dips[-1] -= 3.0
    assert concluded(dips).verdict == "not back"


def test_a_series_that_wanders_is_no_rise() -> None:
    values = smooth(np.random.default_rng(9), 8_000, 0.9)
    assert [e for e in events(3 + 0.05 * values) if e.over > 1] == []


def test_faint_events_need_a_mirror_without_any() -> None:
    """As many below as above is noise."""
    both = flat(4000)
    both[200::200] = 3 + 0.05 * 6.4
    both[100::200] = 3 - 0.05 * 6.4
    assert len(events(both)) == len(observed(both).events)


def test_the_area_counts_steps() -> None:
    losses = flat(200, 3.0, 0.001)
    losses[100:104] += 2.0
    (event,) = with_hindsight(curve_of(losses, 10))
    assert (event.onset, event.back, event.duration) == (1010, 1050, 4)
    assert event.area == pytest.approx(2.0 * 4 * 10, rel=0.01)


def test_nothing_to_judge() -> None:
    assert with_hindsight(Curve((), (), ())) == ()
    assert with_hindsight(Curve((1, 2), (None, 3.0), (None, None))) == ()


#: SmolLM2-135M at a rate of 3e-3, 256 tokens a step, two seeds: what it had learned is lost in a hundred steps.
LOST = [
    """
    2.32 3.44 2.60 2.75 3.47 2.08 2.88 4.00 4.39 3.92 3.95 4.02 3.66 4.45 4.92 4.95 4.62 5.02 5.20 5.23 5.41 5.24
    5.19 4.79 4.55 5.33 3.58 5.00 4.85 4.18 6.41 4.56 7.59 5.19 7.27 5.18 5.41 5.39 4.89 4.19 4.82 4.81 4.79 5.77
    4.74 4.44 5.43 4.80 4.61 5.93 5.03 2.96 5.52 4.86 8.92 4.64 4.81 6.32 6.03 6.10 6.04 7.21 4.60 5.97 5.69 5.55
    6.90 6.85 6.96 7.78 7.10 7.36 7.50 6.89 7.54 6.82 7.28 6.95 6.68 6.77 7.20 7.64 6.53 6.78 6.83 6.46 6.46 6.10
    6.25 6.15 6.48 7.60 7.08 7.19 6.32 6.80 6.48 7.52 6.99 7.36 6.60
""",
    """
    2.94 3.03 2.75 3.29 2.88 2.88 3.75 3.06 3.16 3.73 4.19 5.29 5.11 4.76 4.64 4.49 5.36 5.24 5.31 5.34 4.35 4.77
    5.23 5.08 4.75 5.93 3.72 5.23 5.26 4.03 5.71 4.81 4.63 6.27 4.61 5.66 4.86 5.24 5.65 5.44 5.95 5.56 5.59 5.92
    4.31 5.09 4.56 5.38 4.24 4.99 4.39 5.40 4.92 4.73 5.42 4.41 4.70 4.88 4.78 4.12 5.41 4.23 6.95 3.67 4.81 5.14
    5.25 4.90 4.01 5.79 5.68 4.74 4.46 5.43 6.61 4.88 4.88 5.29 4.86 4.65 4.16 5.04 4.05 5.28 5.47 5.03 4.87 5.03
    4.78 5.15 4.56 4.94 5.84 4.39 5.19 4.53 4.61 4.80 4.60 5.43 4.35
""",
]


@pytest.mark.parametrize("text", LOST)
def test_a_run_that_loses_what_was_learned_is_not_healthy(text: str) -> None:
    """No row stands out of the noise, and the level rises with the warm-up; but it ends at twice its beginning."""
    losses = np.array([float(word) for word in text.split()])
    assert len(losses) == 101
    found = concluded(losses, after=10)
    assert found.verdict == "not back"
    assert "it rises slowly, from 2." in found.text
    assert concluded(losses[::-1]).verdict in PASSED  # the other way round it learns


@pytest.mark.parametrize("level", [0.0, 0.3, 2.8, 11.0])
@pytest.mark.parametrize("noise", [0.02, 0.2, 0.6])
def test_noise_and_a_slightly_harder_text_are_no_loss_of_what_was_learned(level: float, noise: float) -> None:
    """Independent noise, and noise that wanders; a text that gets harder by less than the noise; rewards, near 0."""
    for seed in range(40):
        draws = noise * np.random.default_rng(seed).normal(size=120)
        wander = np.zeros(120)
        for i in range(1, 120):
            wander[i] = 0.9 * wander[i - 1] + math.sqrt(1 - 0.9**2) * draws[i]
        rise = min(0.2 * level, 2 * noise) * np.arange(120) / 120
        for losses in (level + draws, level + draws + rise, *([level + wander] if 0.25 * level > 3 * noise else [])):
            assert all(event.form != "slow rise" for event in events(losses)), (seed, losses)
