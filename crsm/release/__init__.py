"""A checkpoint as others load it: a Hugging Face repository, and the way to the hub.

An exported folder holds the weights of both systems. ``transformers`` alone loads System 1 from it, with the code in
:mod:`crsm.release.remote_code`, which is copied beside the weights; this package loads the whole of it as a checkpoint.
"""
