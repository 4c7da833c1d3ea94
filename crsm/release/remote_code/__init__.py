"""Code that goes into an exported repository and runs there without this package; see :mod:`crsm.release`."""
