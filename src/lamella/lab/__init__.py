"""The laboratory: tasks, methods beside their baselines, runs, studies and reports (extra `lab`)."""
