"""Bugs in going on with a run: pitfall 22."""

from __future__ import annotations

from tests.bugs.mutation import Mutation

ANYWHERE = "tests/test_resume.py::test_a_run_resumed_from_any_checkpoint_ends_with_the_same_bits"

BUGS = [
    Mutation(
        22,
        "the data begin anew",
        "grpo_core/train.py",
        """        self.position = numbers["position"]
""",
        """        pass
""",
        "After each interruption the first problems come again, and the last ones never.",
        (ANYWHERE,),
    ),
    Mutation(
        22,
        "the last step is taken twice",
        "sft_core/learn/clock.py",
        "range(done + 1, steps + 1)",
        "range(max(done, 1), steps + 1)",
        "Its weights are in the checkpoint already: one step too many, on the next step's problems, under its number.",
        (ANYWHERE,),
    ),
    Mutation(
        22,
        "random states begin anew",
        "sft_core/run/progress.py",
        """        set_random_state(state["random"])
""",
        "",
        "The run goes on with the seed's first numbers: the samples of step 1 for the problems of step 101.",
        (ANYWHERE,),
    ),
    Mutation(
        22,
        "a reward function's random numbers begin anew",
        "sft_core/run/randomness.py",
        """    random.setstate((version, tuple(words), gauss))
""",
        "",
        "PyTorch's state is the one that everybody saves. Python's and NumPy's belong to rewards and data.",
        (ANYWHERE,),
    ),
    Mutation(
        22,
        "AdamW without its moments",
        "sft_core/learn/moments.py",
        """            if f"{i}.step" in tensors:
""",
        """            if False:
""",
        "Weights alone are not a checkpoint: after a second warm-up of the moments the first steps are as large as the "
        "learning rate allows.",
        (ANYWHERE,),
    ),
    Mutation(
        22,
        "the schedule's state without its rate",
        "sft_core/learn/moments.py",
        """            group["lr"] = lr
""",
        """            pass
""",
        "The schedule knows where it is, the optimizer does not until the next step of the schedule: one step at the "
        "full rate.",
        (ANYWHERE,),
    ),
    Mutation(
        22,
        "the scaler begins anew",
        "sft_core/learn/moments.py",
        """        self.scaler.load_state_dict(numbers["scaler"])
""",
        "",
        "fp16 gradients are rounded under another factor, and the first batches after it overflow anew.",
        ("tests/test_resume.py::test_an_optimizer_resumes_in_the_state_that_was_saved",),
    ),
    Mutation(
        22,
        "the reference follows anew",
        "grpo_core/reference.py",
        """if self.sync_every else {}
""",
        """if not self.sync_every else {}
""",
        "A reference that moves is part of the state; this one falls back to where the run began.",
        (ANYWHERE,),
    ),
    Mutation(
        22,
        "log lines twice",
        "sft_core/run/runlog.py",
        """        os.truncate(log, size)
""",
        """        pass
""",
        "What was logged after the checkpoint is logged again: curves that run backwards, sums that count twice.",
        (ANYWHERE,),
    ),
]
