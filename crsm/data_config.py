"""Settings of a data preparation: where text comes from, what is left out, and how it becomes shards of tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from crsm.config import apply_override, parse_settings, read_tree
from crsm.settings import Positive, Probability, Settings
from crsm.task_config import TaskConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class SourceSettings(Settings):
    """What every source has."""

    name: str
    """Of the source in the index, in file names and in mixtures."""
    licence: str = "unknown"
    attribution: str = ""
    """Who is to be named; goes into the data card."""
    split: Literal["train", "valid"] = "train"
    valid_share: Probability = 0.0
    """Share of the documents of a ``train`` source that is held out, by the hash of their text."""
    clean: bool = True
    """Whether the quality filters look at it; its characters are normalised in any case."""
    near_duplicates: bool = True
    """Whether near duplicates are left out; exact ones always are."""
    decontaminate: bool = True
    max_bad: Annotated[int, Field(ge=0)] = 100
    """Records of one file that may be broken (no JSON, no text); they are counted and named. One more ends the run."""

    @model_validator(mode="after")
    def _is_a_file_name(self) -> SourceSettings:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name = {self.name!r}; allowed: letters, digits, '.', '_' and '-'")
        return self


class FilesSource(SourceSettings):
    """Local files: jsonl, plain text or parquet, also ``.gz`` and ``.zst``."""

    kind: Literal["files"] = "files"
    path: str
    """A file, a folder (all files below it whose format is known), or a pattern such as ``text/books_*.jsonl.gz``."""
    format: Literal["auto", "jsonl", "json", "txt", "parquet"] = "auto"
    """``auto``: by the file's name. ``json``: one array of objects. ``txt``: a document per file."""
    field: str = "text"
    """Of a record: what holds the text."""


class HubSource(SourceSettings):
    """A data set of the Hugging Face hub by its name, streamed; needs the extra ``hub``."""

    kind: Literal["hub"] = "hub"
    dataset: str
    subset: str | None = None
    hub_split: str = "train"
    revision: str | None = None
    """A commit; None: the newest, which may change between a run and its restart."""
    field: str = "text"
    documents: Positive | None = None
    """The first so many records only."""


class TaskSource(SourceSettings):
    """Problems of a task with their solutions, and attempts, each closed by its verdict."""

    kind: Literal["task"] = "task"
    task: TaskConfig
    documents: Positive
    """Problems; fewer where the task's data set ends."""
    solution_share: Probability = 1.0
    """Share of the documents that hold the solution; the others hold an attempt, where the task has any."""
    clean: bool = False
    near_duplicates: bool = False
    """Problems of one form are near duplicates of each other."""


class TracesSource(SourceSettings):
    """Recorded solutions or attempts: jsonl files of prompts and answers, with or without a verdict."""

    kind: Literal["traces"] = "traces"
    path: str
    """As in ``files``."""
    prompt_field: str = "question"
    answer_field: str = "answer"
    correct_field: str | None = None
    """True or false in each record; None: every answer is right."""
    template: str = "Question: {prompt}\nAnswer: {answer}"
    clean: bool = False
    near_duplicates: bool = False


SourceConfig = Annotated[FilesSource | HubSource | TaskSource | TracesSource, Field(discriminator="kind")]


class CleaningConfig(Settings):
    """Quality filters (most of them after Gopher, arXiv 2112.11446) and repairs. A document goes by the first rule that
    it breaks; None or 0 switches a rule off."""

    repair: bool = True
    """Texts that were decoded with the wrong character set are mended (ftfy)."""
    min_words: Annotated[int, Field(ge=0)] = 20
    max_words: Positive | None = None
    min_word_length: Annotated[float, Field(ge=0)] = 2.5
    """Mean number of characters of a word."""
    max_word_length: Annotated[float, Field(gt=0)] = 12.0
    min_letters: Probability = 0.55
    """Share of letters among the bytes that are no white space; bytes outside ASCII count as letters."""
    max_symbols: Annotated[float, Field(ge=0)] = 0.1
    """``#``, ``{``, ``}``, ``<``, ``>`` and ``|`` per word."""
    max_repeated_lines: Probability = 0.3
    """Share of the characters that lie in lines which occurred before in the document."""
    max_ellipsis_lines: Probability = 0.3
    """Share of the lines that end in an ellipsis."""
    max_replacement: Probability = 0.001
    """Share of U+FFFD among the characters."""
    stop_words: Annotated[int, Field(ge=0)] = 2
    """Of the English words the, be, to, of, and, that, have, with: so many different ones at least. 0 for other
    languages."""


class DuplicatesConfig(Settings):
    """Near duplicates by MinHash (arXiv 2107.06499). The unit is a document, or a section of a long one."""

    enabled: bool = True
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Estimated Jaccard similarity of the sets of word n-grams, at and above which the later unit goes."""
    ngram: Positive = 5
    """Words of a shingle."""
    permutations: Positive = 128
    bands: Positive = 32
    """The signature is cut into so many bands; units that share one are compared."""
    section_chars: Positive = 8000
    """Long documents are looked at in sections of about this length, cut at paragraphs by their content, so that a
    chapter is found in a book and an insertion moves no other cut."""

    @model_validator(mode="after")
    def _bands_divide(self) -> DuplicatesConfig:
        if self.permutations % self.bands:
            raise ValueError(f"bands = {self.bands}; allowed: a divisor of permutations = {self.permutations}")
        return self


class EvaluationFiles(Settings):
    """Evaluation texts out of local files."""

    kind: Literal["files"] = "files"
    name: str
    path: str
    format: Literal["auto", "jsonl", "json", "txt", "parquet"] = "auto"
    fields: tuple[str, ...] = ("question",)


class EvaluationTask(Settings):
    """Held-out problems of a task: their prompts and solutions."""

    kind: Literal["task"] = "task"
    name: str
    task: TaskConfig
    splits: tuple[Literal["valid", "test"], ...] = ("valid", "test")
    problems: Positive = 20_000
    """Of each split; fewer where it ends."""


class EvaluationHub(Settings):
    """An evaluation set of the Hugging Face hub; needs the extra ``hub``."""

    kind: Literal["hub"] = "hub"
    name: str
    dataset: str
    subset: str | None = None
    hub_split: str = "test"
    revision: str | None = None
    fields: tuple[str, ...] = ("question",)


EvaluationSet = Annotated[EvaluationFiles | EvaluationTask | EvaluationHub, Field(discriminator="kind")]


class DecontaminationConfig(Settings):
    """A unit that shares an n-gram of words with an evaluation text is left out (arXiv 2005.14165, appendix C)."""

    ngram: Positive = 13
    min_words: Positive = 8
    """An evaluation text shorter than ``ngram`` words counts as a whole, if it has at least these."""
    sets: tuple[EvaluationSet, ...] = ()


class TokensConfig(Settings):
    """The tokenizer of the shards."""

    kind: Literal["bpe", "file"] = "bpe"
    """``bpe``: a byte-level BPE trained on a sample of the text; ``file``: a ``tokenizer.json`` that exists."""
    path: str | None = None
    vocab_size: Positive = 8192
    sample_mb: Annotated[float, Field(gt=0)] = 8.0
    """Text that a BPE is trained on."""

    @model_validator(mode="after")
    def _path_fits(self) -> TokensConfig:
        if (self.kind == "file") != (self.path is not None):
            raise ValueError(f"path = {self.path!r} with kind = {self.kind!r}; allowed: a path for 'file', none else")
        return self


class DataConfig(Settings):
    """The whole tree of settings of one preparation."""

    name: str = "data"
    output: str | None = None
    """Folder of the shards; None: ``runs/data/<name>``."""
    seed: int = 0
    sources: tuple[SourceConfig, ...] = ()
    """In the order of their precedence: of two duplicates the one from the earlier source stays."""
    cleaning: CleaningConfig = CleaningConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()
    decontamination: DecontaminationConfig = DecontaminationConfig()
    tokenizer: TokensConfig = TokensConfig()
    shard_tokens: Positive = 1 << 23
    """Tokens of a shard; the last one of a source and split has what is left."""
    part_mb: Annotated[float, Field(gt=0)] = 8.0
    """Text that one task works on at a time. It bounds the memory; the shards do not depend on it."""

    @model_validator(mode="after")
    def _sources_differ(self) -> DataConfig:
        for kind, names in (
            ("sources", [source.name for source in self.sources]),
            ("decontamination.sets", [entry.name for entry in self.decontamination.sets]),
        ):
            if len(set(names)) < len(names):
                raise ValueError(f"{kind} = {names}; allowed: each name once")
        if not self.sources:
            raise ValueError("sources = []; allowed: at least one")
        return self


def load_data_config(path: str | Path, overrides: Iterable[str] = (), seed: int | None = None) -> DataConfig:
    """Settings from a YAML file with ``section.key=value`` overrides (``sources.books.path=DIR``), the later ones
    winning, and ``seed`` the last.

    Raises:
        ValueError: naming the file or override, the key, the value and what is allowed.
    """
    config = parse_settings(DataConfig, read_tree(path), str(path))
    changes = [*overrides, *([] if seed is None else [f"seed={seed}"])]
    if not changes:
        return config
    tree = config.model_dump(mode="json")
    for change in changes:
        apply_override(tree, change)
    return parse_settings(DataConfig, tree, f"--set {' '.join(changes)}")
