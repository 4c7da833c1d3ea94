"""Public benchmarks and the built-in tasks, answered by System 1, System 2 and the controls on the same problems."""
