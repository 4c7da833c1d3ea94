"""A data card: what is in a folder of shards, in Markdown, from the report of its preparation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crsm.data_config import DataConfig


def data_card(report: Mapping[str, Any], config: DataConfig) -> str:
    """The card; the same report gives the same text."""
    lines = [f"# Data card: {report['name']}", ""]
    total = {split: _total(report, split) for split in ("train", "valid")}
    lines += [
        f"{total['train']['tokens']:,} tokens for training and {total['valid']['tokens']:,} held out, in "
        f"{len(report['shards'])} shards; seed {report['seed']}; tokenizer: {report['tokenizer']['kind']}, "
        f"{report['tokenizer']['entries']:,} entries.",
        "",
        "## Sources",
        "",
        *_table(
            ("source", "licence", "split", "documents", "text (MB)", "tokens", "bytes per token"),
            [
                (
                    source["name"],
                    source["licence"],
                    split,
                    f"{figures['documents']:,}",
                    f"{figures['bytes'] / 1e6:,.2f}",
                    f"{figures['tokens']:,}",
                    f"{figures['bytes'] / max(1, figures['tokens']):.2f}",
                )
                for source in report["sources"]
                for split, figures in source["splits"].items()
            ],
        ),
        "",
    ]
    for source in report["sources"]:
        if source["attribution"]:
            lines.append(f"* {source['name']}: {source['attribution']}")
    lines += [
        "",
        "## What was left out",
        "",
        *_table(
            (
                "source",
                "records read",
                "broken records",
                "documents by a rule",
                "exact duplicates",
                "near duplicates",
                "contaminated",
            ),
            [
                (
                    source["name"],
                    f"{source['counts']['records']:,}",
                    f"{source['counts']['broken']:,}",
                    _named(source["counts"]["rules"]),
                    f"{source['duplicates']['exact']:,}",
                    f"{source['duplicates']['near']:,}",
                    _named(source["counts"]["contaminated"]),
                )
                for source in report["sources"]
            ],
        ),
        "",
        "Duplicates and contamination are counted in sections: a document, or a stretch of about "
        f"{config.duplicates.section_chars:,} characters of a long one. "
        + (
            f"Near duplicates: MinHash of {config.duplicates.ngram}-word shingles, {config.duplicates.permutations} "
            f"permutations in {config.duplicates.bands} bands, similarity {config.duplicates.threshold} and more."
            if config.duplicates.enabled
            else "Near duplicates were not looked for."
        ),
        "",
    ]
    broken = [name for source in report["sources"] for name in source["counts"]["broken_named"]]
    if broken:
        lines += ["Broken records:", "", *(f"* `{name}`" for name in broken[:20]), ""]
    lines += ["## Evaluation sets", ""]
    if report["evaluation_sets"]:
        lines += [
            f"A section that shares {config.decontamination.ngram} words in a row with one of these was left out; a "
            f"text shorter than that counts as a whole, from {config.decontamination.min_words} words on.",
            "",
            *_table(
                ("set", "examples", "too short to compare", "sections left out"),
                [
                    (
                        entry["name"],
                        f"{entry['examples']:,}",
                        f"{entry['too_short']:,}",
                        f"{sum(s['counts']['contaminated'].get(entry['name'], 0) for s in report['sources']):,}",
                    )
                    for entry in report["evaluation_sets"]
                ],
            ),
        ]
    else:
        lines.append("None was compared with: figures on benchmarks may be too good.")
    lines += ["", "`report.json` names examples; `index.json` has every shard's hash, and all settings.", ""]
    return "\n".join(lines)


def _total(report: Mapping[str, Any], split: str) -> dict[str, int]:
    found = [source["splits"].get(split, {"tokens": 0}) for source in report["sources"]]
    return {"tokens": sum(entry["tokens"] for entry in found)}


def _named(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())) or "0"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"] + [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
    ]
