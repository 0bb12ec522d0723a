"""What is done, one file per stage kind: its settings, `run(task) -> Outcome`, and the `stage` that names both."""
