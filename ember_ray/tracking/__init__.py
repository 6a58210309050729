"""What a run shows and leaves behind: run folder, metrics, trackers, console, report."""
