"""Work that is done ahead by threads, and given back in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    work: Callable[[Item], Result], items: Iterable[Item], *, threads: int, waiting: int
) -> Generator[Result, None, None]:
    """Yield `work(item)` of each item, in order.

    Args:
        threads: that work at the same time.
        waiting: results that may be begun or done before they are asked for.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=getattr(work, "__name__", "ahead"))
    pending = deque[Future[Result]]()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > waiting:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # A thread that waits for the network does not keep the others.
        pool.shutdown(wait=False, cancel_futures=True)
