"""CRSM: a language model that thinks while it speaks.

``import crsm`` is cheap: torch is imported with the module that needs it, Ray never.
"""

__version__ = "0.1.0"
