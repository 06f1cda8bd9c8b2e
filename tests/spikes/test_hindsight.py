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
