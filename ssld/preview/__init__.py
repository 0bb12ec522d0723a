"""What a run will take and what its teachers are worth, before anything is spent."""
