"""Results and exceptions come in order, and little is done in advance."""

from collections.abc import Iterator
from threading import Barrier, Event

import pytest

from app.prefetch import prefetch


def test_results_are_in_order() -> None:
    first_may_end = Event()

    def work(item: int) -> int:
        if item == 0:
            first_may_end.wait()
        if item == 3:
            first_may_end.set()
        return item * 10

    assert list(prefetch(work, range(6), threads=2, max_pending=4)) == [0, 10, 20, 30, 40, 50]


def test_calls_run_at_the_same_time() -> None:
    together = Barrier(3)
    results = prefetch(lambda _: together.wait(300), range(3), threads=3, max_pending=3)
    assert sorted(results) == [0, 1, 2]


@pytest.mark.parametrize("max_pending", (1, 4))
def test_exception_of_a_call_is_raised_after_the_results_before_it(max_pending: int) -> None:
    results = prefetch(lambda item: 1 // (2 - item), range(9), threads=2, max_pending=max_pending)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == []


def test_exception_of_the_items_is_raised_after_the_results_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    results = prefetch(str, items(), threads=2, max_pending=4)
    assert next(results) == "1"
    with pytest.raises(ValueError, match="no more"):
        next(results)


def test_no_more_items_are_taken_than_may_be_pending() -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    results = prefetch(str, items(), threads=2, max_pending=3)
    assert taken == []
    next(results)
    assert len(taken) == 4
    results.close()
    assert len(taken) == 4


def test_closing_cancels_calls_that_have_not_begun() -> None:
    may_end, done = Event(), []

    def work(item: int) -> None:
        done.append(item)
        if item == 1:
            may_end.wait()

    results = prefetch(work, range(10), threads=1, max_pending=5)
    next(results)
    results.close()
    may_end.set()
    assert max(done) <= 1
