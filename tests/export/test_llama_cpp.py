"""llama.cpp reads the files: its tokens, its logits and its text are those of torch.

llama.cpp rounds the inputs of a quantized layer to 8 bits, so logits differ in the third digit;
a wrong row order or a wrong frequency shows a hundred times as much, see the twins. Figures are
printed: `pytest -m slow -s tests/export/test_llama_cpp.py`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf_models
import pytest
import tiny
import torch
import transformers as tf
from gguf_models import TEXTS, byte_level, model, save, sentencepiece
from peft import get_peft_model

from anyrank import AnyRankConfig
from anyrank.export.gguf import architecture, export_gguf, export_gguf_lora
from anyrank.kernels import AffineFormat

pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:llama_cpp"),
]

SHARED = Path(__file__).parents[3] / "shared"
PROMPTS = torch.randint(5, 600, (5, 24), generator=torch.Generator().manual_seed(0)).tolist()
KL = 1e-3
CLOSE = 1e-2  # logits that near to each other may change places


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Any]:
    """The model in llama.cpp, with logits for every token."""
    options = {"n_ctx": 512, "logits_all": True, "n_threads": 1, "verbose": False} | options
    llama = llama_cpp.Llama(str(path), **options)
    try:
        yield llama
    finally:
        llama.close()


def logits_of(llama: Any, tokens: list[int]) -> torch.Tensor:
    """[tokens, vocabulary] of float64."""
    llama.reset()
    llama.eval(tokens)
    return torch.tensor(llama.scores[: len(tokens)]).double()


@torch.no_grad()
def torch_logits(made: Any, tokens: list[int]) -> torch.Tensor:
    return made(torch.tensor([tokens]), use_cache=False).logits[0].double()


def kl(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Mean over the tokens of KL(torch || llama.cpp), in nats."""
    a, b = wanted.log_softmax(-1), found.log_softmax(-1)
    return (a.exp() * (a - b)).sum(-1).mean().item()


def mean_kl(made: Any, llama: Any, prompts: list[list[int]]) -> float:
    found = [kl(torch_logits(made, p), logits_of(llama, p)) for p in prompts]
    return sum(found) / len(found)


@torch.no_grad()
def torch_greedy(made: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": count, "do_sample": False}
    return made.generate(ids, **options)[0].tolist()


def llama_greedy(llama: Any, prompt: list[int], count: int, eos: int) -> list[int]:
    llama.reset()
    llama.eval(prompt)
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(llama.scores[len(tokens) - 1].argmax()))
        if tokens[-1] == eos:
            break
        llama.eval(tokens[-1:])
    return tokens


def first_difference(made: Any, ours: list[int], theirs: list[int]) -> float | None:
    """How far apart, in torch, the two tokens lie at which the texts part; None: they do not."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:
        assert ours == theirs
        return None
    logits = torch_logits(made, ours[:at])[-1]
    return (logits[ours[at]] - logits[theirs[at]]).item()


def compare_texts(made: Any, llama: Any, prompts: list[list[int]], count: int) -> list[float]:
    """The gap at the first difference of every text that has one."""
    gaps, eos = [], made.generation_config.eos_token_id
    for prompt in prompts:
        ours = torch_greedy(made, prompt, count)
        gap = first_difference(made, ours, llama_greedy(llama, prompt, count, eos))
        gaps += [] if gap is None else [gap]
    return gaps


ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
CASES: dict[str, tuple[str, dict[str, Any], AffineFormat]] = {
    "llama": ("llama", {}, AffineFormat(4, (1, 32))),
    "llama 5 bits, biases": (
        "llama",
        {"attention_bias": True, "mlp_bias": True},
        AffineFormat(5, (1, 64)),
    ),
    "llama 3 bits, llama3 rope": (
        "llama",
        {
            "rope_parameters": ROPE
            | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        },
        AffineFormat(3, (1, 128)),
    ),
    "mistral, wide heads": ("mistral", {"head_dim": 64}, AffineFormat(4, (1, 128))),
    "mistral 2 bits, linear rope": (
        "mistral",
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}},
        AffineFormat(2, (1, 32)),
    ),
    "qwen2": ("qwen2", {"hidden_size": 256}, AffineFormat(4, (1, 64))),
    "qwen2, yarn": ("qwen2", {"rope_parameters": ROPE | {"rope_type": "yarn"}}, gguf_models.FORM),
    "qwen3, tied": ("qwen3", {"head_dim": 64, "tie_word_embeddings": True}, gguf_models.FORM),
    "qwen3, yarn": (
        "qwen3",
        {"rope_parameters": ROPE | {"rope_type": "yarn", "attention_factor": 1.2}},
        gguf_models.FORM,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_answers_as_torch(case, tmp_path):
    kind, options, form = CASES[case]
    made = save(tmp_path / "model", model(kind, **options), form=form)
    with opened(export_gguf(tmp_path / "model", tmp_path / "out.gguf")) as llama:
        found = mean_kl(made, llama, PROMPTS)
    print(f"\n{case}: KL {found:.1e}")
    assert found <= KL


@pytest.mark.parametrize(("kind", "interleave"), [("llama", False), ("qwen3", True)])
def test_the_wrong_order_of_rows_would_be_seen(kind, interleave, tmp_path, monkeypatch):
    right = architecture.ARCHITECTURES[kind]
    wrong = dataclasses.replace(right, interleaved=interleave)
    made = save(tmp_path / "model", model(kind))
    monkeypatch.setitem(architecture.ARCHITECTURES, kind, wrong)
    with opened(export_gguf(tmp_path / "model", tmp_path / "out.gguf")) as llama:
        found = mean_kl(made, llama, PROMPTS)
    print(f"\n{kind}, rows of q and k in the wrong order: KL {found:.1e}")
    assert found > 10 * KL


def test_embeddings_as_q8_0(tmp_path):
    made = save(tmp_path / "model", model("llama"))
    path = export_gguf(tmp_path / "model", tmp_path / "out.gguf", embeddings="Q8_0")
    with opened(path) as llama:
        found = mean_kl(made, llama, PROMPTS)
    print(f"\nllama, embeddings and output as Q8_0: KL {found:.1e}")
    assert found <= KL


TURNS = ["<|turn|>user\nHow many?<|end|>\n<|turn|>assistant\n", "a<tool> b <tool>", "</s><s> x"]
MARKS = "हिन्दी"  # words with combining marks, see pretokenizer.py


@pytest.mark.parametrize("name", gguf_models.BYTE_LEVEL)
def test_byte_level_tokens_are_those_of_transformers(name, tmp_path):
    save(tmp_path / "model", model("llama", num_hidden_layers=1), byte_level(name, bos=True))
    texts = [t for t in TEXTS if MARKS not in t or name not in ("gpt-4o", "tekken")]
    compare_tokens(tmp_path, texts + TURNS)


@pytest.mark.parametrize("kind", ["prepend", "metaspace", "plain"])
def test_tokens_from_sentencepiece_are_those_of_transformers(kind, tmp_path):
    made = model("mistral", num_hidden_layers=1, vocab_size=2048)
    save(tmp_path / "model", made, sentencepiece(kind, size=1600))
    # after Metaspace, Transformers adds no space where the text has one, or after a special token
    plain = [text for text in TEXTS if not text.startswith(" ")]
    compare_tokens(tmp_path, plain if kind == "metaspace" else TEXTS + TURNS)


def compare_tokens(root: Path, texts: list[str]) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(root / "model")
    with opened(export_gguf(root / "model", root / "out.gguf")) as llama:
        for text in texts:
            wanted = tokenizer(text)["input_ids"]
            assert llama.tokenize(text.encode(), special=True) == wanted, text
            found = llama.detokenize(wanted[1:], special=True).decode()
            assert found.strip(" ") == tokenizer.decode(wanted[1:]).strip(" ")


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_lora_file_is_the_adapter(kind, tmp_path):
    made = save(tmp_path / "model", model(kind))
    base = [torch_logits(made, prompt) for prompt in PROMPTS]
    adapted = get_peft_model(made, AnyRankConfig(method="qdylora", r=8)).eval()
    tiny.fill(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    lora = export_gguf_lora(
        tmp_path / "adapter", tmp_path / "lora.gguf", 8, base=tmp_path / "model"
    )
    path = export_gguf(tmp_path / "model", tmp_path / "out.gguf")
    with opened(path, lora_path=str(lora)) as llama:
        theirs = [logits_of(llama, prompt) for prompt in PROMPTS]
    ours = [torch_logits(adapted, prompt) for prompt in PROMPTS]
    found = sum(map(kl, ours, theirs)) / len(PROMPTS)
    moved = sum(map(kl, base, theirs)) / len(PROMPTS)
    print(f"\n{kind} with a LoRA: KL {found:.1e}, from the base {moved:.1e}")
    assert found <= KL
    assert moved > 100 * found


def test_the_t0_6m_model_writes_the_same_text(tmp_path):
    base = SHARED / "models" / "t0-6m"
    if not base.is_dir():
        pytest.skip("../shared/models/t0-6m is not here")
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    made = tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    save(tmp_path / "model", made, tokenizer)
    lines = (SHARED / "data" / "gsm8k" / "test.jsonl").read_text("utf-8").splitlines()[:20]
    questions = [json.loads(line)["question"] + "\n" for line in lines]
    with opened(export_gguf(tmp_path / "model", tmp_path / "out.gguf")) as llama:
        prompts = [tokenizer(question)["input_ids"] for question in questions]
        assert [llama.tokenize(q.encode()) for q in questions] == prompts
        found = mean_kl(made, llama, prompts)
        gaps = compare_texts(made, llama, prompts, 48)
    print(f"\nt0-6m: KL {found:.1e}, {len(gaps)} of {len(prompts)} texts part, at logits {gaps}")
    assert found <= KL
    assert all(gap <= CLOSE for gap in gaps)
