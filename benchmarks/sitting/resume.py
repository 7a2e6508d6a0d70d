"""Is a run that is killed and resumed the run that nobody disturbed, to the bit, on this device?

    python -m benchmarks.sitting.resume FOLDER [flags of grpo_core.train]

The kill comes when the first checkpoint is there, while the next step is at work. Both ways: under --deterministic,
where exit code 1 says that they differ, and without, to see what the flag costs and whether it is needed.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.sitting.equal import unequal_files
from rewards.jsonl import each_jsonl

STEPS = 6
# The bonus for entropy: an untrained model earns no reward, so that without it nothing would be learned.
FLAGS = ["--preset", "tiny", "--precision", "fp16", "--entropy_coef", "0.1", "--max_steps", str(STEPS)]
FLAGS += ["--save_every", "2", "--keep_last", "0", "--tensorboard", "False", "--progress", "False"]


def command(run: Path, flags: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "grpo_core.train", *FLAGS, "--output_dir", str(run), *flags]


def killed(run: Path, flags: Sequence[str]) -> None:
    """Start a run and kill it after its first checkpoint."""
    with subprocess.Popen(command(run, flags)) as process:
        while process.poll() is None and not (run / "checkpoints" / "step-000002").is_dir():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(f"the run was to be killed, but ended with exit code {process.returncode}")


def compared(folder: Path, flags: Sequence[str]) -> tuple[list[str], str]:
    """Both runs: what tells them apart, and this in words, with the number of unlike losses and the seconds a step."""
    whole, parts = folder / "undisturbed", folder / "killed"
    subprocess.run(command(whole, flags), check=True)
    killed(parts, flags)
    subprocess.run([*command(parts, flags), "--resume"], check=True)
    found = unequal_files(whole, parts)
    steps = [line for line in each_jsonl(whole / "log.jsonl") if line["kind"] == "train"]
    seconds = statistics.median(line["time_per_step_s"] for line in steps)
    outcome = f"differs: {', '.join(found)}" if found else "equal to the bit"
    moved = len({line["grpo_loss"] for line in steps})
    return found, f"{outcome}, {moved} losses in {STEPS} steps, {seconds:.3f} s each"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    given, flags = parser.parse_known_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    found, told = compared(given.folder / "deterministic", ["--deterministic", *flags])
    _, plain = compared(given.folder / "plain", flags)  # nothing is promised of these on a GPU
    print(f"figure: --deterministic: {told}; without: {plain}")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
