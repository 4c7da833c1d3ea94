"""Tokenizers and training batches."""

from crsm.data.sequences import (
    AttemptGroup,
    Batch,
    Sequence,
    attempt_groups,
    count_too_long,
    encode_answer,
    encode_prompt,
    make_batch,
    make_sequence,
    pack_batch,
    text_windows,
    training_batch,
)
from crsm.data.tokenizer import StreamDecoder, Tokenizer, build_tokenizer

__all__ = [
    "AttemptGroup",
    "Batch",
    "Sequence",
    "StreamDecoder",
    "Tokenizer",
    "attempt_groups",
    "build_tokenizer",
    "count_too_long",
    "encode_answer",
    "encode_prompt",
    "make_batch",
    "make_sequence",
    "pack_batch",
    "text_windows",
    "training_batch",
]
