"""Where a sitting takes place, as one line of JSON: `python -m benchmarks.sitting.about`"""

from __future__ import annotations

import json

import torch

from sft_core.run.provenance import provenance


def about() -> dict[str, object]:
    """Hardware, versions, commit; of each GPU what decides which kernels it runs."""
    found = provenance(None)
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    hardware = found["hardware"][:1] + [
        f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.2f} GiB, CUDA {torch.version.cuda}"
        for gpu in gpus
    ]
    return {"hardware": hardware, "versions": found["versions"], "commit": found["commit"]}


if __name__ == "__main__":
    print(json.dumps(about()))
