"""A workload's steps here and in TRL, in alternation: two processes, of which one works while the other waits."""
