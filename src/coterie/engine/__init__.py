"""The one loop that trains and evaluates any task: configuration, checkpoints, resume, progress and logs."""
