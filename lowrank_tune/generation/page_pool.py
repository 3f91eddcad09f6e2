"""Which pages of a paged key-value cache belong to which sequence. Contains no tensors.

The full pages of a prompt are shared by the sequences of its samples. Everything after them, from the prompt's last,
partly filled page on, is in pages that a single sequence writes.
"""

from __future__ import annotations

from dataclasses import dataclass

SCRATCH_PAGE = 0
"""The page of slots without a sequence, whose tokens are not read."""


@dataclass
class SharedPages:
    """The full pages of a prompt, and the number of sequences that read them."""

    pages: list[int]
    users: int = 0


@dataclass
class SequencePages:
    """The pages of a sequence, in the order of its tokens: the shared ones, then its own."""

    shared: SharedPages
    own: list[int]

    @property
    def pages(self) -> list[int]:
        return self.shared.pages + self.own


class PagePool:
    """The pages 1 to `num_pages` of a cache; each sequence has at most `pages_per_sequence` of them, by its slot."""

    def __init__(
        self,
        num_pages: int,
        pages_per_sequence: int,
    ) -> None:
        self.pages_per_sequence = pages_per_sequence
        self.free = list(range(num_pages, SCRATCH_PAGE, -1))
        self.slots: dict[int, SequencePages] = {}

    def sequences_that_fit(
        self,
        num_full_pages: int,
        shared: SharedPages | None,
    ) -> int:
        """Returns how many sequences of a prompt with `num_full_pages` fit into the free pages. `shared` are the pages
        that contain the prompt already, or None."""
        num_free = len(self.free)
        if not _is_stored(shared):
            num_free -= num_full_pages
        own = self.pages_per_sequence - num_full_pages
        return max(0, num_free // own)

    def store_prompt(
        self,
        num_full_pages: int,
        shared: SharedPages | None,
    ) -> tuple[SharedPages, bool]:
        """Returns the pages of a prompt, and whether they are new, so that the prompt must be copied into them."""
        if shared is not None and _is_stored(shared):
            return shared, False
        return SharedPages(self._take(num_full_pages)), True

    def add(
        self,
        slot: int,
        shared: SharedPages,
    ) -> SequencePages:
        """Assigns pages to the sequence in a slot, after those of its prompt."""
        self.release(slot)
        sequence = SequencePages(shared, self._take(self.pages_per_sequence - len(shared.pages)))
        shared.users += 1
        self.slots[slot] = sequence
        return sequence

    def move(
        self,
        source: int,
        target: int,
    ) -> None:
        """Moves a sequence to another slot, whose own sequence has ended."""
        self.release(target)
        self.slots[target] = self.slots.pop(source)

    def release(self, slot: int) -> None:
        """Frees the pages of the sequence in a slot, if it has one; those of its prompt if no other reads them."""
        sequence = self.slots.pop(slot, None)
        if sequence is None:
            return
        self.free += reversed(sequence.own)
        sequence.shared.users -= 1
        if not sequence.shared.users:
            self.free += reversed(sequence.shared.pages)

    def table(self, slot: int) -> list[int]:
        """Returns the pages of a slot in the order of its columns; the scratch page for a slot without a sequence."""
        if slot in self.slots:
            return self.slots[slot].pages
        return [SCRATCH_PAGE] * self.pages_per_sequence

    def _take(self, count: int) -> list[int]:
        assert count <= len(self.free), "more pages than `sequences_that_fit` allows"
        return [self.free.pop() for _ in range(count)]


def _is_stored(shared: SharedPages | None) -> bool:
    """Returns whether these pages contain their prompt. They are free again when its last sequence has ended."""
    return shared is not None and shared.users > 0


def pages_that_fit(
    slots: int,
    pages_per_sequence: int,
    page_bytes: int,
    limit: int,
) -> int:
    """Returns the number of pages for `slots` sequences, all of which fit `limit` bytes with the scratch page; at least
    those of one sequence. A fifth of the bytes is left for prompts that wait for their slots."""
    affordable = limit * 4 // 5 // page_bytes - 1
    return max(pages_per_sequence, min(slots * pages_per_sequence, affordable))
