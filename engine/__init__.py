"""The machinery of a run: command line, checkpoints, processes, memory, speed."""
