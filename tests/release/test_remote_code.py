"""The code that goes with an export: transformers' model says what ours says, and ours can be had through it."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from crsm.config import SamplingConfig
from crsm.engine import Engine
from crsm.generation import GenerationRequest
from crsm.kernels import reference
from crsm.model import Checkpoint, load_checkpoint
from crsm.release.export import export_checkpoint
from crsm.release.mamba2 import export_mamba2
from crsm.release.remote_code.modeling_crsm import CRSMForCausalLM
from crsm.release.system_2 import System2
from tests.fixtures import PROMPT, text_checkpoint, tiny_bpe, tiny_checkpoint, tiny_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def home_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies remote code into a cache, and imports it from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def exported(checkpoint: Checkpoint, path: Path, **settings: Any) -> Any:
    export_checkpoint(checkpoint, path, **settings)
    return transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)


@functools.cache
def pair(tied: bool = False) -> tuple[Checkpoint, CRSMForCausalLM]:
    """A tiny checkpoint, and the same weights in the class that is exported."""
    checkpoint = tiny_checkpoint(tiny_config(tied=tied, n_layer=3))
    from crsm.release.export import split_weights, state_of, transformers_config
    from crsm.release.remote_code.configuration_crsm import CRSMConfig

    model = CRSMForCausalLM(CRSMConfig(**transformers_config(checkpoint, "fp32")))
    model.load_state_dict(split_weights(state_of(checkpoint))[0])
    return checkpoint, model.eval()


@functools.cache
def exact_pair(tied: bool) -> tuple[Checkpoint, CRSMForCausalLM]:
    """The same in fp64, where a difference is one of the mathematics and not of the order of sums."""
    checkpoint, model = copy.deepcopy(pair(tied))
    checkpoint.model.double()
    return checkpoint, model.double()


def our_logits(checkpoint: Checkpoint, tokens_BT: torch.Tensor) -> torch.Tensor:
    model = checkpoint.model
    for layer in model.backbone.layers:
        layer.mixer.kernels = reference
    return model.logits(model.backbone(tokens_BT)[0])


# The same numbers -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@given(length=st.integers(1, 40), cut=st.integers(0, 39), seed=st.integers(0, 999), tied=st.booleans())
def test_logits_are_ours_in_one_piece_in_two_and_token_by_token(length: int, cut: int, seed: int, tied: bool) -> None:
    checkpoint, model = exact_pair(tied)
    tokens = torch.randint(31, (2, length), generator=torch.Generator().manual_seed(seed))
    want = our_logits(checkpoint, tokens)
    torch.testing.assert_close(model(tokens).logits, want, atol=1e-10, rtol=1e-10)
    cut = min(cut, length - 1)
    head = model(tokens[:, :cut], use_cache=True) if cut else None
    tail = model(tokens[:, cut:], past_key_values=head.past_key_values if head else None)
    torch.testing.assert_close(tail.logits, want[:, cut:], atol=1e-10, rtol=1e-10)
    state, said = None, []
    for token in tokens.T:
        output = model(token[:, None], past_key_values=state, use_cache=True)
        state = output.past_key_values
        said.append(output.logits[:, 0])
    torch.testing.assert_close(torch.stack(said, dim=1), want, atol=1e-10, rtol=1e-10)
    assert state is not None and state.get_seq_length() == length


@torch.no_grad()
def test_logits_of_nano_are_ours_to_the_last_digits_of_fp32(tmp_path: Path) -> None:
    checkpoint = load_checkpoint("nano")
    model = exported(checkpoint, tmp_path / "nano", licence="mit")
    tokens = torch.randint(2, 53, (4, 150), generator=torch.Generator().manual_seed(0))
    want = our_logits(checkpoint, tokens)
    assert (model(tokens).logits - want).abs().max() <= 1e-6 * want.abs().max()


@torch.no_grad()
def test_padding_on_the_left_changes_nothing() -> None:
    _, model = pair()
    tokens = torch.tensor([PROMPT])
    alone = model(tokens, use_cache=True)
    padded = torch.cat([torch.full((1, 11), 3), tokens], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 11).long()[None]
    beside = model(padded, attention_mask=mask, use_cache=True)
    torch.testing.assert_close(beside.logits[:, 11:], alone.logits, atol=1e-5, rtol=1e-5)
    for mine, theirs in (("ssm_LBHPN", "ssm_LBHPN"), ("conv_LBCK", "conv_LBCK")):
        for one, other in zip(
            getattr(alone.past_key_values, mine), getattr(beside.past_key_values, theirs), strict=True
        ):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 0]], "attention_mask has a zero after a one; allowed: padding on the left"),
        ([[1, 0, 1]], "attention_mask has a zero after a one"),
        ([[1, 1]], r"attention_mask has shape \(1, 2\); allowed: \(1, 3\)"),
    ],
)
def test_another_mask_is_refused(mask: list[list[int]], message: str) -> None:
    _, model = pair()
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([[3, 4, 5]]), attention_mask=torch.tensor(mask))


def test_ids_and_embeddings_are_alternatives() -> None:
    _, model = pair()
    tokens = torch.tensor([PROMPT])
    embedded = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(tokens).logits)
    for wrong in ({}, {"input_ids": tokens, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**wrong)


def test_the_loss_is_the_mean_over_next_tokens_that_count() -> None:
    _, model = pair()
    tokens = torch.tensor([PROMPT])
    labels = tokens.clone()
    labels[:, :3] = -100
    output = model(tokens, labels=labels)
    log_probabilities = output.logits.log_softmax(dim=-1)
    want = -torch.stack([log_probabilities[0, t - 1, PROMPT[t]] for t in range(3, len(PROMPT))]).mean()
    torch.testing.assert_close(output.loss, want)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()


# Generation -----------------------------------------------------------------------------------------------------------


def greedy(checkpoint: Checkpoint, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    sampling = SamplingConfig(temperature=0.0, max_tokens=max_tokens)
    return Engine(checkpoint).generate_all([GenerationRequest(tuple(prompt), sampling) for prompt in prompts])


def cut(row: list[int], ends: tuple[int, ...]) -> list[int]:
    """Up to the first token that ends an answer."""
    return row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_generate_says_what_system_1_says_to_a_padded_batch(tmp_path: Path, dtype: Any) -> None:
    export_checkpoint(text_checkpoint(), tmp_path / "exported", dtype=dtype)
    checkpoint = load_checkpoint(tmp_path / "exported")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", trust_remote_code=True, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    texts = ["Question: which", "rain", "Answer: 12 drops, 3 of them"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    prompts = [checkpoint.tokenizer.encode(text) for text in texts]
    rows = model.generate(**batch)[:, batch["input_ids"].shape[1] :].tolist()
    assert rows == model.generate(**batch, use_cache=False)[:, batch["input_ids"].shape[1] :].tolist()
    ends = checkpoint.tokenizer.terminal_ids
    assert [cut(row, ends) for row in rows] == greedy(checkpoint, prompts, checkpoint.config.sampling.max_tokens)


def test_matrices_load_as_bf16_and_what_needs_fp32_stays(tmp_path: Path) -> None:
    export_checkpoint(tiny_checkpoint(), tmp_path / "exported", dtype="bf16")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported",
        trust_remote_code=True,
        dtype="auto",  # the default since transformers 5
    )
    assert model.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        wide = name.endswith(("A_log", "dt_bias", "mixer.D", "logits_L"))
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
    logits = model(torch.tensor([PROMPT])).logits
    want = our_logits(tiny_checkpoint(), torch.tensor([PROMPT]))
    assert logits.dtype == torch.bfloat16 and (logits - want).abs().max() < 0.05 * want.abs().max()


def test_sampling_beams_and_going_on_from_a_state(tmp_path: Path) -> None:
    model = exported(tiny_checkpoint(), tmp_path / "exported")
    tokens = torch.tensor([PROMPT])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5}
    torch.manual_seed(0)
    drawn = model.generate(tokens, do_sample=True, temperature=2.0, num_return_sequences=4, **settings)
    assert drawn.shape == (4, len(PROMPT) + 5) and len({tuple(row) for row in drawn.tolist()}) > 1
    beams = [model.generate(tokens, num_beams=3, use_cache=cache, **settings).tolist() for cache in (True, False)]
    assert beams[0] == beams[1], "the state follows its beam"
    whole = model.generate(tokens, **settings)
    first = model.generate(tokens, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True)
    rest = model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=3, min_new_tokens=3, do_sample=False
    )
    assert rest.tolist() == whole.tolist()


def test_speculative_decoding_is_refused_as_for_every_recurrent_model() -> None:
    _, model = pair()
    with pytest.raises(ValueError, match=r"[Ss]tateful"):
        model.generate(torch.tensor([PROMPT]), assistant_model=model, max_new_tokens=2)


# System 2 -------------------------------------------------------------------------------------------------------------


def test_generate_with_plans_says_what_our_engine_says(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tiny_config(sampling=SamplingConfig(max_tokens=6)))
    model = exported(checkpoint, tmp_path / "exported")
    prompts = [list(PROMPT), list(PROMPT[:4])]
    padded = torch.tensor([prompts[0], [0, 0, *prompts[1]]])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    for settings in (["deliberation.lag=0", "deliberation.injection_rate=0.3"], ["planners.count=0"]):
        want = System2(tiny_checkpoint(tiny_config(sampling=SamplingConfig(max_tokens=6)))).generate(prompts, settings)
        said = model.generate_with_plans(padded, mask, settings)
        assert torch.equal(said[:, :6], padded)
        assert [row[6 : 6 + len(answer)] for row, answer in zip(said.tolist(), want, strict=True)] == want
    assert said[:, 6:].tolist() == greedy(checkpoint, prompts, 6), "without planners it is System 1"
    with pytest.raises(ValueError, match=r"allowed: "):
        model.generate_with_plans(padded, mask, ["deliberation.lagg=1"])


def test_settings_of_one_call_do_not_reach_the_next(tmp_path: Path) -> None:
    system_2 = System2(tiny_checkpoint())
    own = system_2.generate([PROMPT])
    assert len(system_2.generate([PROMPT], ["sampling.max_tokens=3"])[0]) == 3
    assert system_2.generate([PROMPT]) == own


# Tokenizers -----------------------------------------------------------------------------------------------------------


def loaded_tokenizer(checkpoint: Checkpoint, path: Path) -> Any:
    export_checkpoint(checkpoint, path)
    return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=True)


def test_the_closed_vocabulary_reads_writes_and_refuses_as_ours(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    theirs, ours = loaded_tokenizer(checkpoint, tmp_path / "exported"), checkpoint.tokenizer
    text = "  3 0 |\n5 3 / 0 5 = yes "
    assert theirs(text)["input_ids"] == ours.encode(text)
    everything = list(range(ours.vocab_size))
    assert theirs.decode(everything) == ours.decode(everything)
    assert [theirs.pad_token_id, theirs.eos_token_id, len(theirs)] == [ours.pad_id, ours.eos_id, ours.vocab_size]
    with pytest.raises(Exception, match="UNK"):
        theirs("3 banana")


TEXTS = ("Question: which of these?\nAnswer: 12 drops", "naïve 你好 <eos> <pad> \t\r\n 0x1F", " a  b ")


@pytest.mark.parametrize("text", TEXTS)
def test_a_bpe_reads_and_writes_as_ours(tmp_path: Path, text: str) -> None:
    theirs, ours = loaded_tokenizer(text_checkpoint(tiny_bpe()), tmp_path / "exported"), tiny_bpe()
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text == ours.decode(ours.encode(text))


# Without this package -------------------------------------------------------------------------------------------------

ALONE = """
    import json, sys
    import torch
    torch.set_num_threads(1)
    try:
        import crsm
        sys.exit("crsm can be imported")
    except ImportError:
        pass
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder, prompts = sys.argv[1], json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    said = model.generate(**batch)[:, batch["input_ids"].shape[1]:]
    try:
        model.generate_with_plans(**batch)
        error = ""
    except ImportError as problem:
        error = str(problem)
    one = [tokenizer.decode(model.generate(**tokenizer(prompts[0], return_tensors="pt"))[0])]
    print(json.dumps({"texts": tokenizer.batch_decode(said), "error": error, "one": one}))
"""


@pytest.mark.slow
def test_nano_says_the_same_text_where_this_package_is_not_installed(tmp_path: Path) -> None:
    """A hundred problems, token for token: a closed vocabulary has a word for each token."""
    from crsm.evaluation.solving import solve
    from crsm.tasks import build_task

    checkpoint = load_checkpoint("nano")
    export_checkpoint(checkpoint, tmp_path / "nano")
    task = build_task(checkpoint.config.tasks[0])
    problems = [task.generate(0, "test", index) for index in range(100)]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CRSM_NATIVE_PATH")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    script = tmp_path / "alone.py"
    script.write_text(textwrap.dedent(ALONE) if not _installed() else _hidden(textwrap.dedent(ALONE)))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "nano")],
        input=json.dumps([problem.prompt for problem in problems]),
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ends = {checkpoint.tokenizer.token(token) for token in checkpoint.tokenizer.terminal_ids}
    texts = []
    for text in found["texts"]:
        words = text.split()
        texts.append(" ".join(words[: next(i + 1 for i, word in enumerate(words) if word in ends)]))
    assert texts == [answer.text for answer in solve(checkpoint, task, problems).answers]
    assert found["one"] == [f"{problems[0].prompt} {texts[0]}"]
    assert found["error"].startswith("generate_with_plans needs the package crsm; pip install crsm")


def _installed() -> bool:
    """Whether this package is in the environment itself, as `make setup` puts it there, and not only on the path."""
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('crsm') is None)"
    return subprocess.run([sys.executable, "-I", "-c", code], check=False, cwd="/").returncode == 0


def _hidden(code: str) -> str:
    """The same program where the environment has no such package: the finders do not see it."""
    return (
        textwrap.dedent(
            """
        import sys

        class Hidden:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("crsm", "actors", "jobs", "_crsm_native"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Hidden())
        """
        )
        + code
    )


# The plain layout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_the_mamba2_layout_is_transformers_own_model(tmp_path: Path, tied: bool) -> None:
    checkpoint = tiny_checkpoint(tiny_config(tied=tied))
    checkpoint.model.fusion.use_last_layer()
    export_mamba2(checkpoint, tmp_path / "plain")
    model, loading = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(loading[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.tensor([PROMPT])
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, our_logits(checkpoint, tokens), atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["architectures"] == ["Mamba2ForCausalLM"] and config["tie_word_embeddings"] is tied


def _gguf() -> ModuleType:
    return pytest.importorskip("gguf", reason="pip install gguf")


@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpp_has_a_name_for_every_tensor_of_the_mamba2_layout(tmp_path: Path, tied: bool) -> None:
    from safetensors.torch import load_file

    gguf = _gguf()
    checkpoint = tiny_checkpoint(tiny_config(tied=tied))
    checkpoint.model.fusion.use_last_layer()
    export_mamba2(checkpoint, tmp_path / "plain")
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    found = _llama_names(gguf, weights, checkpoint.config.model.backbone.n_layer)
    assert len(set(found.values())) == len(weights)


def _llama_names(gguf: ModuleType, weights: Iterable[str], layers: int) -> dict[str, str]:
    """llama.cpp's names of the tensors. Its converter calls ``dt_bias`` ``dt_proj.bias`` before it looks."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MAMBA2, layers)
    found = {}
    for name in weights:
        asked = name.replace(".dt_bias", ".dt_proj.bias")
        found[name] = names.get_name(asked, try_suffixes=(".weight", ".bias"))
        assert found[name] is not None, name
    return found


@pytest.mark.slow
def test_llama_cpps_converter_takes_the_mamba2_layout(tmp_path: Path) -> None:
    """With the tokenizer of GPT-NeoX, which it has built in; every tensor arrives, A_log as -exp(A_log)."""
    from safetensors.torch import load_file

    from crsm.data import Tokenizer
    from crsm.model import build_model
    from jobs.speed.build_llama_bench import VERSION

    gguf = _gguf()
    sources = ROOT / "build" / "llama" / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"
    if not sources.is_dir():
        pytest.skip("llama.cpp's sources are not there: make llama-bench")
    tokenizer = Tokenizer.closed(["yes", "no", *(f"w{index}" for index in range(50_288 - 4))])
    checkpoint = Checkpoint(build_model(tiny_config(tied=True), tokenizer), tokenizer)
    checkpoint.model.fusion.use_last_layer()
    export_mamba2(checkpoint, tmp_path / "plain")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "plain" / name).unlink()
    arguments = [tmp_path / "plain", "--outtype", "f32", "--outfile", tmp_path / "plain.gguf"]
    subprocess.run(
        [sys.executable, sources / "convert_hf_to_gguf.py", *arguments],
        env=os.environ | {"PYTHONPATH": str(sources / "gguf-py")},
        check=True,
        capture_output=True,
    )
    converted = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "plain.gguf").tensors}
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    assert len(converted) == len(weights)
    for name, theirs in _llama_names(gguf, weights, layers=2).items():
        want = -weights[name].exp() if name.endswith("A_log") else weights[name]
        torch.testing.assert_close(torch.tensor(converted[theirs]).flatten(), want.flatten())
