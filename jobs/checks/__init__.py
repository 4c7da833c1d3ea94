"""The checks of ``python -m jobs.check_configs``: what is wrong with a file, in one line each. Nothing is contacted."""
