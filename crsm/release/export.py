"""``crsm export``: a checkpoint as a Hugging Face repository.

    config.json, generation_config.json          for transformers
    configuration_crsm.py, modeling_crsm.py      the code that it runs
    model*.safetensors                           System 1
    system_2*.safetensors                        the planners' parts
    tokenizer.json, tokenizer_config.json        for both; AutoTokenizer needs no code
    crsm.json                                    settings, report, size and hash of weights and tokenizer, for crsm
    README.md                                    the model card

Names of the tensors are those of the checkpoint. The folder is itself a checkpoint: ``crsm --checkpoint FOLDER``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from crsm import __version__
from crsm.config import BackboneConfig
from crsm.description import EXPORTED, FORMAT, fingerprint
from crsm.model import Checkpoint, cast_matrices
from crsm.release.card import model_card
from crsm.release.folder import new_folder

Dtype = Literal["fp32", "bf16"]
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

REMOTE_CODE = Path(__file__).parent / "remote_code"
CODE = ("configuration_crsm.py", "modeling_crsm.py")
SYSTEM_1 = ("backbone.", "lm_head.", "fusion.")
"""What the tensors of System 1 are called; all others are the planners'."""
MAX_SHARD = "5GB"


def export_checkpoint(
    checkpoint: Checkpoint,
    path: str | Path,
    *,
    dtype: Dtype = "fp32",
    licence: str = "apache-2.0",
    results: Sequence[Mapping[str, Any]] = (),
    data_report: Mapping[str, Any] | None = None,
    run_report: Mapping[str, Any] | None = None,
    max_shard_size: int | str = MAX_SHARD,
) -> dict[str, int]:
    """Writes the repository's folder; returns the bytes of each file.

    Args:
        checkpoint: what to export.
        path: a folder that does not exist.
        dtype: of matrices; vectors (norms, decays, gates) stay fp32.
        licence, results, data_report, run_report: for the model card.
        max_shard_size: of a file of weights.

    Raises:
        ValueError: there is something of that name, or ``results`` are those of other weights.
        OSError: the folder cannot be written; nothing is left of it.
    """
    path = Path(path)
    check_results(checkpoint, results)
    with new_folder(path) as folder:
        system_1, system_2 = split_weights(cast_matrices(state_of(checkpoint), DTYPES[dtype]))
        metadata = {"format": "pt"}
        save_torch_state_dict(system_1, folder, max_shard_size=max_shard_size, metadata=metadata)
        pattern = "system_2{suffix}.safetensors"
        save_torch_state_dict(
            system_2, folder, filename_pattern=pattern, max_shard_size=max_shard_size, metadata=metadata
        )
        checkpoint.tokenizer.save(folder / "tokenizer.json")
        for name in CODE:
            shutil.copyfile(REMOTE_CODE / name, folder / name)
        write_json(folder / "config.json", transformers_config(checkpoint, dtype))
        write_json(folder / "tokenizer_config.json", tokenizer_config(checkpoint))
        write_json(folder / "generation_config.json", generation_config(checkpoint))
        write_json(folder / EXPORTED, _description(checkpoint, folder, dtype))
        card = model_card(
            checkpoint, dtype=dtype, licence=licence, results=results, data_report=data_report, run_report=run_report
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


def check_results(checkpoint: Checkpoint, results: Sequence[Mapping[str, Any]]) -> None:
    """
    Raises:
        ValueError: figures of other weights, or of another job.
    """
    for record in results:
        measured = (record.get("results") or {}).get("checkpoint")
        if record.get("job") != "benchmark_reasoning" or not isinstance(measured, Mapping):
            raise ValueError(f"results are of job {record.get('job')!r}; allowed: those of benchmark_reasoning")
        if measured.get("weights") != checkpoint.weights_hash:
            raise ValueError(
                f"results are of weights {measured.get('weights')!r}; allowed: those of {checkpoint.weights_hash!r}"
            )


def state_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors; a tied output matrix is left out."""
    state = dict(checkpoint.model.state_dict())
    if checkpoint.config.model.backbone.tie_embeddings:
        del state["lm_head.weight"]
    return state


def split_weights(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of System 1, and those of the planners."""
    system_1 = {name: tensor for name, tensor in state.items() if name.startswith(SYSTEM_1)}
    return system_1, {name: tensor for name, tensor in state.items() if name not in system_1}


def transformers_config(checkpoint: Checkpoint, dtype: Dtype) -> dict[str, Any]:
    """What :class:`~crsm.release.remote_code.configuration_crsm.CRSMConfig` is made from."""
    sizes: BackboneConfig = checkpoint.config.model.backbone
    names = ("vocab_size", "d_model", "n_layer", "d_state", "headdim", "expand", "d_conv", "chunk_size", "norm_eps")
    name = str(DTYPES[dtype]).removeprefix("torch.")
    return {
        "architectures": ["CRSMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_crsm.CRSMConfig",
            "AutoModelForCausalLM": "modeling_crsm.CRSMForCausalLM",
        },
        "model_type": "crsm",
        "crsm_version": __version__,
        **{key: getattr(sizes, key) for key in names},
        "tie_word_embeddings": sizes.tie_embeddings,
        "pad_token_id": checkpoint.tokenizer.pad_id,
        "eos_token_id": checkpoint.tokenizer.eos_id,
        "dtype": name,
        "torch_dtype": name,  # what transformers 4 reads
    }


def tokenizer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """What AutoTokenizer needs beside ``tokenizer.json``, so that it reads text as this package does."""
    tokenizer = checkpoint.tokenizer
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": tokenizer.token(tokenizer.pad_id),
        "eos_token": tokenizer.token(tokenizer.eos_id),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a user's text can neither end a document nor pass a verdict
        "model_input_names": ["input_ids", "attention_mask"],
    }


def generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """How ``generate`` speaks if nothing else is asked for: as the checkpoint's settings say."""
    sampling = checkpoint.config.sampling
    drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    return {
        "pad_token_id": checkpoint.tokenizer.pad_id,
        "eos_token_id": list(checkpoint.tokenizer.terminal_ids),
        "max_new_tokens": sampling.max_tokens,
        "do_sample": sampling.temperature > 0,
        **(drawn if sampling.temperature > 0 else {}),
    }


def _description(checkpoint: Checkpoint, folder: Path, dtype: Dtype) -> dict[str, Any]:
    weights = sorted(file.name for file in folder.glob("*.safetensors"))
    files = {name: fingerprint(folder / name) for name in [*weights, "tokenizer.json"]}
    # In fp32 the weights are the checkpoint's own: what was recorded with them is replayed with these.
    own = checkpoint.weights_hash if dtype == "fp32" else ""
    together = hashlib.sha256("".join(files[name]["sha256"] for name in weights).encode()).hexdigest()
    return {
        "format": FORMAT,
        "crsm_version": __version__,
        "model_version": checkpoint.model_version,
        "weights_hash": own or together[:16],
        "trust_horizon": checkpoint.trust_horizon,
        "files": files,
        "config": checkpoint.config.model_dump(mode="json"),
        "report": checkpoint.report,
    }


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
