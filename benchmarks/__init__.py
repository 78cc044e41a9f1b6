"""One file per question; each prints a table and can write its results as JSON."""
