"""What a run needs per process, planned without running it."""
