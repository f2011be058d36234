"""What is measured: a module for each scenario, with `run(bench)`, in the order in which they run."""

SCENARIOS = ("enqueue", "awake", "evaluate", "counters", "store", "million", "lateness", "idle")
