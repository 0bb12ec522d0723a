"""What is done, one file per stage kind: its settings, then `run(task) -> Outcome`, then the `stage` that names both."""
