"""Calls that threads make in advance, with results in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    threads: int,
    max_pending: int,
    finish: bool = False,
) -> Generator[Result, None, None]:
    """Yield `work(item)` of each item, in order; an exception is raised in its result's place.

    Args:
        work: called in the threads.
        items: iterated in the caller's thread.
        threads: number of calls at the same time.
        max_pending: number of calls that may be begun before their results are needed.
        finish: when the generator is closed, finish the calls that are pending; otherwise drop
            them, and do not wait for those that are running.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=getattr(work, "__name__", "ahead"))
    pending = deque[Future[Result]]()
    try:
        for future in _submitted(pool, work, items):
            pending.append(future)
            if len(pending) > max_pending:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # Without `finish` the caller does not wait for a thread that waits for the network.
        pool.shutdown(wait=finish, cancel_futures=not finish)


def _submitted(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Future[Result]]:
    try:
        for item in items:
            yield pool.submit(work, item)
    except Exception as error:  # noqa: BLE001 (raised again in its turn)
        failed = Future[Result]()
        failed.set_exception(error)
        yield failed
