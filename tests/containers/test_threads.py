"""Jobs on threads beside the one that started them."""

from __future__ import annotations

import threading

import pytest

from core.containers.threads import Workers
from tests.makers.limits import wait_until


def test_all_jobs_are_done_and_each_once():
    done: list[int] = []
    with Workers((lambda k=k: done.append(k) for k in range(100)), 4) as workers:
        workers.wait()
    assert sorted(done) == list(range(100))


def test_jobs_are_made_only_as_they_are_asked_for():
    made, begun = [], threading.Semaphore(0)

    def jobs():
        for k in range(10):
            made.append(k)
            yield lambda: begun.acquire()

    with Workers(jobs(), 2) as workers:
        begun.release(1)
        wait_until(lambda: len(made) >= 3)
        assert made == [0, 1, 2]
        begun.release(9)
        workers.wait()
    assert made == list(range(10))


def test_the_first_error_is_raised_and_no_job_is_begun_after_it():
    done = []

    def fail():
        raise ValueError("no")

    with (
        pytest.raises(ValueError, match=r"^no$"),
        Workers([lambda: done.append(1), fail, lambda: done.append(3)], 1) as w,
    ):
        w.wait()
    assert done == [1]


def test_an_error_in_making_the_jobs_is_raised_too():
    def jobs():
        yield lambda: None
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"), Workers(jobs(), 3) as workers:
        workers.wait()


def test_leaving_without_waiting_ends_after_the_job_in_hand():
    done, may_end = [], threading.Event()

    def first():
        may_end.wait()
        done.append("first")

    with pytest.raises(RuntimeError, match="elsewhere"), Workers([first, lambda: done.append("second")], 1) as workers:
        threading.Timer(0.05, may_end.set).start()
        raise RuntimeError("elsewhere")
    assert done == ["first"] and not any(thread.is_alive() for thread in workers._threads)


def test_nothing_to_do_is_done_at_once():
    with Workers([], 1) as workers:
        workers.wait()
        assert not any(thread.is_alive() for thread in workers._threads)
