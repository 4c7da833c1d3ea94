"""Public Mamba-2 weights as a checkpoint of this project: System 1 as it was trained elsewhere, System 2 untrained.

A source is a folder of ``config.json`` and weights, in one of two layouts: ``mamba-ssm``'s own and that of Hugging
Face's ``Mamba2ForCausalLM``. A layout turns a ``config.json`` into the sizes of the backbone, or refuses it; tensors
have the same meaning in both, and differ in one name. Every tensor of the source is used exactly once, or the first one
that does not fit is named. Weights are read as numbers: no code in a file is ever run.
"""

from __future__ import annotations

from crsm.importing.checkpoint import import_checkpoint as import_checkpoint
from crsm.importing.source import locate_source as locate_source
from crsm.importing.source import locate_tokenizer as locate_tokenizer
