"""Limits at a time and a minute, with times given by hand."""

from __future__ import annotations

from builder.models.llm.limits import START, Bucket, Concurrency


def grown(limit: Concurrency, answers: int) -> int:
    """The limit after so many answers, each at full use."""
    for _ in range(answers):
        limit.in_flight = limit.limit
        limit.increase()
    return limit.limit


def test_the_limit_doubles_in_a_round_trip_up_to_the_ceiling() -> None:
    limit = Concurrency(40)
    assert limit.limit == START == 8
    assert grown(limit, 8) == 16
    assert grown(limit, 16) == 32
    assert grown(limit, 100) == 40
    assert Concurrency(3).limit == 3


def test_it_halves_once_a_round_trip_and_then_grows_by_one() -> None:
    limit = Concurrency(40)
    grown(limit, 8)
    assert limit.decrease(sent=1.0, now=2.0)
    assert limit.limit == 8
    assert not limit.decrease(sent=1.5, now=2.5)
    assert limit.limit == 8
    assert limit.decrease(sent=2.1, now=3.0)
    assert limit.limit == 4
    assert [grown(limit, 1) for _ in range(5)] == [4, 4, 4, 4, 5]


def test_it_never_falls_below_one() -> None:
    limit = Concurrency(4)
    for i in range(5):
        limit.decrease(sent=2.0 * i, now=2.0 * i + 1)
    assert limit.limit == 1
    assert limit.has_room
    limit.in_flight = 1
    assert not limit.has_room


def test_a_limit_that_is_not_used_does_not_grow() -> None:
    limit = Concurrency(64)
    for _ in range(100):
        limit.in_flight = 3
        limit.increase()
    assert limit.limit == 8
    limit.in_flight = 4
    limit.increase()
    assert limit.limit == 9
    assert limit.load == 4 / 9


def test_a_bucket_lets_a_second_s_worth_through_and_then_its_rate() -> None:
    bucket = Bucket(600, now=100.0)
    for _ in range(10):
        assert bucket.wait(1, 100.0) == 0
        bucket.take(1)
    assert bucket.wait(1, 100.0) == 0.1
    assert round(bucket.wait(1, 100.05), 9) == 0.05
    assert bucket.wait(1, 100.25) == 0
    for _ in range(2):
        bucket.take(1)
    assert bucket.wait(1, 100.25) > 0


def test_in_a_minute_a_bucket_lets_its_rate_and_one_burst_through() -> None:
    bucket, passed, now = Bucket(60, now=0.0), 0, 0.0
    while now <= 60:
        wait = bucket.wait(1, now)
        if wait == 0:
            bucket.take(1)
            passed += 1
        now += max(wait, 1e-6)
    assert passed == 61


def test_what_is_larger_than_a_bucket_passes_when_it_is_full_and_is_paid_off() -> None:
    bucket = Bucket(600, now=0.0)
    assert bucket.wait(100, 0.0) == 0
    bucket.take(100)
    assert bucket.wait(1, 0.0) == 9.1
    bucket.take(-95)  # it was 5 only
    assert bucket.wait(1, 0.0) == 0


def test_a_slow_bucket_holds_one() -> None:
    bucket = Bucket(6, now=0.0)
    bucket.take(1)
    assert bucket.wait(1, 0.0) == 10
    assert bucket.wait(1, 1000.0) == 0
    bucket.take(1)
    assert bucket.wait(1, 1000.0) == 10
