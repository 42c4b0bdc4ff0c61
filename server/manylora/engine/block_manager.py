"""Blocks of the key-value cache: who holds them, and which hold a prefix that can be used again.

Full blocks are known by a hash of everything that determines their content (the mix of adapters, every token
before, and their own) and of who may use them again. How much of a prompt was known, and so how soon it is answered,
tells its sender that somebody has asked the same, so a block is found again by its own tenant only. A block nobody
holds keeps its content, and its hash, until it is handed out again, least recently used first.
"""

from array import array
from collections import OrderedDict
from hashlib import blake2b
from secrets import token_bytes
from typing import Final

from manylora.engine.interface import Mix
from manylora.engine.sequence import Sequence
from manylora.engine.snapshots import Snapshots

_VIRTUAL: Final = -1  # stands for a virtual token


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` positions.

    Blocks are shared within a tenant, or among those who send the same salt. With `share_public`, everybody shares
    those of the base and of public adapters; with `share_prefixes` false, one request does (its `n` choices).
    `num_states`: of so many sequences layers keep a state, in a slot that a sequence has as long as it has blocks. A
    prefix is found again then as far as there is a copy of the states at its end: of prompts at two multiples of
    `border` tokens (whole blocks, and whole pieces of a prompt), in one of `num_snapshots` rooms of
    `snapshot_bytes` each.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        share_prefixes: bool = True,
        share_public: bool = False,
        num_states: int = 0,
        border: int = 0,
        num_snapshots: int = 0,
        snapshot_bytes: int = 0,
    ) -> None:
        assert not num_snapshots or (border and not border % block_size)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._share_prefixes = share_prefixes
        self._share_public = share_public
        self._secret = token_bytes(16)  # so that nobody can work out prompts with the same hash beforehand
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict((b, None) for b in range(num_blocks))
        self._spoiled: set[int] = set()  # held, and what they hold may be wrong
        self._has_states = num_states > 0
        self._free_states = list(range(num_states))
        self._border = border
        self.snapshots = Snapshots(num_snapshots, snapshot_bytes)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_needed(self, seq: Sequence, num_tokens: int) -> int:
        """New blocks so that `num_tokens` tokens have room."""
        return max(0, self._blocks_of(seq, num_tokens) - len(seq.block_table))

    def _blocks_of(self, seq: Sequence, num_tokens: int) -> int:
        """Blocks of the sequence's first `num_tokens` tokens and the virtual ones before them."""
        return -(-(seq.num_virtual + num_tokens) // self.block_size)

    def take_prefix(self, seq: Sequence) -> int:
        """Give a sequence without blocks what the cache knows of its tokens; returns how many tokens that are.

        At least one token is always left to run, since its logits are wanted.
        """
        assert not seq.block_table
        known = self._known_blocks(seq)
        if self._has_states:
            del known[self._with_states(seq, len(known)) :]
        for block in known:
            if not self._ref_counts[block]:
                del self._free[block]
            self._ref_counts[block] += 1
            seq.block_table.append(block)
        seq.num_computed = len(seq.block_table) * self.block_size - seq.num_virtual
        return max(0, seq.num_computed)

    def _known_blocks(self, seq: Sequence) -> list[int]:
        """The blocks in which the sequence's first tokens are."""
        if self._has_states and not self.snapshots.count:
            return []
        most = seq.num_virtual if seq.needs_whole_prompt else seq.num_virtual + seq.num_tokens - 1
        if self._has_states:  # behind its prompt, tokens are run otherwise than another's prompt is
            most = min(most, seq.num_prompt_tokens)
        known: list[int] = []
        for i in range(most // self.block_size):
            block = self._block_of.get(self._hash(seq, i))
            if block is None:
                break
            known.append(block)
        return known

    def _with_states(self, seq: Sequence, num_known: int) -> int:
        """How many of a sequence's known blocks come before a copy of the states, which the sequence begins with.

        Other copies are to be made where its prompt leaves what is known, for those that do so next, and at its end.
        """
        if not self.snapshots.count:
            return 0
        size = self._border // self.block_size
        keys = [self._hash(seq, size * number - 1) for number in range(1, num_known // size + 1)]
        found = next((number for number in range(len(keys), 0, -1) if self.snapshots.has(keys[number - 1])), 0)
        if found:
            seq.begins_with = self.snapshots.hold(keys[found - 1])
        ends = {len(keys), (seq.num_prompt_tokens - 1) // self._border}
        seq.snapshots = {number * self._border: None for number in sorted(ends) if number > found}
        return found * size

    def reserve_snapshots(self, seq: Sequence, end: int) -> None:
        """Rooms for copies of the sequence's states that are to be made up to place `end`, as far as there are any."""
        for at, room in seq.snapshots.items():
            if room is None and seq.num_computed < at <= end:
                seq.snapshots[at] = self.snapshots.reserve()

    def allocate(self, seq: Sequence, num_tokens: int) -> bool:
        """Room for the sequence's first `num_tokens` tokens; False, and nothing changed, when there is none."""
        needed = self.blocks_needed(seq, num_tokens)
        if needed > len(self._free):
            return False
        if self._has_states and seq.state_slot < 0:
            seq.state_slot = self._free_states.pop()
        for _ in range(needed):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._ref_counts[block] = 1
            seq.block_table.append(block)
        return True

    def mark_computed(self, seq: Sequence) -> None:
        """Make the sequence's full blocks known, now that their keys and values are written."""
        known = (seq.num_virtual + seq.num_computed) // self.block_size
        if self._has_states:
            self.snapshots.num_hits += seq.begins_with >= 0
            self._end_beginning(seq)
            known = self._num_bordered(seq) // self.block_size
        for i in range(len(seq.block_hashes), known):
            self._hash(seq, i)
        for i in range(known - 1, -1, -1):
            block, key = seq.block_table[i], seq.block_hashes[i]
            if self._hash_of[block] == key:
                break
            if self._hash_of[block] is None and key not in self._block_of and block not in self._spoiled:
                self._hash_of[block] = key
                self._block_of[key] = block
        if seq.snapshots:
            self._keep_snapshots(seq)

    def _num_bordered(self, seq: Sequence) -> int:
        """How many of the sequence's tokens were run in whole pieces, as in any prompt that begins with them."""
        computed = min(seq.num_computed, seq.num_prompt_tokens)
        return computed // self._border * self._border if self._border else 0

    def _end_beginning(self, seq: Sequence) -> None:
        """The copy that the sequence began with is needed for it no more."""
        if seq.begins_with >= 0:
            self.snapshots.let_go(seq.begins_with)
            seq.begins_with = -1

    def _keep_snapshots(self, seq: Sequence) -> None:
        for at, room in [(at, room) for at, room in seq.snapshots.items() if at <= seq.num_computed]:
            del seq.snapshots[at]
            last = at // self.block_size - 1
            block, key = seq.block_table[last], seq.block_hashes[last]
            if room is None:
                continue
            if block in self._spoiled or self.snapshots.has(key):
                self.snapshots.give_back(room)
                continue
            other = self._block_of.get(key, block)
            if other != block:  # another sequence's: a copy goes with the block of who made it, should that go bad
                self._hash_of[other] = None
                self._hash_of[block], self._block_of[key] = key, block
            self.snapshots.keep(key, room)

    def spoil(self, seq: Sequence) -> None:
        """What the sequence's blocks hold may be wrong: whoever has them keeps them, and nobody finds them again."""
        for block in seq.block_table:
            self._forget(block)
            self._spoiled.add(block)

    def free(self, seq: Sequence) -> None:
        """Take all blocks back. Ends are handed out again before beginnings, which more prompts share."""
        self.shrink(seq, 0)
        seq.num_computed = -seq.num_virtual
        if seq.state_slot >= 0:
            self._free_states.append(seq.state_slot)
            seq.state_slot = -1
        self._end_beginning(seq)
        for room in seq.snapshots.values():
            if room is not None:
                self.snapshots.give_back(room)
        seq.snapshots = {}

    def shrink(self, seq: Sequence, num_tokens: int) -> None:
        """Take back the blocks behind those of the sequence's first `num_tokens` tokens."""
        kept = self._blocks_of(seq, num_tokens) if num_tokens else 0
        for block in reversed(seq.block_table[kept:]):
            self._ref_counts[block] -= 1
            if not self._ref_counts[block]:
                self._spoiled.discard(block)
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)
        del seq.block_table[kept:]

    def _hash(self, seq: Sequence, i: int) -> bytes:
        """Hash of the sequence's block i, which must be full of tokens. Virtual ones are known by their adapter."""
        while len(seq.block_hashes) <= i:
            n = len(seq.block_hashes)
            before = seq.block_hashes[-1] if n else self._root(seq)
            if seq.acts_from and n * self.block_size <= seq.acts_from < (n + 1) * self.block_size:
                before += seq.mix.key.encode("utf-8", "surrogatepass")  # what was the base's ends here
            begin, end = n * self.block_size - seq.num_virtual, (n + 1) * self.block_size - seq.num_virtual
            virtual = [_VIRTUAL] * (min(end, 0) - min(begin, 0))
            tokens = array("q", virtual + seq.tokens[max(begin, 0) : max(end, 0)])
            seq.block_hashes.append(blake2b(before + tokens.tobytes(), digest_size=16).digest())
        return seq.block_hashes[i]

    def _root(self, seq: Sequence) -> bytes:
        mix = Mix() if seq.acts_from else seq.mix
        parts = (mix.key, *self._sharers(seq, mix))
        return self._secret + "".join(f"{len(part)}:{part}" for part in parts).encode("utf-8", "surrogatepass")

    def _sharers(self, seq: Sequence, mix: Mix) -> tuple[str, str]:
        """Who may use the sequence's blocks again: a kind of group, and which one."""
        if not self._share_prefixes:
            return "request", seq.request_id
        if seq.cache_salt is not None:
            return "salt", seq.cache_salt
        if self._share_public and mix.is_public:
            return "everybody", ""
        return "tenant", seq.tenant

    def _forget(self, block: int) -> None:
        key = self._hash_of[block]
        if key is not None:
            self._hash_of[block] = None
            del self._block_of[key]
            if self.snapshots.count:
                self.snapshots.forget(key)

    def check_integrity(self, sequences: list[Sequence]) -> None:
        """Free and used add up, and every count is the number of sequences that hold the block."""
        held = [0] * self.num_blocks
        slots = [seq.state_slot for seq in sequences if seq.state_slot >= 0]
        assert len({*slots, *self._free_states}) == len(slots) + len(self._free_states)
        self.snapshots.check_integrity(
            [room for seq in sequences for room in seq.snapshots.values() if room is not None],
            [seq.begins_with for seq in sequences if seq.begins_with >= 0],
        )
        for seq in sequences:
            assert not self._has_states or (seq.state_slot >= 0) == bool(seq.block_table)
            assert len(set(seq.block_table)) == len(seq.block_table)
            assert not seq.num_computed or self._blocks_of(seq, seq.num_computed) <= len(seq.block_table)
            for block in seq.block_table:
                held[block] += 1
        assert held == self._ref_counts
        assert all(held[b] and self._hash_of[b] is None for b in self._spoiled)
        assert set(self._free) == {b for b, count in enumerate(held) if not count}
        assert {b: h for h, b in self._block_of.items()} == {b: h for b, h in enumerate(self._hash_of) if h is not None}
