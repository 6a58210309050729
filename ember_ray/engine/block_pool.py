"""KV blocks: who holds them, and which hold a known prefix under a known policy version."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def prefix_keys(token_ids: Sequence[int], block_size: int, policy_version: int) -> list[bytes]:
    """One key for each block of a prompt; it names all tokens up to the block's end and the policy version.

    A key is a 128-bit digest chained over blocks, so equal keys mean equal prefixes under equal weights. The last
    block may be partly filled: its key is that of this very prompt and no longer one.
    """
    keys = []
    parent = blake2b(policy_version.to_bytes(8, "little"), digest_size=16).digest()
    tokens = array("q", token_ids)
    data, size = tokens.tobytes(), block_size * tokens.itemsize
    for start in range(0, len(data), size):
        parent = blake2b(parent + data[start : start + size], digest_size=16).digest()
        keys.append(parent)
    return keys


class BlockPool:
    """Blocks 0 to num_blocks - 1 with reference counts and the prefix index.

    A block without holders keeps its contents and its place in the index until it is handed out again; the one
    unused for longest goes first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._index: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def lookup(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix of keys, without taking them."""
        found = []
        for key in keys:
            block = self._index.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def is_free(self, block: int) -> bool:
        return self._holders[block] == 0

    def hold(self, blocks: Iterable[int]) -> None:
        """Adds a holder to blocks that :meth:`lookup` found."""
        for block in blocks:
            self._free.pop(block, None)
            self._holders[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Takes count blocks with one holder each; what they held is forgotten.

        Raises:
            MemoryError: fewer are free; nothing is taken.
        """
        if count > len(self._free):
            raise MemoryError(f"{count} KV blocks wanted, {len(self._free)} of {self.num_blocks} are free")
        taken = []
        for _ in range(count):
            block, _none = self._free.popitem(last=False)
            key = self._key_of[block]
            if key is not None:
                del self._index[key]
                self._key_of[block] = None
            self._holders[block] = 1
            taken.append(block)
        return taken

    def publish(self, block: int, key: bytes) -> None:
        """Enters a held block into the index; the first block of a key stays the one that is found."""
        if key not in self._index:
            self._index[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Gives up one hold of each; later blocks of a prefix are reused before earlier ones."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None

    def forget(self) -> None:
        """Empties the index: no block is found any more. For when a planned step was never computed."""
        self._index.clear()
        self._key_of = [None] * self.num_blocks
