"""Which ranks are named as slow, given the work that each rank has done."""

from __future__ import annotations

from bigincubate.distributed.stragglers import COMPARISONS, MIN_COST, MIN_STEPS, StragglerDetector, Work


class Ranks:
    """Ranks whose work is compared; each call of ``work`` is one comparison."""

    def __init__(self, world: int, share: float = 0.5) -> None:
        self.detector = StragglerDetector(share, [f"n{rank // 2}" for rank in range(world)], now=0.0)
        self.works = [Work()] * world
        self.now = 0.0

    def work(self, *seconds: float, waited: float = 0.0, steps: int = MIN_STEPS, whole: float = 0.5) -> list[int]:
        """Let every rank do some steps of its number of seconds; return the ranks that are named.

        A step takes ``whole`` seconds including the rest of it.
        """
        self.now += steps * whole
        self.works = [
            Work(done.steps + steps, done.waited + steps * waited, done.computed + steps * (own - waited))
            for done, own in zip(self.works, seconds, strict=True)
        ]
        self.detector.compare(self.works, self.now)
        return [straggler.rank for straggler in self.detector.named]


def test_rank_is_named_after_several_slow_comparisons_until_several_that_are_not() -> None:
    ranks = Ranks(4)
    slow, equal = (0.1, 0.1, 0.3, 0.1), (0.1, 0.11, 0.14, 0.1)
    found = [ranks.work(*slow) for _ in range(COMPARISONS + 2)] + [ranks.work(*equal) for _ in range(COMPARISONS)]
    assert found == [[]] * (COMPARISONS - 1) + [[2]] * 3 + [[2]] * (COMPARISONS - 1) + [[]]


def test_named_rank_is_described() -> None:
    ranks = Ranks(4)
    for _ in range(COMPARISONS):
        ranks.work(0.1, 0.1, 0.3, 0.1, waited=0.05)
    (straggler,) = ranks.detector.named
    assert str(straggler) == (
        "rank 2 (n1) takes 3.0 times as long as the median: 0.300 s per step before the backward pass, of which"
        " 0.050 s waiting for data; median 0.100 s"
    )
    assert abs((ranks.detector.ratio or 0.0) - 3) < 1e-9


def test_rank_that_is_slow_in_only_two_comparisons_in_a_row_is_not_named() -> None:
    ranks = Ranks(2)
    for seconds in [(0.1, 0.9), (0.1, 0.9), (0.1, 0.1)] * 4:
        assert ranks.work(*seconds) == []


def test_one_of_two_ranks_is_named() -> None:
    for seconds, rank in (((0.1, 0.16), 1), ((0.16, 0.1), 0)):
        ranks = Ranks(2)
        assert [ranks.work(*seconds) for _ in range(COMPARISONS)][-1] == [rank]


def test_all_ranks_of_a_slow_machine_are_named_slowest_first() -> None:
    ranks = Ranks(6)
    for turn in range(COMPARISONS):
        found = ranks.work(0.1, 0.1, 0.1, 0.1, 0.2 + turn / 100, 0.3)
    assert found == [5, 4]


def test_rank_within_the_share_is_not_named() -> None:
    ranks = Ranks(3, share=1.0)
    assert [ranks.work(0.1, 0.1, 0.19) for _ in range(2 * COMPARISONS)][-1] == []
    assert [ranks.work(0.1, 0.1, 0.21) for _ in range(2 * COMPARISONS)][-1] == [2]


def test_difference_that_is_a_small_part_of_the_step_does_not_matter() -> None:
    ranks = Ranks(2)
    assert [ranks.work(0.1, 0.3, whole=0.25 / MIN_COST) for _ in range(2 * COMPARISONS)][-1] == []
    assert [ranks.work(0.1, 0.3, whole=0.15 / MIN_COST) for _ in range(2 * COMPARISONS)][-1] == [1]


def test_ranks_are_compared_only_after_enough_steps_of_each() -> None:
    ranks = Ranks(2)
    found = [ranks.work(0.1, 0.3, steps=1) for _ in range(COMPARISONS * MIN_STEPS)]
    assert found == [[]] * (COMPARISONS * MIN_STEPS - 1) + [[1]]


def test_ranks_that_have_not_worked_are_not_compared() -> None:
    ranks = Ranks(2)
    ranks.works = [Work(100, 0.0, 0.0)] * 2
    ranks.detector.compare(ranks.works, 1.0)
    assert (ranks.detector.named, ranks.detector.ratio) == ((), None)
