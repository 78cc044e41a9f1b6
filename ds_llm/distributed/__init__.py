"""The processes of a job: their start, their heartbeats, lost processes, and the end of a run."""
