"""One family: its sampler, learner and gradient beside the plain model's, and two steps of the real program.

The plain model reads one row at a time, without padding, mask or cache. Texts are longer than the small models'
sliding windows, so that what is wrong about those shows.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import grpo_core.train
from benchmarks.families.build import small_config, small_model
from eval.samples import Sampling
from eval.sampling import sample
from eval.trust import trusted
from sft_core.config import ModelConfig
from sft_core.errors import Refused
from sft_core.learn.logprobs import token_logprobs
from sft_core.learn.rows import Rows
from sft_core.learn.trust import largest_difference, plain_logits, plain_logprobs, probe_rows
from sft_core.model.policy import Policy, load_policy
from sft_core.model.source import find_source
from sft_core.model.tiny import build_tokenizer

PROMPTS, COMPLETIONS, TOKENS = (19, 11), ((9, 4, 6), (5, 9)), 12
# Nats, and for the gradient its relative error: a hundred times the roundings of float32.
BOUND = 1e-3
SHORTCUTS = {"split_head": "head", "prefill": "prefill", "rows_leave": "leaving", "pads": "padding", "cached": "cache"}
WITHOUT = {"sequence": [], "groups": ["segments"], "rows": ["segments", "packing"]}  # by layout
RUN = ["--task", "arithmetic", "--prompt_format", "hash", "--system_prompt", "", "--max_prompt_tokens", "90"]
RUN += ["--device", "cpu", "--precision", "float32", "--no_progress", "--no_tensorboard", "--eval_problems", "0"]
RUN += ["--prompts_per_step", "2", "--group_size", "3", "--max_completion_tokens", "12", "--max_steps", "2"]
RUN += ["--beta", "0.04", "--lr", "1e-3", "--rewards", "benchmarks.families.judge:varied"]


@dataclass
class Verdict:
    """What was found about one family. Distances in nats, the gradient's relative; NaN where it did not come to it."""

    family: str
    parameters: int = 0
    sampler: float = math.nan
    learner: float = math.nan
    gradient: float = math.nan
    greedy: float = math.nan
    full: float = math.nan  # `sampler_gap_max` of two steps of GRPO
    lora: float = math.nan
    kl: float = math.nan  # at the second step; NaN: the real program was not run
    off: list[str] = field(default_factory=list)  # shortcuts that the family does without
    seconds: float = 0.0
    unbuilt: str = ""
    refused: str = ""
    broken: str = ""

    @property
    def kind(self) -> str:
        if self.unbuilt or self.refused or self.broken:
            return "not built" if self.unbuilt else "refused" if self.refused else "BROKEN"
        distances, moved = [self.sampler, self.learner, self.gradient, self.greedy], True
        if not math.isnan(self.kl):
            distances, moved = [*distances, self.full, self.lora], self.kl > 0
        return "right" if moved and all(distance <= BOUND for distance in distances) else "WRONG"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "kind": self.kind}


def varied(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float]:
    """A reward that differs from row to row."""
    return [row / len(completions) for row in range(len(completions))]


def judged(family: str, run: bool = True) -> Verdict:
    """Build the family's small model, write it to a folder as a user's would be, and try everything; the real program
    only where `run` says so."""
    verdict, start = Verdict(family), time.perf_counter()
    with warnings.catch_warnings(), TemporaryDirectory() as scratch, contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        folder = Path(scratch) / "model"
        try:
            verdict.parameters = _saved(family, folder)
        except Exception as error:  # a library's, of any kind
            verdict.unbuilt = _one_line(error)
            return verdict
        try:
            _compare(verdict, folder)
            if run:
                verdict.full, verdict.kl = _two_steps(folder, Path(scratch) / "full")
                verdict.lora, _ = _two_steps(folder, Path(scratch) / "lora", "--lora", "--lora_r", "4")
        except Refused as error:
            verdict.refused = " ".join(str(error).replace(str(folder), "FOLDER").split())[:300]
        except Exception as error:
            verdict.broken = _one_line(error)
    verdict.seconds = time.perf_counter() - start
    return verdict


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _saved(family: str, folder: Path) -> int:
    """The number of parameters."""
    tokenizer = build_tokenizer()
    ids = {
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = small_model(small_config(family, len(tokenizer), ids))
    with torch.no_grad():
        logits = model(input_ids=torch.arange(30)[None], use_cache=False).logits
    if logits.shape != (1, 30, len(tokenizer)) or not logits.isfinite().all():
        raise ValueError(f"its logits have shape {tuple(logits.shape)}, and {int(logits.isnan().sum())} are NaN")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def _compare(verdict: Verdict, folder: Path) -> None:
    config = ModelConfig(model=str(folder), device="cpu", precision="float32")
    try:
        policy = trusted(load_policy(config, find_source(config)))
    except ValueError as error:
        raise Refused(str(error)) from error
    verdict.off = WITHOUT[policy.layout] + [name for flag, name in SHORTCUTS.items() if not getattr(policy, flag)]
    verdict.off += ["joining"] * (policy.prefill and policy.rows_leave and not policy.rows_join)
    rows = probe_rows(policy, PROMPTS, COMPLETIONS, seed=1)

    torch.manual_seed(1)
    often = replace(policy, eos_ids=(*policy.eos_ids, *range(5, policy.vocabulary, 9)))
    drawn = sample(often, rows.prompt_ids(), Sampling(TOKENS), at_once=3)  # two of the five wait
    verdict.sampler = largest_difference(drawn.logp_NT, plain_logprobs(policy, drawn.rows), drawn.rows)
    best = sample(policy, rows.prompt_ids(), Sampling(TOKENS, temperature=0)).rows
    verdict.greedy = _short_of_the_best(policy, best)
    verdict.learner, verdict.gradient = _learner(policy, rows)


@torch.no_grad()
def _short_of_the_best(policy: Policy, rows: Rows) -> float:
    """By how much the plain model's logit of a greedily drawn token is below its largest, at most."""
    short = 0.0
    for logits_TV, ids in zip(plain_logits(policy, rows), rows.completion_ids(), strict=True):
        chosen_T = logits_TV.gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
        short = max(short, float((logits_TV.max(dim=-1).values - chosen_T).max()))
    return short


def _learner(policy: Policy, rows: Rows) -> tuple[float, float]:
    """Largest distance of a log-probability, and the relative distance of the gradient of a weighted sum of them."""
    weight_NT = torch.randn(rows.mask_NT.shape, generator=torch.Generator().manual_seed(2))
    mine_NT, _ = token_logprobs(policy, rows, entropy="none")
    mine = _gradient(policy, (mine_NT * weight_NT)[rows.mask_NT].sum())
    plain = [
        logits_TV.log_softmax(dim=-1).gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
        for logits_TV, ids in zip(plain_logits(policy, rows), rows.completion_ids(), strict=True)
    ]
    plain_M = torch.cat(plain)
    truth = _gradient(policy, (plain_M * weight_NT[rows.mask_NT]).sum())
    apart = float((mine_NT[rows.mask_NT] - plain_M).detach().abs().max())
    return apart, float((mine - truth).norm() / truth.norm())


def _gradient(policy: Policy, loss: Tensor) -> Tensor:
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


def _two_steps(folder: Path, run: Path, *flags: str) -> tuple[float, float]:
    """Largest difference of sampler and learner, and the KL of the second step, of the real program.

    Raises:
        Refused: it ended with its one line.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            grpo_core.train.main(["--model", str(folder), "--output_dir", str(run), *RUN, *flags])
        except SystemExit as end:
            raise Refused(said.getvalue().strip()) from end
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    gaps = [step["sampler_gap_max"] for step in steps if step["kind"] == "train"]
    return max(gaps), steps[-1]["kl"]
