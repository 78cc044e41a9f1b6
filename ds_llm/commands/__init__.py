"""The command lines behind `launch/`."""
