"""Which blocks of a storage are whose."""

from __future__ import annotations

from dataclasses import dataclass


class BlockPool:
    """Blocks with reference counts. One that nobody holds keeps its digest, if it has one, until it is needed.

    Attributes:
        refs: how many sequences hold each block.
        evictions: blocks with a digest that were given away all the same, the one longest unused first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.refs = [0] * num_blocks
        self.evictions = 0
        self._blank = list(range(num_blocks))[::-1]
        self._waiting: dict[int, None] = {}  # unheld, with a digest; the oldest first
        self._digests: list[bytes | None] = [None] * num_blocks
        self._blocks: dict[bytes, int] = {}
        self._promised = 0

    @property
    def available(self) -> int:
        """Blocks that can be taken without breaking a promise."""
        return len(self._blank) + len(self._waiting) - self._promised

    @property
    def used(self) -> int:
        return self.num_blocks - len(self._blank) - len(self._waiting)

    @property
    def waiting(self) -> int:
        """Blocks that nobody holds, but may be found."""
        return len(self._waiting)

    def take(self) -> int:
        """A block to write to, held once."""
        if self._blank:
            block = self._blank.pop()
        else:
            block = next(iter(self._waiting))
            del self._waiting[block]
            self.forget(block)
            self.evictions += 1
        self.refs[block] = 1
        return block

    def hold(self, block: int) -> None:
        self._waiting.pop(block, None)
        self.refs[block] += 1

    def release(self, block: int) -> None:
        self.refs[block] -= 1
        if not self.refs[block]:
            if self._digests[block] is None:
                self._blank.append(block)
            else:
                self._waiting[block] = None

    def register(self, block: int, digest: bytes) -> None:
        """`block` can be found by `digest` from now on, unless another one already is."""
        if digest not in self._blocks:
            self._blocks[digest], self._digests[block] = block, digest

    def forget(self, block: int) -> None:
        """`block` is found no more."""
        if (digest := self._digests[block]) is not None:
            del self._blocks[digest]
            self._digests[block] = None

    def find(self, digest: bytes) -> int | None:
        return self._blocks.get(digest)

    def promise(self, count: int) -> Promise:
        self._promised += count
        return Promise(self, count)

    def _keep(self, count: int) -> None:
        self._promised -= count


@dataclass(eq=False)
class Promise:
    """Blocks that a sequence will need for certain, and that nobody else gets; it may take more if there are any."""

    pool: BlockPool
    count: int

    def affords(self, blocks: int) -> bool:
        return blocks <= self.count + self.pool.available

    def take(self) -> int:
        if self.count:
            self.count -= 1
            self.pool._keep(1)
        return self.pool.take()

    def end(self) -> None:
        self.pool._keep(self.count)
        self.count = 0
