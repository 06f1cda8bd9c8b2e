"""Files that are fetched by a thread: when, in which order, and what becomes of failures and of who stops."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import pytest

from spikepatch.source.arrivals import Arrivals

SIZES = {"a": 10, "b": 20, "c": 30}


class Server:
    """Notes what is asked of it, in order; ``answers`` holds back the files that are in it until they are set."""

    def __init__(self, *held: str, broken: str = "") -> None:
        self.events: list[str] = []
        self.answers = {file: threading.Event() for file in held}
        self.broken = broken

    def fetch(self, file: str, arrived: Callable[[int], None]) -> str:
        self.events.append(f"{file} asked")
        if file in self.answers:
            assert self.answers[file].wait(60)
        if file == self.broken:
            raise ValueError(f"{file} is broken")
        arrived(SIZES[file])
        self.events.append(f"{file} there")
        return f"stamp of {file}"


def test_a_file_is_fetched_when_it_is_waited_for_and_once() -> None:
    server = Server()
    arrivals = Arrivals(SIZES, server.fetch)
    assert (server.events, arrivals.missing) == ([], 60)

    for _ in range(2):
        arrivals.wait("b")
        assert (server.events, arrivals.missing) == (["b asked", "b there"], 40)
    arrivals.wait("no file of these")
    with arrivals.meanwhile():
        pass
    assert server.events == [f"{file} {what}" for file in "bac" for what in ("asked", "there")]
    assert arrivals.missing == 0
    assert arrivals.there == {file: f"stamp of {file}" for file in "bac"}


def test_the_next_is_fetched_while_one_is_worked_on() -> None:
    server = Server("b", "c")
    arrivals = Arrivals(SIZES, server.fetch)
    with arrivals.meanwhile():
        arrivals.wait("a")
        server.events.append("a read")
        server.answers["b"].set()
        arrivals.wait("b")
        server.events.append("b read")
        server.answers["c"].set()

    events = server.events
    assert sorted(events) == sorted(
        [*(f"{file} {what}" for file in "abc" for what in ("asked", "there")), "a read", "b read"]
    )
    assert events.index("a read") < events.index("b there") < events.index("c asked")
    assert events.index("b read") < events.index("c there")


def test_who_waits_is_told_how_far_it_is() -> None:
    told: list[tuple[str, int, int]] = []
    half = threading.Event()

    def fetch(file: str, arrived: Callable[[int], None]) -> None:
        arrived(4)
        assert half.wait(60)

    def report(step: str, done: int = 0, total: int = 0) -> None:
        told.append((step, done, total))
        if done == 4:
            half.set()

    Arrivals({"a": 10}, fetch, report).wait("a")

    assert told[-1] == ("fetching a", 4, 10)
    assert {(step, total) for step, _, total in told} == {("fetching a", 10)}


def read_first(arrivals: Arrivals) -> None:
    with arrivals.meanwhile():
        arrivals.wait("a")


def test_after_a_failure_nothing_more_is_fetched() -> None:
    server = Server(broken="b")
    arrivals = Arrivals(SIZES, server.fetch)
    with pytest.raises(ValueError, match="b is broken"):
        read_first(arrivals)

    assert server.events == ["a asked", "a there", "b asked"]
    assert arrivals.missing == 50
    for file in "bc":
        with pytest.raises(ValueError, match="b is broken"):
            arrivals.wait(file)


def test_who_stops_waits_for_the_piece_under_way_and_no_other() -> None:
    server = Server()
    under_way, stopped = threading.Event(), threading.Event()

    def fetch(file: str, arrived: Callable[[int], None]) -> None:
        server.fetch(file, arrived)
        if file == "b":
            under_way.set()
            try:
                while True:  # its pieces
                    arrived(1)
            finally:
                stopped.set()

    class Interrupted(BaseException):
        """As KeyboardInterrupt is one."""

    def work(arrivals: Arrivals) -> None:
        with arrivals.meanwhile():
            assert under_way.wait(60)
            raise Interrupted

    with pytest.raises(Interrupted):
        work(Arrivals(SIZES, fetch))

    assert stopped.is_set()
    assert server.events == ["a asked", "a there", "b asked", "b there"]


def test_warnings_of_the_thread_are_held_back_and_filters_stay() -> None:
    def fetch(file: str, arrived: Callable[[int], None]) -> None:
        warnings.warn("not for the user", stacklevel=1)

    before = warnings.filters[:]
    Arrivals({"a": 1}, fetch).wait("a")

    assert warnings.filters == before
