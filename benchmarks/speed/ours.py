"""This project's side: the real `grpo_step`."""

from __future__ import annotations

from multiprocessing.connection import Connection

from benchmarks.memory import peak_bytes
from benchmarks.workload import Steps
from grpo_core.config import GRPOConfig


def serve(connection: Connection, config: GRPOConfig, threads: int) -> None:
    """A step for each message, answered with what it took; an end for None."""
    import torch

    torch.set_num_threads(threads)
    steps = Steps.of(config)
    device = steps.learner.policy.device
    connection.send({"ready": True})
    while connection.recv() is not None:
        report = steps()
        lengths_N = report.rollout.samples.rows.completion_len_N
        connection.send(
            {
                "seconds": report.clock.total,
                "generation_seconds": report.clock.seconds["generation"],
                "tokens": int(lengths_N.sum()),
                "reward": float(report.rollout.reward_BG.nanmean()),
                "peak_bytes": peak_bytes(device),
            }
        )
