"""What a front has to know of a checkpoint."""

from __future__ import annotations

import json
import time
from pathlib import Path

from actors.serving.backend import ServedModel
from crsm.model import ASSETS, Checkpoint


def served_model(checkpoint: Checkpoint, name: str, chat_template: str | None = None) -> ServedModel:
    """The description of a checkpoint that is served under a name."""
    return ServedModel(
        name=name,
        created=int(time.time()),
        tokenizer=checkpoint.tokenizer,
        config=checkpoint.config,
        weights_hash=checkpoint.weights_hash,
        model_version=checkpoint.model_version,
        consensus_weights_L=tuple(checkpoint.model.critic.consensus_weights_L.tolist()),
        chat_template=chat_template,
    )


def chat_template_of(checkpoint: str | Path) -> str | None:
    """The chat template that lies in a checkpoint's folder, as Hugging Face writes it: ``chat_template.jinja``, or
    ``chat_template`` in ``tokenizer_config.json``; None: there is none.

    Raises:
        ValueError: the file cannot be read.
    """
    folder = ASSETS / checkpoint if (ASSETS / checkpoint).is_dir() else Path(checkpoint)
    try:
        if (path := folder / "chat_template.jinja").is_file():
            return path.read_text(encoding="utf-8")
        if (path := folder / "tokenizer_config.json").is_file():
            template = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
            if template is not None and not isinstance(template, str):
                raise ValueError(f"{path}: chat_template is a {type(template).__name__}; allowed: text")
            return template
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    return None
