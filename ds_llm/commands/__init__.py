"""The commands of `launch/`: each `main` reads a command line; nothing heavy is imported before."""
