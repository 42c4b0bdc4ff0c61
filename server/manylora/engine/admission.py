"""Who may still join the queue: fairness before admission.

What waits is bounded, and a bound that all share is a bound that one can use up. So each tenant may have open at most
a share of what the others leave: with a half, a lone tenant fills half of the queue, two greedy ones come to a third
each, k of them to 1/(k + 1), and who has nothing open finds room as long as few others are greedy. (The buffer
sharing of Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998.)
"""

from collections import Counter
from math import ceil

from manylora.errors import QueueFull

_RETRY_AFTER_S = 1.0


class Admission:
    """Counts open sequences, running or waiting, by tenant. At most `max_open` of all tenants together.

    `tenant_share`: of what the others leave, how much one tenant may hold. While nobody else has any open, it may at
    least fill the `num_seats` of a batch.
    """

    def __init__(self, max_open: int, num_seats: int, tenant_share: float) -> None:
        self._max_open = max_open
        self._num_seats = num_seats
        self._tenant_share = tenant_share
        self._open: Counter[str] = Counter()

    @property
    def most(self) -> int:
        """What one tenant may have open while nobody else has any."""
        return self._limit(0)

    def check(self, tenant: str, num_sequences: int) -> None:
        """Raises QueueFull where so many more would be too many, of this tenant or of all."""
        mine, total = self._open[tenant], self._open.total()
        if total + num_sequences > self._max_open:
            raise QueueFull("The server's queue is full. Try again shortly.", retry_after_s=_RETRY_AFTER_S)
        if mine + num_sequences > self._limit(total - mine):
            raise QueueFull(
                "Your requests fill your tenant's share of the server's queue. Wait for some of them to end.",
                retry_after_s=_RETRY_AFTER_S,
            )

    def enter(self, tenant: str) -> None:
        """One more sequence is open."""
        self._open[tenant] += 1

    def leave(self, tenant: str) -> None:
        """One has ended."""
        self._open[tenant] -= 1
        if not self._open[tenant]:
            del self._open[tenant]

    def _limit(self, num_others: int) -> int:
        room = self._max_open - num_others
        share = ceil(room * self._tenant_share)
        return share if num_others else max(share, min(room, self._num_seats))

    def check_integrity(self, tenants: Counter[str]) -> None:
        """The counts are those of the sequences that are open."""
        assert self._open == tenants
        assert self._open.total() <= self._max_open
