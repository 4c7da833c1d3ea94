"""What training a model costs before it is trained: parameters, memory, arithmetic, communication.

Pure functions of settings; no torch, no device. :mod:`crsm.commands.plan` shows them, and ``python -m
jobs.verify_plan`` holds their memory against real steps of training.
"""
