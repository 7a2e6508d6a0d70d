"""What is recorded of a step's samples: a record for each completion, and one for its tokens."""

from __future__ import annotations

from typing import Any

from grpo_core.metrics import extracted_and_expected
from grpo_core.step import StepReport


def completion_records(step: int, report: StepReport) -> list[dict[str, Any]]:
    """A record for each sampled completion, for completions.jsonl."""
    extracted, expected = extracted_and_expected(report)
    rollout, samples, G = report.rollout, report.rollout.samples, report.config.group_size
    reward_N, advantage_N = rollout.reward_BG.flatten().tolist(), report.advantage_BG.flatten().tolist()
    lengths_N, truncated_N = samples.rows.completion_len_N.tolist(), samples.truncated_N.tolist()
    return [
        {
            "step": step,
            "row": row,
            "group": row // G,
            "question": rollout.examples[row // G].question,
            "expected": expected[row],
            "response": samples.texts[row],
            "extracted": extracted[row],
            "reward": reward_N[row],
            "rewards": {name: values[row] for name, values in rollout.scores.by_function.items()},
            "advantage": advantage_N[row],
            "tokens": lengths_N[row],
            "truncated": truncated_N[row],
        }
        for row in range(len(expected))
    ]


def token_records(step: int, report: StepReport, pieces: Pieces) -> list[dict[str, Any]]:
    """A record for each sampled completion's tokens, for tokens.jsonl.

    ids      as sampled, the end-of-sequence token included; texts are decoded from them
    pieces   the text of each token; joined, they are the text of the completion
    logps    the sampler's log-probability of each, in nats, to three decimals (+ 0.0: no -0.0)
    kept     a 1 for each token that the row's advantage acted on, else a 0: nothing of a row that --mask_truncated left
             out, no token outside of --top_entropy's share. It does not show clipping, which acts in updates after the
             first (--mu), nor skipped steps.
    """
    samples = report.rollout.samples
    ids_N, logp_NT, kept_NT = samples.rows.completion_ids(), samples.logp_NT.tolist(), report.kept_NT.int().tolist()
    return [
        {
            "step": step,
            "row": row,
            "ids": ids,
            "pieces": pieces(ids),
            "logps": [round(logp, 3) + 0.0 for logp in logp_NT[row][: len(ids)]],
            "kept": "".join(map(str, kept_NT[row][: len(ids)])),
        }
        for row, ids in enumerate(ids_N)
    ]


class Pieces:
    """The text that each token of a completion adds. A token may be a part of a character: then its piece is empty, and
    the token that completes the character has all of it. The pieces always join to the text of all ids.

    >>> from sft_core.model.tiny import build_tokenizer
    >>> tokenizer = build_tokenizer()
    >>> Pieces(tokenizer)(tokenizer("Tom has 3 €").input_ids)
    ['Tom', ' has', ' ', '3', ' ', '', '', '€']
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}

    def __call__(self, ids: list[int]) -> list[str]:
        for id_ in set(ids) - self.known.keys():
            self.known[id_] = self._text([id_])
        pieces, text = [self.known[id_] for id_ in ids], self._text(ids)
        # Not so where a character takes several tokens, nor where a token's text depends on its place.
        return pieces if "".join(pieces) == text else self._one_by_one(ids, text)

    def _one_by_one(self, ids: list[int], text: str) -> list[str]:
        """What each token adds to the text of those before it, of which only the last few are looked at: those since
        the text last ended in a whole character, and the one before."""
        pieces: list[str] = []
        start = whole = 0  # ids[start:whole] are the context of what comes next
        for end in range(1, len(ids) + 1):
            before, now = self._text(ids[start:whole]), self._text(ids[start:end])
            if now.endswith("\N{REPLACEMENT CHARACTER}") or not now.startswith(before):
                pieces.append("")
            else:
                pieces.append(now[len(before) :])
                start, whole = whole, end
        found = "".join(pieces)
        if not text.startswith(found):  # a tokenizer whose texts do not add up
            return [""] * (len(ids) - 1) + [text]
        return [*pieces[:-1], pieces[-1] + text[len(found) :]]

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
