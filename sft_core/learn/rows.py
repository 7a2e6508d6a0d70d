"""Token rows: prompts padded on the left, completions on the right, and only lengths to tell padding from tokens.

The shape legend of the whole project. A tensor's name ends in its shape:

    B  prompts in a step          N  rows, one per completion: N = B * G      V  vocabulary size
    G  completions per prompt     P  prompt tokens, padded                    D  hidden size
                                  T  completion tokens, padded                L  P + T
    K  reward functions           R  packed rows (sft_core.learn.layout)    M  completion tokens without padding

How a row lies in memory (P = 4, T = 3; `.` is padding, the row's lengths are 3 and 2):

    ids_NL           .  q  q  q  a  e  .        e: the end-of-sequence token, part of the completion and trained
    mask_NT                      1  1  0

Masks come from the two length vectors, never from the padding id: most tokenizers pad with the very token that ends a
sequence, and a mask made from ids would then hide the token that says "stop".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sft_core.learn import ranks
from sft_core.model.sending import sent


@dataclass(frozen=True)
class Tokens:
    """A micro-batch's size in tokens instead of rows: prompts and completions, and with padding where rows lie apart,
    else a prompt that consecutive rows share once."""

    count: int
    padded: bool = False


LARGEST = Tokens(2**14)  # more in a micro-batch make no step faster


@dataclass(frozen=True)
class Rows:
    """N prompt-completion pairs. `ids_NL` int64; `prompt_len_N` and `completion_len_N` int64, in tokens."""

    ids_NL: Tensor
    prompt_len_N: Tensor
    completion_len_N: Tensor
    prompt_width: int  # P

    def __len__(self) -> int:
        return self.ids_NL.shape[0]

    @property
    def completion_NT(self) -> Tensor:
        return self.ids_NL[:, self.prompt_width :]

    @property
    def mask_NT(self) -> Tensor:
        """True on the completion's own tokens, its end-of-sequence token included.

        >>> pack_rows([[5, 6], [7]], [[8, 2], [2]], pad_id=2).mask_NT.tolist()
        [[True, True], [True, False]]
        """
        position_T = torch.arange(self.completion_NT.shape[1], device=self.ids_NL.device)
        return position_T < self.completion_len_N[:, None]

    @cached_property
    def lists(self) -> list[tuple[list[int], list[int]]]:
        """Each row's prompt and completion without padding; read from the device once, also for the rows' parts."""
        lengths_N2, P = torch.stack([self.prompt_len_N, self.completion_len_N], dim=1), self.prompt_width
        table = torch.cat([lengths_N2, self.ids_NL], dim=1).tolist()
        return [(ids[P - before : P], ids[P : P + after]) for before, after, *ids in table]

    def prompt_ids(self) -> list[list[int]]:
        """Each row's prompt without padding."""
        return [prompt for prompt, _ in self.lists]

    def completion_ids(self) -> list[list[int]]:
        """Each row's completion without padding.

        >>> rows = pack_rows([[5, 6], [7]], [[8, 2], [2]], pad_id=2)
        >>> rows.prompt_ids(), rows.completion_ids()
        ([[5, 6], [7]], [[8, 2], [2]])
        """
        return [completion for _, completion in self.lists]

    def to(self, device: torch.device) -> Rows:
        """These rows, which are on the CPU, on the device as well: what they are is known here without asking there."""
        ids_NL, prompt_len_N = sent(self.ids_NL, device), sent(self.prompt_len_N, device)
        there = Rows(ids_NL, prompt_len_N, sent(self.completion_len_N, device), self.prompt_width)
        vars(there)["lists"] = self.lists
        return there

    def without_completions(self, left_out_N: Tensor) -> Rows:
        """The same rows, some of them with a completion of length 0: their tokens become padding."""
        return replace(self, completion_len_N=torch.where(left_out_N, 0, self.completion_len_N))

    def cut(self, start: int, stop: int) -> Rows:
        """Rows start to stop - 1, cut to their own longest prompt and completion, so that a micro-batch computes no
        padding of longer rows."""
        prompt_len_N, completion_len_N = self.prompt_len_N[start:stop], self.completion_len_N[start:stop]
        lists = self.lists[start:stop]
        width, T = max(len(prompt) for prompt, _ in lists), max(1, *(len(completion) for _, completion in lists))
        ids_NL = self.ids_NL[start:stop, self.prompt_width - width : self.prompt_width + T]
        part = Rows(ids_NL, prompt_len_N, completion_len_N, width)
        vars(part)["lists"] = lists
        return part

    def micro_batches(self, size: int | Tokens) -> Iterator[tuple[slice, Rows]]:
        """Cut into micro-batches of at most `size`: of as many rows, the last may have fewer (`size` need not divide
        N); or of as many tokens, about equally many in each. A row of more tokens than that is one by itself.
        Under torchrun: those of this rank's part, all parts having about as many tokens."""
        for start, stop in itertools.pairwise(self.ends(self.part(ranks.rank(), ranks.world()), size)):
            yield slice(start, stop), self.cut(start, stop)

    def gathered(self, found_NT: Tensor, phase: str) -> Tensor:
        """(N, ...) of which each rank has found its part of the rows: all of it."""
        if ranks.world() == 1:
            return found_NT
        part, mine_NT = self.part(ranks.rank(), ranks.world()), torch.zeros_like(found_NT)
        mine_NT[part.start : part.stop] = found_NT[part.start : part.stop]
        return ranks.whole(mine_NT, phase)

    def part(self, number: int, count: int) -> range:
        """The rows of one of `count` parts that stand one behind the other, about equal in tokens.

        >>> rows = pack_rows([[1], [1], [1]], [[3, 4, 5], [6], [7]], pad_id=0)
        >>> [list(rows.part(number, 2)) for number in range(2)]
        [[0], [1, 2]]
        """
        N, ends = len(self), [0]
        if count == 1:
            return range(N)
        tokens = self.tokens(False)
        for i in range(1, count):
            aim, within = tokens(0, N) * i / count, range(ends[-1] + 1, N - (count - i) + 1)
            ends.append(min(within, key=lambda end: abs(tokens(0, end) - aim), default=ends[-1]))
        ends.append(N)
        return range(ends[number], ends[number + 1])

    def fullness(self, size: int | Tokens) -> dict[str, float]:
        """For the log: how many micro-batches there are, and what share of the allowed size they have in the mean."""
        held = (lambda start, stop: stop - start) if isinstance(size, int) else self.tokens(size.padded)
        ends, most = self._ends(size), size if isinstance(size, int) else size.count
        count = len(ends) - 1
        return {"micro_batches": count, "micro_batch_fill": sum(map(held, ends, ends[1:])) / (count * most)}

    def ends(self, part: range, size: int | Tokens) -> list[int]:
        """Where micro-batches of this size begin in a part of the rows, and where the last ends."""
        if len(part) in (0, len(self)):
            return self._ends(size) if part else [0]
        return [part.start + end for end in self.cut(part.start, part.stop)._ends(size)]

    def _ends(self, size: int | Tokens) -> list[int]:
        if isinstance(size, int):
            return [*range(0, len(self), size), len(self)]
        tokens, N = self.tokens(size.padded), len(self)

        def filled(most: int) -> list[int]:
            ends = [0]
            for row in range(1, N):
                if tokens(ends[-1], row + 1) > most:
                    ends.append(row)
            return [*ends, N]

        if tokens(0, N) <= size.count:
            return [0, N]
        fewest, least, most = len(filled(size.count)), 0, size.count
        while least < most:  # the smallest size that needs no more of them makes them about equal
            middle = (least + most) // 2
            least, most = (least, middle) if len(filled(middle)) == fewest else (middle + 1, most)
        return filled(most)

    def tokens(self, padded: bool) -> Callable[[int, int], int]:
        """How many tokens rows start to stop - 1 are; see `Tokens`."""
        P, T = [len(prompt) for prompt, _ in self.lists], [len(completion) for _, completion in self.lists]
        if padded:
            return lambda start, stop: (stop - start) * (max(P[start:stop]) + max(T[start:stop]))
        again = [False, *(own == before for (before, _), (own, _) in itertools.pairwise(self.lists))]
        own = (t + (0 if shared else p) for p, t, shared in zip(P, T, again, strict=True))
        until = list(itertools.accumulate(own, initial=0))
        return lambda start, stop: until[stop] - until[start] + (P[start] if again[start] else 0)


def pad(sequences: Sequence[Sequence[int]], pad_id: int, side: str) -> Tensor:
    """Token lists as one int64 matrix padded on `side`.

    >>> pad([[1, 2], [3]], pad_id=0, side="left").tolist()
    [[1, 2], [0, 3]]
    """
    width = max(map(len, sequences))
    missing = [[pad_id] * (width - len(ids)) for ids in sequences]
    pairs = zip(missing, sequences, strict=True) if side == "left" else zip(sequences, missing, strict=True)
    return torch.tensor([[*first, *second] for first, second in pairs], dtype=torch.long)


def pack_rows(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int) -> Rows:
    """Rows from token lists, on the CPU."""
    prompt_NP, completion_NT = pad(prompts, pad_id, "left"), pad(completions, pad_id, "right")
    lengths = torch.tensor([len(p) for p in prompts]), torch.tensor([len(c) for c in completions])
    return Rows(torch.cat([prompt_NP, completion_NT], dim=1), *lengths, prompt_NP.shape[1])
