"""Registered members stop before a fork and resume after it."""

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
def test_each_member_is_called_before_and_after_a_fork(in_child):
    members = [Member(), Member()]
    for member in members:
        fork_safety.take_part(member, fork_safety.Rank.STORE)
    fork_safety._before()
    assert [member.said for member in members] == [["rest"], ["rest"]]
    fork_safety._after(in_child)
    assert [member.said for member in members] == [["rest", in_child], ["rest", in_child]]


def test_members_stop_for_a_fork_in_the_order_of_their_ranks():
    """A thread that holds a lock may wait for one of a later rank, so any other order could deadlock."""
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


def test_registration_does_not_keep_a_member_alive():
    member = Member()
    fork_safety.take_part(member, fork_safety.Rank.STORE)
    said = member.said
    del member
    fork_safety._before()
    fork_safety._after(in_child=False)
    assert said == []


def test_member_that_failed_to_stop_is_not_resumed():
    """Python forks in spite of the error."""
    restless = Restless()
    fork_safety.take_part(restless, fork_safety.Rank.STORE)
    with pytest.raises(ValueError, match="no rest"):
        fork_safety._before()
    fork_safety._after(in_child=False)
    assert restless.said == []
    del restless
    fork_safety._before()
    fork_safety._after(in_child=False)


def test_concurrent_forks_take_turns():
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
