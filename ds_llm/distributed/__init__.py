"""How the processes of a job start, find each other, notice a lost one and stop."""
