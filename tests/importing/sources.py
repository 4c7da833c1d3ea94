"""Stand-ins of public checkpoints: random Mamba-2s in both layouts, with a tokenizer from elsewhere."""

import functools
import json
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers, trainers

TOKENS = 300
ROWS = 304
"""As in the public checkpoints, more than tokens."""

SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "state_size": 8,
    "head_dim": 8,
    "num_heads": 4,
    "n_groups": 1,
    "chunk_size": 8,
}


def random_model(seed=0, **sizes):
    """With opinions: what is not a vector is large."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**(SIZES | sizes))).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3)
                elif name.endswith(("norm.weight", "norm_f.weight", ".D")):
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("A_log"):
                    parameter.uniform_(0.0, 2.5)
                elif name.endswith("conv1d.bias"):
                    parameter.normal_(std=0.1)
    return model.requires_grad_(False)


@functools.cache
def tokenizer_json(tokens=TOKENS):
    """Like that of GPT-NeoX: its own end of text at 0, no padding and no verdicts."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = "What is the answer, how many are there in all, and how much was left of the apples that he had? "
    backend.train_from_iterator([words * 3 + "Question: ... Answer: <<4+5=9>>9\n#### 9"], trainer)
    assert backend.get_vocab_size() == tokens
    return backend.to_str()


def save_hugging_face(model, folder, **options):
    """As transformers saves it."""
    model.save_pretrained(folder, **options)
    (Path(folder) / "tokenizer.json").write_text(tokenizer_json())
    return Path(folder)


def mamba_ssm_config(config):
    """What mamba-ssm writes for the sizes of ``config``."""
    return {
        "d_model": config.hidden_size,
        "d_intermediate": 0,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size - 3,
        "ssm_cfg": {
            "layer": "Mamba2",
            "d_state": config.state_size,
            "headdim": config.head_dim,
            "d_conv": config.conv_kernel,
            "chunk_size": config.chunk_size,
        },
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": config.tie_word_embeddings,
    }


def mamba_ssm_weights(model):
    """The state of ``mamba_ssm.MambaLMHeadModel``: one name differs, and the head is there even if it is tied."""
    return {name.replace("embeddings", "embedding"): tensor.clone() for name, tensor in model.state_dict().items()}


def save_mamba_ssm(model, folder, weights=None):
    """As mamba-ssm saves it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(mamba_ssm_config(model.config), indent=4))
    torch.save(mamba_ssm_weights(model) if weights is None else weights, folder / "pytorch_model.bin")
    (folder / "tokenizer.json").write_text(tokenizer_json())
    return folder


SAVE = {"Hugging Face": save_hugging_face, "mamba-ssm": save_mamba_ssm}


def source_tensors(folder):
    """All tensors of a folder that the functions above wrote, by name."""
    if (folder / "pytorch_model.bin").is_file():
        return torch.load(folder / "pytorch_model.bin", weights_only=True)
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
