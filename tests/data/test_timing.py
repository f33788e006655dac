"""Waiting and working are told apart."""

from __future__ import annotations

from time import sleep

import afds  # noqa: F401
from afds.data.timing import TimedLoader


def slow(n):
    for i in range(n):
        sleep(0.01)
        yield i


def test_the_share_lies_where_the_time_went():
    waiting = TimedLoader(slow(5))
    assert list(waiting) == [0, 1, 2, 3, 4]
    working = TimedLoader([1, 2, 3])
    for _ in working:
        sleep(0.01)
    assert 0 <= working.wait_share < 0.5 < waiting.wait_share <= 1
    assert working.worked_s >= 0.03
    assert len(working) == 3


def test_nothing_measured_and_breaking_off():
    timed = TimedLoader([1, 2, 3])
    assert timed.wait_share == 0.0
    for _ in timed:
        sleep(0.01)
        break
    assert timed.worked_s >= 0.01
    timed.reset()
    assert timed.wait_share == 0.0


def test_passes_add_up():
    timed = TimedLoader([1, 2])
    for _ in range(2):
        for _ in timed:
            sleep(0.005)
    assert timed.worked_s >= 0.02
