"""Who takes part in forks comes to rest before them and goes on after."""

import random
import threading

import pytest

from kvtier.platform import fork_safety


class Member:
    def __init__(self):
        self.said = []

    def before_fork(self):
        self.said.append("rest")

    def after_fork(self, in_child):
        self.said.append(in_child)


class Restless(Member):
    def before_fork(self):
        raise ValueError("no rest")


@pytest.mark.parametrize("in_child", [True, False])
def test_each_member_is_told_before_and_after(in_child):
    members = [Member(), Member()]
    for member in members:
        fork_safety.take_part(member, fork_safety.Rank.STORE)
    fork_safety._before()
    assert [member.said for member in members] == [["rest"], ["rest"]]
    fork_safety._after(in_child)
    assert [member.said for member in members] == [["rest", in_child], ["rest", in_child]]


def test_locks_are_taken_in_the_order_of_their_ranks():
    """A thread that holds one may wait for another of a later rank: in any other order, both would wait for ever."""
    order = []

    class Noting(Member):
        def before_fork(self):
            order.append(self.rank)

    ranks = [rank for rank in fork_safety.Rank for _ in range(2)]
    members = []
    for rank in random.Random(0).sample(ranks, len(ranks)):
        member = Noting()
        member.rank = rank
        fork_safety.take_part(member, rank)
        members.append(member)
    fork_safety._before()
    fork_safety._after(in_child=False)
    assert order == ranks


def test_nobody_is_kept_alive():
    member = Member()
    fork_safety.take_part(member, fork_safety.Rank.STORE)
    said = member.said
    del member
    fork_safety._before()
    fork_safety._after(in_child=False)
    assert said == []


def test_who_did_not_come_to_rest_is_not_told_to_go_on():
    """Python goes on with the fork all the same."""
    restless = Restless()
    fork_safety.take_part(restless, fork_safety.Rank.STORE)
    with pytest.raises(ValueError, match="no rest"):
        fork_safety._before()
    fork_safety._after(in_child=False)
    assert restless.said == []
    del restless
    fork_safety._before()
    fork_safety._after(in_child=False)


def test_two_threads_that_fork_take_turns():
    member, second = (
        Member(),
        threading.Thread(target=lambda: (fork_safety._before(), fork_safety._after(in_child=False))),
    )
    fork_safety.take_part(member, fork_safety.Rank.STORE)
    fork_safety._before()
    second.start()
    second.join(timeout=0.2)
    assert second.is_alive()
    assert member.said == ["rest"]
    fork_safety._after(in_child=False)
    second.join(timeout=30)
    assert member.said == ["rest", False] * 2
