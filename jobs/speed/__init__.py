"""Speed beside the peers: what :mod:`jobs.benchmark_speed` measures, one concept a file."""
