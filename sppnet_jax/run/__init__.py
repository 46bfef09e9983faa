"""What every run needs: its folder, checkpoints, metrics, progress, devices, caches."""
