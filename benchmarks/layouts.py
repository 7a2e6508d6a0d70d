"""What one group costs the learner by the length of its completions: `python -m benchmarks.layouts`

Forward and backward pass of random layers of Qwen2.5-0.5B's shape, in float32: eight completions of one prompt,
their lengths spread evenly from a third of the longest to the longest. The layouts take turns. Beside the seconds, what
autograd keeps of one sequence for the backward pass, and how well a straight line over its tokens says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from rewards.tables import markdown
from sft_core.learn.logprobs import token_logprobs
from sft_core.learn.rows import Rows, pack_rows
from sft_core.model.policy import Policy
from sft_core.model.segments import Layout, attend_by_segments, layouts
from sft_core.precision import pick_precision
from sft_core.run.provenance import as_line, provenance

GROUP, VOCABULARY = 8, 1000  # the head is not what is compared
WIDE = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
LAYOUTS: tuple[Layout, ...] = ("sequence", "groups", "rows")


def policy_of(layers: int, **shape: int) -> Policy:
    """Of random layers, without a tokenizer."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=VOCABULARY, num_hidden_layers=layers, tie_word_embeddings=True, **shape)
    model = Qwen2ForCausalLM(config).train()
    attend_by_segments(model)
    assert layouts(model) == LAYOUTS
    return Policy(model, None, pick_precision("float32", torch.device("cpu")), (0,), 0, LAYOUTS[0])


def group_of(longest: int, prompt: int) -> Rows:
    """One prompt's completions."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(longest / 3, longest, GROUP).round().int().tolist()
    ids = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in [prompt, *lengths]]
    return pack_rows([ids[0]] * GROUP, ids[1:], pad_id=0)


def seconds(policy: Policy, rows: Rows) -> float:
    """Of one forward and backward pass."""
    policy.model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    logp_NT, _ = token_logprobs(policy, rows, entropy="none")
    logp_NT.sum().backward()
    return time.perf_counter() - start


def kept(policy: Policy, rows: Rows) -> int:
    """Bytes that a forward pass leaves for its backward pass, the weights left out."""
    held: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        logp_NT, _ = token_logprobs(policy, rows, entropy="none")
    assert logp_NT.requires_grad  # and so what was saved is still there, each at a place of its own
    own = {parameter.untyped_storage().data_ptr() for parameter in policy.model.parameters()}
    return sum(size for place, size in held.items() if place not in own)


def line_through(tokens: Sequence[int], sizes: Sequence[int]) -> str:
    """The straight line that is closest to these bytes, and how far they are from it."""
    size_L = torch.tensor(sizes, dtype=torch.float64)
    terms_L2 = torch.stack([torch.ones_like(size_L), torch.tensor(tokens, dtype=torch.float64)], dim=1)
    line_2 = torch.linalg.lstsq(terms_L2, size_L[:, None]).solution
    residual_L = (terms_L2 @ line_2).squeeze(1) / size_L - 1
    off = ", ".join(f"{n}: {residual:+.1%}" for n, residual in zip(tokens, residual_L.tolist(), strict=True))
    constant, slope = line_2.squeeze(1).tolist()
    return f"Kept: {constant / 1e6:.1f} MB and {slope / 1e3:.1f} kB a token; the line is off, by tokens: {off}."


def row_of(policy: Policy, longest: int, prompt: int, repeats: int) -> list[str]:
    """A line of the table."""
    rows = group_of(longest, prompt)
    taken: dict[Layout, list[float]] = {layout: [] for layout in LAYOUTS}
    for _ in range(repeats + 1):  # the first is not counted
        for layout in LAYOUTS:
            taken[layout].append(seconds(replace(policy, layout=layout), rows))
    medians = {layout: median(times[1:]) for layout, times in taken.items()}
    padded, packed = GROUP * (prompt + longest), prompt + int(rows.completion_len_N.sum())
    ratios = [medians["rows"] / medians["sequence"], medians["groups"] / medians["sequence"], padded / packed]
    return [str(longest), *(f"{medians[layout]:.2f} s" for layout in LAYOUTS), *(f"{ratio:.2f}" for ratio in ratios)]


def main() -> None:
    """The table, on the screen or in a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layouts", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lengths", default="64,128,256,512,1024,2048", help="longest completions, in tokens")
    parser.add_argument("--prompt", type=int, default=100, help="tokens of the prompt (default: 100)")
    parser.add_argument("--layers", type=int, default=2, help="of the 24 (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median is taken (default: 3)")
    parser.add_argument("--output", type=Path, help="write Markdown here, too")
    given = parser.parse_args()
    policy = policy_of(given.layers, **WIDE)
    titles = ["longest completion", "one sequence", "a row a group", "rows apart"]
    table = [[*titles, "apart / sequence", "group / sequence", "tokens apart / in sequence"]]
    lengths = [int(length) for length in given.lengths.split(",")]
    table += [row_of(policy, length, given.prompt, given.repeats) for length in lengths]
    groups = [group_of(length, given.prompt) for length in lengths]
    tokens = [given.prompt + int(rows.completion_len_N.sum()) for rows in groups]
    memory = line_through(tokens, [kept(policy, rows) for rows in groups])
    report = f"{(__doc__ or '').strip()}\n\n{as_line(provenance(seed=None))}\n\n{markdown(table)}\n\n{memory}\n"
    print(report)
    if given.output:
        given.output.write_text(f"# The learner's layouts by length\n\n{report}", encoding="utf-8")


if __name__ == "__main__":
    main()
