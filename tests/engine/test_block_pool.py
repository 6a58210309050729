from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ember_ray.engine.block_pool import BlockPool, prefix_keys


@given(
    st.lists(st.integers(0, 3), max_size=20),
    st.lists(st.integers(0, 3), max_size=20),
    st.integers(1, 4),
    st.integers(0, 2),
    st.integers(0, 2),
)
def test_keys_are_equal_exactly_where_prefix_and_version_are(
    a: list[int], b: list[int], size: int, version_a: int, version_b: int
) -> None:
    keys_a, keys_b = prefix_keys(a, size, version_a), prefix_keys(b, size, version_b)
    assert len(keys_a) == -(-len(a) // size)
    for place, (one, other) in enumerate(zip(keys_a, keys_b, strict=False)):
        end = (place + 1) * size
        assert (one == other) == (version_a == version_b and a[:end] == b[:end])


class PoolMachine(RuleBasedStateMachine):
    """The pool against a plain model of who holds what and what each block was last published as."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.held: list[list[int]] = []
        self.published: dict[bytes, int] = {}

    def holders(self, block: int) -> int:
        return sum(blocks.count(block) for blocks in self.held)

    @rule(count=st.integers(0, 7))
    def allocate(self, count: int) -> None:
        free = [block for block in range(6) if not self.holders(block)]
        if count > len(free):
            with pytest.raises(MemoryError):
                self.pool.allocate(count)
            return
        taken = self.pool.allocate(count)
        assert len(set(taken)) == count and set(taken) <= set(free)
        self.published = {key: block for key, block in self.published.items() if block not in taken}
        self.held.append(taken)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([b for blocks in self.held for b in blocks]))
        key = data.draw(st.sampled_from([b"a", b"b", b"c", b"d"]))
        if block not in self.published.values():
            self.pool.publish(block, key)
            self.published.setdefault(key, block)

    @rule(keys=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=4, unique=True))
    def find_and_hold(self, keys: list[bytes]) -> None:
        found = self.pool.lookup(keys)
        expected = []
        for key in keys:
            if key not in self.published:
                break
            expected.append(self.published[key])
        assert found == expected
        self.pool.hold(found)
        self.held.append(found)

    @precondition(lambda self: bool(self.held))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def counts_agree(self) -> None:
        used = {block for blocks in self.held for block in blocks}
        assert self.pool.num_used == len(used) and self.pool.num_free == 6 - len(used)
        assert all(self.pool.is_free(block) == (block not in used) for block in range(6))


TestPool = PoolMachine.TestCase


def test_the_block_unused_for_longest_goes_first_and_a_prefix_goes_from_its_end() -> None:
    pool = BlockPool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    for block, key in zip(old + new, (b"o1", b"o2", b"n1", b"n2"), strict=True):
        pool.publish(block, key)
    pool.release(old)
    pool.release(new)
    pool.allocate(1)
    assert pool.lookup([b"o1", b"o2"]) == old[:1]
    pool.allocate(2)
    assert pool.lookup([b"o1"]) == [] and pool.lookup([b"n1", b"n2"]) == new[:1]
