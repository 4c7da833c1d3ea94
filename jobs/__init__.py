"""The jobs, one file each: parse the command line, build the parts, run them. ``python -m jobs.X --help``."""
