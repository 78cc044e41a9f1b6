"""The commands of `launch/`: each `main` parses its command line before it imports heavy libraries."""
