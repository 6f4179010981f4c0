"""How many requests an endpoint gets at a time and per minute.

Owns the arithmetic of limits; knows no network and no clock: callers pass times, in seconds.
"""

from __future__ import annotations

#: Requests in flight that an endpoint starts with.
START = 8


class Concurrency:
    """Requests in flight, by additive increase and multiplicative decrease (Chiu and Jain, 1989).

    Until the first decrease every answer raises the limit by one, which doubles it per round trip (slow start,
    RFC 5681); then it grows by one per round trip.

    Attributes:
        in_flight: requests without an answer yet; the owner counts them.
    """

    def __init__(self, ceiling: int) -> None:
        self.in_flight = 0
        self._ceiling = ceiling
        self._limit = float(min(START, ceiling))
        self._is_starting = True
        self._decreased = float("-inf")

    @property
    def limit(self) -> int:
        """Requests that may be in flight, at least 1."""
        return int(self._limit)

    @property
    def has_room(self) -> bool:
        return self.in_flight < int(self._limit)

    @property
    def load(self) -> float:
        """Share of the limit that is in use."""
        return self.in_flight / int(self._limit)

    def increase(self) -> None:
        """Call it after an answer, before its request leaves `in_flight`. A limit that is not used does not grow."""
        if self._limit < self._ceiling and 2 * self.in_flight >= self._limit:
            step = 1.0 if self._is_starting else 1 / self._limit
            self._limit = min(float(self._ceiling), self._limit + step)

    def decrease(self, sent: float, now: float) -> bool:
        """Halves the limit, not below 1; False if the request was sent before the last decrease: nothing new.

        Args:
            sent: when the request was sent that met the limit.
        """
        if sent <= self._decreased:
            return False
        self._limit = max(1.0, self._limit / 2)
        self._decreased = now
        self._is_starting = False
        return True


class Bucket:
    """A token bucket: a steady flow, at most a second's worth (but one whole unit) at once.

    A request that costs more is let through when the bucket is full; the level then goes negative.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self._rate = per_minute / 60
        self._burst = max(1.0, self._rate)
        self._level = self._burst
        self._at = now

    def wait(self, cost: float, now: float) -> float:
        """Seconds until `cost` may be taken; 0 if now."""
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, (min(cost, self._burst) - self._level) / self._rate)

    def take(self, cost: float) -> None:
        """Takes `cost`; a negative one is given back."""
        self._level = min(self._burst, self._level - cost)
