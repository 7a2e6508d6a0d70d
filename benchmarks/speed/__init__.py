"""A workload's steps here and in TRL, in alternation: two processes, one of which runs while the other waits."""
