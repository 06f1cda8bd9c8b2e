"""Files that are fetched one after the other, while those that have arrived are worked on."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

from spikepatch.progress import Progress, silent
from spikepatch.quiet import quiet

#: Fetches a file by its name, and tells how many of its bytes have arrived; what it returns is kept with the file.
Fetch = Callable[[str, Callable[[int], None]], object]

_REPORT_SECONDS = 0.2
#: A run that stops waits so long for the file under way, which ends with its next piece and leaves no part of itself.
_STOP_SECONDS = 10


class Arrivals:
    """The files that a source still lacks; none, for a folder on this machine.

    A file is fetched when it is waited for, or meanwhile: by one thread at a time, which fetches one file at a time. To
    be used from one thread.

    Args:
        sizes: name of each file -> its bytes, in the order in which they will be needed.
        fetch: called in the thread, once for each file.
        report: told how far a file is that is waited for.
    """

    def __init__(self, sizes: Mapping[str, int], fetch: Fetch, report: Progress | None = None) -> None:
        self._sizes = dict(sizes)
        self._fetch = fetch
        self._report: Progress = report or silent
        self._futures: dict[str, Future[object]] = {}
        self._arrived: dict[str, int] = {}
        self._stopped = threading.Event()

    @property
    def missing(self) -> int:
        """Bytes of the files that are not there."""
        return sum(size for file, size in self._sizes.items() if not self._is_there(file))

    @property
    def there(self) -> dict[str, object]:
        """Of each file that has arrived, what ``fetch`` has returned."""
        return {file: future.result() for file, future in self._futures.items() if self._is_there(file)}

    def wait(self, file: str) -> None:
        """Return once ``file`` is there.

        Raises:
            Exception: what ``fetch`` has raised for this file, or for one before it.
        """
        if file not in self._sizes:
            return
        with self._fetching([] if file in self._futures else [file]):
            self._wait(file)

    @contextlib.contextmanager
    def meanwhile(self) -> Iterator[None]:
        """Fetch every file while the block runs. At its end all are there; if it raises, the rest is not fetched."""
        with self._fetching([file for file in self._sizes if file not in self._futures]):
            yield
            for file in self._sizes:
                self._wait(file)

    def _is_there(self, file: str) -> bool:
        future = self._futures.get(file)
        return future is not None and future.done() and future.exception() is None

    def _wait(self, file: str) -> None:
        future = self._futures[file]
        while not future.done():
            self._report(f"fetching {file}", self._arrived.get(file, 0), self._sizes[file])
            concurrent.futures.wait([future], timeout=_REPORT_SECONDS)
        future.result()

    @contextlib.contextmanager
    def _fetching(self, files: Sequence[str]) -> Iterator[None]:
        if not files:
            yield
            return
        self._futures |= {file: Future() for file in files}
        # A daemon, since a request that hangs is no reason to keep the process.
        thread = threading.Thread(target=self._run, args=(files,), name="fetch", daemon=True)
        with quiet():  # here, since filters of warnings belong to all threads
            thread.start()
            try:
                yield
            except BaseException:
                self._stopped.set()
                thread.join(_STOP_SECONDS)
                raise

    def _run(self, files: Sequence[str]) -> None:
        failure: BaseException | None = None
        for file in files:
            try:
                if failure is not None:
                    raise failure
                self._note(file, 0)
                self._futures[file].set_result(self._fetch(file, partial(self._note, file)))
            except BaseException as error:  # it is raised where the file is waited for
                failure = error
                self._futures[file].set_exception(failure)

    def _note(self, file: str, arrived: int) -> None:
        if self._stopped.is_set():
            raise InterruptedError("no longer wanted")
        self._arrived[file] = max(arrived, self._arrived.get(file, 0))  # it may be counted twice, at two stages
