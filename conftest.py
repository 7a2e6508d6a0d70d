"""Before any test, doctests included: one thread for each process, and as many processes as the machine has cores."""

from __future__ import annotations

import os

import pytest

# Read when torch is imported, here and in every process that a test starts: on models this small a second thread only
# waits for the first, and the workers share the cores already.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def only_files(config: pytest.Config) -> bool:
    """Whether files or single tests were named, and no folder."""
    return all("::" in name or name.endswith(".py") for name in config.args)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Where only files or single tests are named, they run here: a worker's imports take longer than most of them."""
    return 0 if only_files(config) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The whole suite leaves out its few slow tests, unless they are asked for: `pytest -m slow`, as .ci/run does."""
    if config.getoption("markexpr") or only_files(config):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in set(slow)]
    config.hook.pytest_deselected(items=slow)
