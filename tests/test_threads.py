"""Rules about threads, as asserts ask for them."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from manylora import threads
from manylora.threads import Home, holds, on_event_loop, runs_on, started_pool


def test_a_lock_is_held_by_the_thread_that_took_it_and_no_other() -> None:
    condition = threading.Condition(threading.RLock())
    with ThreadPoolExecutor(1) as pool:
        assert not holds(condition)
        with condition, condition:
            assert holds(condition)
            assert not pool.submit(holds, condition).result()
        assert not holds(condition)


def test_asking_who_holds_a_lock_wakes_nobody() -> None:
    condition, woken = threading.Condition(), threading.Event()
    is_waiting = threading.Event()

    def wait() -> None:
        with condition:
            is_waiting.set()
            condition.wait()
        woken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    is_waiting.wait(30)
    with condition:  # only once the other waits
        assert holds(condition)
    assert not woken.is_set()
    with condition:
        condition.notify()
    thread.join(30)
    assert woken.is_set()


def test_a_thread_of_a_pool_is_known_by_its_name() -> None:
    with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
        assert pool.submit(runs_on, "loader").result()
        assert not pool.submit(runs_on, "engine").result()
    assert not runs_on("loader")


async def _asked() -> tuple[bool, bool]:
    return on_event_loop(), await asyncio.to_thread(on_event_loop)


def test_an_event_loop_runs_on_its_own_thread_alone() -> None:
    assert asyncio.run(_asked()) == (True, False)
    assert not on_event_loop()


def test_a_home_is_the_first_thread_that_it_was_used_on() -> None:
    home = Home()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(home.is_here).result()
        assert not home.is_here()
        assert pool.submit(home.is_here).result()


def test_a_pool_is_there_once_all_its_threads_are_so_that_it_may_be_closed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may_run = threading.Event()

    class Held(ThreadPoolExecutor):
        """Threads that take their work and come to nothing yet."""

        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            return super().submit(lambda: may_run.wait() and fn(*args, **kwargs))

    monkeypatch.setattr(threads, "ThreadPoolExecutor", Held)
    with ThreadPoolExecutor(1) as other:
        made = other.submit(started_pool, 3, "held")
        with pytest.raises(TimeoutError):
            made.result(timeout=0.2)
        may_run.set()
        made.result(timeout=60).shutdown(cancel_futures=True)
