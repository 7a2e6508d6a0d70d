"""Milliseconds a token in different ways of decoding: `python -m benchmarks.sitting.decode [flags of grpo_core.train]`

Eight completions of one prompt: as the sampler draws them, in each of its ways (--decoding), and by transformers alone,
with a cache that grows or one of fixed size (which `generate` compiles on a GPU). A way that fails says so; exit code 1
where it is one of the sampler's.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.workload import workload
from eval.sampling import Sampling, sample
from eval.trust import trusted
from rewards.tables import markdown
from sft_core.cli import user_errors
from sft_core.model.policy import Policy, load_policy

ROWS, PROMPT, NEVER = 8, 100, 10**9
Way = Callable[[Policy, list[int], int], None]


def by_sampler(policy: Policy, prompt: list[int], tokens: int) -> None:
    drawn = sample(policy, [prompt] * ROWS, Sampling(tokens))
    assert int(drawn.rows.completion_len_N.max()) == tokens


def by_generate(cache: str | None) -> Way:
    """transformers' own loop and draw, of a model that is in half precision throughout."""

    def way(policy: Policy, prompt: list[int], tokens: int) -> None:
        ids = torch.tensor([prompt] * ROWS, device=policy.device)
        policy.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=True,
            cache_implementation=cache,
            eos_token_id=NEVER,
            pad_token_id=policy.pad_id,
        )

    return way


def halved(policy: Policy) -> Policy:
    model = copy.deepcopy(policy.model).to(policy.precision.autocast_dtype or torch.float32).eval()
    model.set_attn_implementation("sdpa")
    return replace(policy, model=model)


def milliseconds(way: Way, policy: Policy, tokens: int) -> float:
    """Of a token after the first: two lengths, of which the difference counts."""
    prompt = [5 + place % 50 for place in range(PROMPT)]
    seconds = []
    for count in (tokens // 4, tokens):
        start = time.perf_counter()
        way(policy, prompt, count)
        if policy.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1000 * (seconds[1] - seconds[0]) / (tokens - tokens // 4)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="of all ways in turn, after one in which they compile")
    given, flags = parser.parse_known_args()
    with user_errors():
        config = workload("qwen-0.5b", ["--precision", "auto", *flags, "--gradient_checkpointing", "False"])
    # No token ends a completion, and the batch stays as it is. Ways are tried here, whatever the model's trial says.
    policy = replace(trusted(load_policy(config)), eos_ids=(NEVER,))
    plain = halved(policy)
    ways: dict[str, tuple[Policy, Way]] = {
        "sampler, segments": (replace(policy, decoding="segments"), by_sampler),
        "sampler, compiled": (replace(policy, decoding="compiled"), by_sampler),
        "sampler, paged": (replace(policy, decoding="paged"), by_sampler),
        "generate, growing cache": (plain, by_generate(None)),
        "generate, static cache": (plain, by_generate("static")),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    failures: dict[str, str] = {}
    for _ in range(1 + given.rounds):
        for name, (of_way, way) in ways.items():
            if name not in failures:
                try:
                    found[name].append(milliseconds(way, of_way, given.tokens))
                except Exception as error:
                    traceback.print_exc()
                    failures[name] = f"failed: {type(error).__name__}"
    rows = [["way", "ms a token, median"]]
    rows += [[name, failures.get(name) or f"{statistics.median(times[1:]):.2f}"] for name, times in found.items()]
    failed = [name for name in failures if ways[name][1] is by_sampler]
    print(f"{ROWS} rows, {policy.precision.name}, {policy.device}\n\n{markdown(rows)}\n")
    print(f"figure: {'; '.join(' '.join(row) for row in rows[1:])}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
