"""One training loop: steps, schedules, sizes."""
