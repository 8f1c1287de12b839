"""Work that is done ahead by threads, and given back in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    work: Callable[[Item], Result], items: Iterable[Item], *, threads: int, max_pending: int
) -> Generator[Result, None, None]:
    """Yield `work(item)` of each item, in order; a failure comes after the results before it.

    Args:
        threads: that work at the same time.
        max_pending: results that may be begun or done before they are asked for.
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
        # A thread that waits for the network does not keep the others.
        pool.shutdown(wait=False, cancel_futures=True)


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
