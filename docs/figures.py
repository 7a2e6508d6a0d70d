"""The pictures of the pages, drawn by calling the code. `python -m docs.figures` writes them beside this file."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from grpo_core.doctor.readlog import read_run
from grpo_core.objective import clipped_surrogate, k3_kl
from grpo_core.variants import cispo, sapo, vespo

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402  (after the backend is chosen)

ROOT = Path(__file__).parent.parent
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#777777"  # Okabe and Ito
LOW, HIGH = 0.2, 0.2  # the default epsilons

# From (ratio, logp, advantage), each (M, 1), to the token's loss. Each row is a completion of one token, whose old
# log-probability is 0, so that its log-probability is the log of its ratio.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, tuple[str, str, Loss]] = {
    "clip (GRPO, DAPO)": (BLUE, "-", lambda ratio, logp, A: clipped_surrogate(ratio, A, LOW, HIGH)),
    "CISPO": (ORANGE, "--", lambda ratio, logp, A: cispo(ratio, logp, A, HIGH)),
    "SAPO": (GREEN, "-.", lambda ratio, logp, A: sapo(ratio, A, 1.0, 1.05)),
    "VESPO": (PINK, ":", lambda ratio, logp, A: vespo(logp, torch.zeros_like(logp), A)),
}


def gain_and_pull(loss: Loss, ratio_M: Tensor, advantage: float) -> tuple[Tensor, Tensor]:
    """What a token adds to the objective, and the factor of the gradient of its log-probability, at each ratio."""
    logp_M1 = ratio_M.log()[:, None].requires_grad_()
    gain_M1 = -loss(logp_M1.exp(), logp_M1, torch.full_like(logp_M1, advantage))
    (pull_M1,) = torch.autograd.grad(gain_M1.sum(), logp_M1)
    return gain_M1.detach()[:, 0], pull_M1[:, 0]


def _axes(columns: int) -> tuple[Any, Any]:
    figure, axes = pyplot.subplots(1, columns, figsize=(8.4, 3.2), layout="constrained")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    return figure, axes


def clipping() -> Any:
    """The clipped surrogate at both signs of the advantage, and where it has no gradient."""
    figure, axes = _axes(2)
    ratio_M = torch.linspace(0.02, 2, 400)
    for axis, advantage in zip(axes, (1.0, -1.0), strict=True):
        gain_M, pull_M = gain_and_pull(LOSSES["clip (GRPO, DAPO)"][2], ratio_M, advantage)
        flat_M = (pull_M == 0).tolist()
        axis.fill_between(
            ratio_M, -2.1, 2.1, where=flat_M, color=GREY, alpha=0.2, linewidth=0, label="no gradient: clipped"
        )
        axis.plot(ratio_M, ratio_M * advantage, color=ORANGE, linestyle="--", label="ratio x A, unclipped")
        axis.plot(ratio_M, gain_M, color=BLUE, linewidth=2, label="min(ratio x A, clip(ratio) x A)")
        axis.plot([1], [advantage], "o", color="black", markersize=5, label="ratio 1: where each batch begins")
        axis.set_ylim((0, 2.1) if advantage > 0 else (-2.1, 0))
        axis.set_title(f"a {'good' if advantage > 0 else 'bad'} token: A = {advantage:+.0f}", fontsize=10)
        axis.set_xlabel("ratio  $\\pi_\\theta / \\pi_{old}$", fontsize=9)
    axes[0].set_ylabel("gain (minus the loss)", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def pulls() -> Any:
    """How hard a token's log-probability is pushed under four token losses."""
    figure, axes = _axes(2)
    ratio_M = torch.linspace(0.02, 3, 600)
    for axis, advantage in zip(axes, (1.0, -1.0), strict=True):
        for name, (color, style, loss) in LOSSES.items():
            pull_M = gain_and_pull(loss, ratio_M, advantage)[1]
            axis.plot(ratio_M, pull_M, color=color, linestyle=style, linewidth=1.8, label=name)
        axis.axvline(1, color="black", linewidth=0.6)
        axis.set_title(f"A = {advantage:+.0f}", fontsize=10)
        axis.set_xlabel("ratio  $\\pi_\\theta / \\pi_{old}$", fontsize=9)
    axes[0].set_ylabel("pull on log $\\pi_\\theta$", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def kl() -> Any:
    """The k3 estimate beside two others, and what it pulls with."""
    figure, (values, pull) = _axes(2)
    difference_M = torch.linspace(-2.5, 1.6, 400)
    logp_M = (-difference_M).requires_grad_()  # log pi_ref is 0
    k3_M = k3_kl(logp_M, torch.zeros(400))
    (slope_M,) = torch.autograd.grad(k3_M.sum(), logp_M)
    values.plot(difference_M, -difference_M, color=GREY, linestyle=":", label="k1 = -d (not used: can be negative)")
    values.plot(difference_M, difference_M**2 / 2, color=ORANGE, linestyle="--", label="k2 = d² / 2 (not used)")
    values.plot(difference_M, k3_M.detach(), color=BLUE, linewidth=2, label="k3 = exp(d) - d - 1")
    values.set_ylim(-1.7, 3.2)
    values.set_title("the estimate for one token", fontsize=10)
    pull.plot(difference_M, -slope_M, color=BLUE, linewidth=2)
    pull.axhline(0, color="black", linewidth=0.6)
    pull.set_title("k3's pull on log $\\pi_\\theta$: exp(d) - 1", fontsize=10)
    for axis in (values, pull):
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_xlabel("d = log $\\pi_{ref}$ - log $\\pi_\\theta$", fontsize=9)
    figure.legend(*values.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


# The boxes of the loop: place, colour, text. An arrow leads from each to the next one, and from the last to the second.
BOXES = [
    (0.0, 2, BLUE, "B questions"),
    (0.0, 1, BLUE, "sample G answers to each:\nthe policy, with generate"),
    (0.0, 0, BLUE, "score each answer:\nreward functions"),
    (1.0, 0, GREEN, "advantage A: reward minus the group's\nmean, divided by its standard deviation"),
    (1.0, 1, ORANGE, "loss of each token: beta x KL, minus the\nsmaller of ratio x A and clipped ratio x A"),
    (1.0, 2, ORANGE, "gradient, added up over\nmicro-batches, then AdamW"),
]
FLOWS = ["prompts (B, P)", "completions (B x G, T)", "rewards (B, G)", "advantages (B, G)", "one number"]


def loop() -> Any:
    """One step of GRPO, and what flows through it."""
    figure, axis = pyplot.subplots(figsize=(8.8, 3.8), layout="constrained")
    axis.set(xlim=(-0.35, 2.2), ylim=(-0.35, 2.35))
    axis.axis("off")
    boxes = []
    for x, y, color, text in BOXES:
        style = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": color, "linewidth": 1.8}
        boxes.append(axis.text(x, y, text, ha="center", va="center", fontsize=9, bbox=style))
    arrow = {"arrowstyle": "-|>", "linewidth": 1.4, "color": GREY, "shrinkA": 0, "shrinkB": 0}
    for i, (begin, end) in enumerate([*pairwise(range(len(boxes))), (len(boxes) - 1, 1)]):
        arrow |= {"patchA": boxes[begin].get_bbox_patch(), "patchB": boxes[end].get_bbox_patch()}
        axis.annotate("", BOXES[end][:2], BOXES[begin][:2], arrowprops=dict(arrow), zorder=0)
        x, y = (sum(BOXES[box][at] for box in (begin, end)) / 2 for at in (0, 1))
        if i < len(FLOWS):
            away = (x + 0.03, y, "left", "center") if begin != 2 else (x - 0.06, y + 0.08, "center", "bottom")
            axis.text(*away[:2], FLOWS[i], fontsize=8, color=GREY, ha=away[2], va=away[3])
    again = {"arrowstyle": "-|>", "linewidth": 1.4, "color": GREY, "connectionstyle": "arc3,rad=-0.8"}
    axis.annotate("", (1.42, 1.18), (1.32, 1.95), arrowprops=again)
    axis.text(0.42, 1.62, "new weights", fontsize=8, color=GREY, ha="right")
    axis.text(1.72, 1.6, "mu times on\nthe same answers", fontsize=8, color=GREY, va="center")
    axis.text(
        1.56, 0.8, "ratio: to the policy that\nsampled; KL: to a frozen copy", fontsize=8, color=GREY, va="center"
    )
    return figure


# Recorded runs of tests/sick, and what the doctor calls each.
GALLERY = {
    "healthy": "healthy",
    "never_rewarded": "never rewarded",
    "too_hard": "groups all wrong",
    "everything_truncated": "all cut off",
    "lr_too_low": "learning rate too low",
    "lr_too_high": "learning rate too high",
    "entropy_collapse": "entropy collapse",
    "reward_hacking": "reward hacking",
}
CURVES = (
    ("reward_mean", "reward", BLUE, "-"),
    ("accuracy", "accuracy", GREEN, "--"),
    ("entropy", "entropy, nats a token", ORANGE, "-"),
    ("length_mean", "length, share of the budget", PINK, "-"),
)


def gallery() -> Any:
    """Healthy and sick runs side by side, four numbers of each."""
    figure, axes = pyplot.subplots(2, 4, figsize=(8.4, 4.2), layout="constrained")
    for axis, (name, title) in zip(axes.flat, GALLERY.items(), strict=True):
        run = read_run(ROOT / "tests" / "sick" / name)
        steps = [line["step"] for line in run.train]
        for key, label, color, style in CURVES:
            scale = run.setting("max_completion_tokens") if key == "length_mean" else 1
            axis.plot(steps, [line[key] / scale for line in run.train], color=color, linestyle=style, label=label)
        axis.set_ylim(-0.03, 1.05)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=7)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


FIGURES: dict[str, Callable[[], Any]] = {
    "clipping": clipping,
    "pulls": pulls,
    "kl": kl,
    "loop": loop,
    "gallery": gallery,
}


def draw(folder: Path) -> list[Path]:
    """Write every picture to `folder`."""
    written = []
    for name, make in FIGURES.items():
        figure = make()
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=100, metadata={"Software": None})  # the same bytes from each matplotlib
        pyplot.close(figure)
    return written


if __name__ == "__main__":
    for path in draw(Path(__file__).parent):
        print(f"drawn: {path.name}")
