"""Lean decoders: the same bits, less kept for the backward pass, and a way back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate.hooks import ModelHook, add_hook_to_module
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import IDS, SHAPE, adapted, llama, nf4, quantized
from tiny_tokenizers import tiny_tokenizer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from trl import SFTConfig, SFTTrainer

from anyrank.tuner.decoder import lean_decoder

OPTIONS = {**SHAPE, "vocab_size": 128, "pad_token_id": 0}
HEADS = {**OPTIONS, "head_dim": 16}
FALCON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
EXPERTS = {**OPTIONS, "num_local_experts": 2, "num_experts_per_tok": 1}
FAMILIES: dict[str, tuple[Callable[[], Any], int, int, int]] = {  # norms, gated MLPs, pure
    "llama": (lambda: tf.LlamaConfig(**OPTIONS), 5, 2, 0),
    "llama with gelu": (lambda: tf.LlamaConfig(**OPTIONS, hidden_act="gelu"), 5, 2, 0),
    "llama with relu": (lambda: tf.LlamaConfig(**OPTIONS, hidden_act="relu"), 5, 0, 0),
    "qwen 3, with norms of heads": (lambda: tf.Qwen3Config(**HEADS), 9, 2, 0),
    "mistral": (lambda: tf.MistralConfig(**HEADS), 5, 2, 0),
    "gemma 2, norms of 1 + weight": (lambda: tf.Gemma2Config(**HEADS), 0, 2, 0),
    "olmo 2, norms rounded last": (lambda: tf.Olmo2Config(**OPTIONS), 0, 2, 0),
    "falcon, layer norms": (lambda: tf.FalconConfig(**FALCON), 0, 0, 5),
    "phi 3, gate_up in one": (lambda: tf.Phi3Config(**OPTIONS), 5, 0, 2),
    "mixtral, experts": (lambda: tf.MixtralConfig(**EXPERTS), 5, 0, 2),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def built(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(FAMILIES[family][0]()).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # a norm that drops its weight would hide behind ones
            parameter.data += 0.1 * torch.randn(parameter.shape).to(dtype)
    return model


def with_lora(model: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | options
    return get_peft_model(model, LoraConfig(**options))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def gradients(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(2)  # of dropout
    model.zero_grad()
    model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


def relative_rms(got: list[Tensor], wanted: list[Tensor]) -> float:
    mine, theirs = (torch.cat([t.double().flatten() for t in side]) for side in (got, wanted))
    return ((mine - theirs).pow(2).mean() / theirs.pow(2).mean()).sqrt().item()


def replaced(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_family
def test_what_matches_is_replaced_and_no_bit_of_the_logits_changes(family, dtype):
    targets = ["q_proj", "v_proj"] if "experts" in family else "all-linear"
    model = with_lora(built(family, dtype), lora_dropout=0.1, target_modules=targets)
    before, wanted = logits(model.eval()), gradients(model)
    lean = lean_decoder(model)
    assert (lean.norms, lean.gated, lean.pure) == FAMILIES[family][1:]
    assert len(replaced(model)) == lean.norms + lean.gated + lean.pure
    assert lean.losses == 1
    assert torch.equal(logits(model.eval()), before)
    assert relative_rms(gradients(model), wanted) < (2e-2 if dtype == torch.bfloat16 else 1e-6)
    lean.undo()
    assert replaced(model) == []
    for again, first in zip(gradients(model), wanted, strict=True):
        assert torch.equal(again, first)


def test_kept_are_inputs_of_norms_in_their_dtype_and_two_factors_per_gated_product():
    model = with_lora(llama(torch.bfloat16)).train()
    model.enable_input_require_grads()
    sizes = []
    for make_lean in (False, True):
        if make_lean:
            lean_decoder(model)
        kept: list[Tensor] = []  # held, so that no address is used twice
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.append(t) or t, id):
            model(IDS, use_cache=False)
        sizes.append(sum({t.data_ptr(): t.nbytes for t in kept}.values()))
    per_token = 5 * (4 - 2) * SHAPE["hidden_size"] + 2 * 2 * SHAPE["intermediate_size"]
    assert sizes[0] - sizes[1] == IDS.numel() * per_token


def test_before_or_after_adapters_are_attached():
    first, last = llama(), llama()
    assert lean_decoder(first).gated == 2
    first, last = with_lora(first), with_lora(last)
    assert lean_decoder(last).gated == 2
    for one, other in zip(gradients(first), gradients(last), strict=True):
        assert torch.equal(one, other)


def four_bit(model: nn.Module) -> nn.Module:
    """NF4 in every linear layer of the decoder."""
    torch.manual_seed(0)
    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.model.set_submodule(name, nf4(layer.in_features, layer.out_features))
    return model


@pytest.mark.parametrize(
    "base", [lambda: four_bit(llama(torch.bfloat16)), lambda: quantized(llama())]
)
def test_on_bases_of_four_bits_with_our_adapters(base):
    model = adapted(base(), "qalora")
    before, wanted = logits(model), gradients(model)
    assert (lean := lean_decoder(model)).norms == 5
    assert lean.gated == 2
    assert torch.equal(logits(model.eval()), before)
    assert relative_rms(gradients(model), wanted) < 2e-2


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = with_lora(llama(torch.bfloat16), lora_dropout=0.1)
    model.enable_input_require_grads()
    lean_decoder(model)
    wanted = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for got, plain in zip(gradients(model), wanted, strict=True):
        assert torch.equal(got, plain)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_modules_compile_without_a_break():
    layer = llama().model.layers[0].requires_grad_(False)
    lean_decoder(layer)
    x = torch.randn(2, 3, 64, requires_grad=True)
    for module in (layer.mlp, layer.input_layernorm):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        got, wanted = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, module))
        assert torch.equal(got, wanted)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_sft_trainer_reaches_the_same_losses(tmp_path):
    rows = [{"prompt": f"Say {i}:", "completion": f" {i} it is."} for i in range(8)]
    losses = []
    for make_lean in (False, True):
        model = llama(vocab_size=400)
        if make_lean:
            lean_decoder(model)
        sft = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(tmp_path / str(make_lean)), use_cpu=True, bf16=False, max_steps=3,
                per_device_train_batch_size=2, learning_rate=0.01, logging_steps=1, seed=7,
                report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
                gradient_checkpointing=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )  # fmt: skip
        sft.train()
        losses.append([row["loss"] for row in sft.state.log_history if "loss" in row])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_saving_copies_and_generation_stay_as_they_were(tmp_path):
    plain, model = llama(), llama()
    lean_decoder(model)
    twin = copy.deepcopy(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.save_pretrained(tmp_path)
    saved = tf.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(saved), logits(plain))
    wanted = plain.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), wanted)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(twin), logits(plain))  # a copy computes with its own weights


def test_norms_can_be_trained_and_saved(tmp_path):
    plain = with_lora(llama(), modules_to_save=["norm"])
    base = llama()
    lean_decoder(base)
    model = with_lora(base, modules_to_save=["norm"])
    got, wanted = gradients(model), gradients(plain)
    assert any(g.shape == (64,) and g.abs().sum() > 0 for g in got)
    assert relative_rms(got, wanted) < 1e-6
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(again), logits(model.eval()))


def test_a_second_call_finds_nothing_and_undoes_nothing_of_the_first():
    model = llama()
    with lean_decoder(model) as lean:
        assert (lean.norms, lean.gated) == (5, 2)
        with lean_decoder(model) as second:
            assert (second.norms, second.gated) == (0, 0)
        assert len(replaced(model)) == 7
    assert replaced(model) == []


def test_modules_with_hooks_of_accelerate_are_left_alone():
    model = llama()
    before = logits(model)
    add_hook_to_module(model.model.norm, ModelHook())
    add_hook_to_module(model.model.layers[1].mlp, ModelHook())
    lean = lean_decoder(model)
    assert (lean.norms, lean.gated) == (4, 1)
    add_hook_to_module(model.model.layers[0].mlp, ModelHook())
    lean.undo()
    assert replaced(model) == ["model.layers.0.mlp", "model.layers.1.mlp", "model.norm"]
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("mode", [FakeTensorMode, lambda: torch.device("meta")])
def test_models_without_values_are_made_lean_too(mode):
    config = llama().config
    with mode():
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        lean = lean_decoder(model)
        assert (lean.norms, lean.gated) == (5, 2)
        ids = torch.zeros(1, 8, dtype=torch.long)
        assert model(ids, labels=ids).logits.shape == (1, 8, 128)
        lean.undo()
    assert lean_decoder(model).gated == 2


def test_random_numbers_and_modes_of_the_caller_stay():
    model, state = llama().train(), torch.get_rng_state()
    lean_decoder(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def epsilon_outside(self: Any, h: Tensor) -> Tensor:
    root = h.float().pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon
    return self.weight * (h / root).to(h.dtype)


def with_gate(self: Any, h: Tensor, gate: Tensor | None = None) -> Tensor:
    y = LlamaRMSNorm.forward(self, h)
    return y if gate is None else y * gate


def drops(self: Any, x: Tensor) -> Tensor:
    product = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(F.dropout(product, 0.5, self.training))


@pytest.mark.parametrize(
    ("forward", "norms", "gated"),
    [
        (LlamaRMSNorm.forward, 1, 0),
        (lambda m, h: LlamaRMSNorm.forward(m, h.clamp(-500, 500)), 0, 0),
        (epsilon_outside, 0, 0),
        (with_gate, 0, 0),
        (LlamaMLP.forward, 0, 1),
        (lambda m, x: m.down_proj(m.gate_proj(x) * m.act_fn(m.up_proj(x))), 0, 0),
        (lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)).clamp(max=99) * m.up_proj(x)), 0, 0),
        (lambda m, x: m.down_proj(m.act_fn(x @ m.gate_proj.weight.T) * m.up_proj(x)), 0, 0),
        (drops, 0, 0),
    ],
    ids=["norm", "clamped", "epsilon", "gate", "mlp", "swapped", "limited", "reads", "drops"],
)
def test_what_computes_something_else_is_left_alone(forward, norms, gated):
    """A norm and an MLP with this forward; each fails in the other."""
    parents = {LlamaRMSNorm: 64, LlamaMLP: tf.LlamaConfig(**OPTIONS)}
    kinds = [(type("Kind", (kind,), {"forward": forward}), of) for kind, of in parents.items()]
    lean = lean_decoder(nn.Sequential(*(kind(of) for kind, of in kinds)))
    assert (lean.norms, lean.gated) == (norms, gated)


def test_an_mlp_with_more_inside_is_left_alone_and_a_function_may_be_its_activation():
    more, function = (LlamaMLP(tf.LlamaConfig(**OPTIONS)) for _ in range(2))
    more.inner = nn.Identity()
    del function.act_fn
    function.act_fn = F.silu
    assert (lean_decoder(more).gated, lean_decoder(function).gated) == (0, 1)
