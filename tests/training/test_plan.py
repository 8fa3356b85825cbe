"""Promise 5: a row that a step does not train is not moved by it, nor are its moments."""

from __future__ import annotations

import pytest
import torch
from tiny import IDS, adapted, config, fill, layers, llama
from transformers.optimization import Adafactor

import anyrank
from anyrank.algebra import pool, svd_order
from anyrank.errors import ConfigError
from anyrank.training.plan import OWN_RATE
from anyrank.training.watch import Watch

LR = 0.01


def rows_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """A and B of every layer as one matrix per layer, a row per rank."""
    return [
        torch.cat((layer.anyrank_A["default"], layer.anyrank_B["default"].T), dim=1)
        .detach()
        .clone()
        for layer in layers(model)
    ]


def optimizer_of(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(trained, LR, momentum=0.9, weight_decay=0.1)
    return torch.optim.AdamW(trained, LR, weight_decay=0.1, fused=name == "fused")


def step(model, plan, optimizer, number: int) -> None:
    for _ in plan.ranks(number):
        (model(IDS, labels=IDS).loss / plan.schedule.draws).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("optimizer_name", ["adamw", "fused", "sgd"])
@pytest.mark.parametrize(
    "options", [{}, {"frozen_rows": True}, {"rank_unit": 2}, {"ranks_per_step": 2}]
)
def test_rows_that_were_not_drawn_do_not_move(options, optimizer_name):
    model = adapted(llama(), r=8, **options)
    optimizer = optimizer_of(optimizer_name, model)
    plan = anyrank.RankPlan(model, optimizer, total=12, seed=0)
    for number in range(12):
        before = rows_of(model)
        trained = plan.schedule(number, 12, 0).trained
        step(model, plan, optimizer, number)
        for old, new in zip(before, rows_of(model), strict=True):
            moved = [i for i in range(8) if not torch.equal(old[i], new[i])]
            assert moved == list(trained)


def test_without_the_plan_momentum_and_decay_would_move_them():
    model = adapted(llama(), r=8)
    optimizer = optimizer_of("adamw", model)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.set_rank(2)
    before = rows_of(model)[0]
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert (rows_of(model)[0] - before)[2:].abs().max() > LR / 10


def test_moments_of_rows_that_were_not_drawn_are_kept():
    model = adapted(llama(), r=8)
    optimizer = optimizer_of("adamw", model)
    everything = anyrank.Schedule(8, kind="full")
    plan = anyrank.RankPlan(model, optimizer, total=4, seed=0, schedule=everything)
    step(model, plan, optimizer, 0)
    plan.close()
    b = layers(model)[0].anyrank_B["default"]
    before = {k: v.clone() for k, v in optimizer.state[b].items() if k != "step"}
    plan = anyrank.RankPlan(
        model, optimizer, total=4, seed=0, schedule=anyrank.Schedule(8, ranks=(3,))
    )
    step(model, plan, optimizer, 1)
    for name, old in before.items():
        new = optimizer.state[b][name]
        assert torch.equal(new[:, 3:], old[:, 3:])
        assert not torch.equal(new[:, :3], old[:, :3])


def settling(optimizer_name: str = "adamw") -> tuple:
    """A model that is about to settle: its rows are put in order after step 6 of 10."""
    model = adapted(llama(), method="anyrank", r=8)
    optimizer = optimizer_of(optimizer_name, model)
    plan = anyrank.RankPlan(model, optimizer, total=10, seed=0)
    for number in range(7):
        step(model, plan, optimizer, number)
    return model, optimizer, plan


def test_settling_orders_the_rows_drops_their_moments_and_changes_no_logit():
    model, optimizer, plan = settling()
    layer, inputs = layers(model)[0], []
    a, b = layer.anyrank_A["default"], layer.anyrank_B["default"]
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    wanted = model(IDS).logits
    hook.remove()

    def left_out() -> torch.Tensor:
        """What the first k rows miss of the layer's output, for every k."""
        z = inputs[0] @ a.detach().T
        return torch.stack([(z[..., k:] @ b.detach()[:, k:].T).norm() for k in range(1, 8)])

    before = left_out()
    assert optimizer.state[a]["exp_avg"].any()
    plan.begin(7)
    assert a not in optimizer.state
    assert (model(IDS).logits - wanted).abs().max() < 1e-5
    assert (left_out() < before).all()


def test_after_the_last_step_the_other_rows_are_put_in_the_order_of_its_inputs():
    model, optimizer, plan = settling()
    step(model, plan, optimizer, 7)
    step(model, plan, optimizer, 8)
    plan.finish()
    layer, seen = layers(model)[0], []
    a, b = layer.anyrank_A["default"], layer.anyrank_B["default"]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0] @ a.detach().T))
    step(model, plan, optimizer, 9)
    old = a.detach().clone(), b.detach().clone()
    with model.set_rank(4):
        four = model(IDS).logits
    whole = model(IDS).logits
    hook.remove()
    plan.finish()
    assert not layer._forward_pre_hooks
    assert a not in optimizer.state
    z = torch.cat(seen).flatten(0, -2)
    wanted = svd_order(old[0][4:], old[1][:, 4:], (z.T @ z)[4:, 4:])
    for found, kept, tail in zip(
        (a, b.T), (old[0], old[1].T), (wanted[0], wanted[1].T), strict=True
    ):
        assert torch.equal(found[:4], kept[:4])
        assert torch.allclose(found[4:], tail, atol=1e-5)
        assert not torch.allclose(found[4:], kept[4:], atol=1e-3)
    assert (model(IDS).logits - whole).abs().max() < 1e-5
    with model.set_rank(4):
        assert torch.equal(model(IDS).logits, four)
    finished = rows_of(model)
    plan.close()
    assert all(map(torch.equal, finished, rows_of(model)))


def test_rows_that_diverged_stay_as_they_are_and_are_named(caplog):
    model, _, plan = settling()
    first, second = (layer.anyrank_B["default"] for layer in layers(model)[:2])
    before = second.detach().clone()
    with torch.no_grad():
        first[0, 5] = torch.nan
    kept = first.detach().clone()
    plan.begin(7)
    assert torch.equal(first.detach().nan_to_num(9), kept.nan_to_num(9))
    assert not torch.equal(second, before)
    assert f"NaN or infinity in 1 of its {len(layers(model))} layers" in caplog.text


def test_a_plan_that_is_closed_after_its_last_step_finishes_and_before_it_does_not():
    for steps, ordered in ((9, False), (10, True)):
        model, optimizer, plan = settling()
        for number in range(7, steps):
            step(model, plan, optimizer, number)
        before = rows_of(model)
        plan.close()
        assert all(map(torch.equal, before, rows_of(model))) != ordered
        assert not any(layer._forward_pre_hooks for layer in layers(model))


@pytest.mark.parametrize("autocast", [False, True])
def test_second_moments_of_pooled_inputs_in_any_dtype(autocast):
    model = adapted(llama(torch.bfloat16), method="qbara", r=4)
    layer = layers(model)[0]
    watch = Watch(layer, "default")
    assert not watch.stop().any()
    watch, x = Watch(layer, "default"), torch.randn(3, 5, 64).bfloat16()
    layer.set_rank("default", 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer(x[:2])
        layer(x[2:])
    moments = watch.stop()
    layer(x)  # nobody watches
    z = pool(x.double(), 2).flatten(0, 1) @ layer.anyrank_A["default"].detach().double().T
    assert moments.dtype == torch.float32
    assert torch.allclose(moments.double(), z.T @ z, rtol=0.02, atol=0.02 * float(z.square().max()))


def test_each_rank_moves_its_own_rows_at_its_own_speed():
    model = adapted(llama(), method="anyrank", r=8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LR)
    plan = anyrank.RankPlan(model, optimizer, total=10, seed=0)
    a = layers(model)[0].anyrank_A["default"]
    for number in (7, 8, 9):
        draw = plan.begin(number)
        assert sorted(draw.ranks) == [1, 1, 2, 4, 8, 8]
        for i, rank in enumerate(draw.ranks):
            assert plan.use(i) == rank
            model(IDS, labels=IDS).loss.backward()
            before, gradient = a.detach().clone(), a.grad.clone()
            optimizer.step()
            optimizer.zero_grad()
            wanted = before - draw.speeds[rank] * LR * gradient
            assert torch.allclose(a[:rank], wanted[:rank], atol=1e-7, rtol=1e-6)
            assert torch.equal(a[rank:], before[rank:])
            assert gradient[:rank].any()


@pytest.mark.parametrize(
    ("parts", "together", "speed"),
    [(4, False, 0.5), (16, False, 0.25), (1, False, 1), (4, True, 1)],
)
def test_a_step_of_a_micro_batch_goes_as_far_as_the_root_of_its_share(parts, together, speed):
    model = adapted(llama(), method="anyrank", r=8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LR)
    plan = anyrank.RankPlan(model, optimizer, total=10, seed=0)
    plan.parts, plan.together = parts, together
    b = layers(model)[0].anyrank_B["default"]
    plan.begin(0)
    assert plan.use(0) == 8
    model(IDS, labels=IDS).loss.backward()
    before, gradient = b.detach().clone(), b.grad.clone()
    optimizer.step()
    assert torch.allclose(b, before - speed * LR * gradient, atol=1e-7, rtol=1e-6)
    assert gradient.any()


def test_what_is_trained_beside_the_adapter_goes_at_the_rate_of_a_part():
    model = adapted(llama(), method="anyrank", r=8, modules_to_save=["lm_head"])
    head = model.get_output_embeddings().modules_to_save["default"].weight
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LR)
    plan = anyrank.RankPlan(model, optimizer, total=10, seed=0)
    plan.parts = 4
    for number in (6, 7):
        draw = plan.begin(number)
        for i, rank in enumerate(draw.ranks):
            plan.use(i)
            model(IDS, labels=IDS).loss.backward()
            before, gradient = head.detach().clone(), head.grad.clone()
            optimizer.step()
            optimizer.zero_grad()
            speed = draw.speeds[8] if rank == 8 and number == 7 else 0.5
            assert torch.allclose(head, before - speed * LR * gradient, atol=1e-7, rtol=1e-6)
            assert gradient.any()
            assert [group["lr"] for group in optimizer.param_groups] == [LR]
            assert OWN_RATE not in optimizer.param_groups[0]


def test_two_adapters_do_not_slow_each_other_down():
    model = adapted(llama(), method="anyrank", r=8)
    model.add_adapter("other", config("anyrank", 4))
    fill(model)
    model.base_model.set_adapter(["default", "other"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LR)
    plans = [
        anyrank.RankPlan(model, optimizer, total=10, seed=0, adapter_name=name)
        for name in ("default", "other")
    ]
    for number in (0, 7):
        for plan in plans:
            plan.parts = 4
            plan.begin(number)
        for i in range(6):
            ranks = [plan.use(i) for plan in plans]
            model(IDS, labels=IDS).loss.backward()
            b = [layers(model)[0].anyrank_B[plan.name] for plan in plans]
            before, gradients = [x.detach().clone() for x in b], [x.grad.clone() for x in b]
            optimizer.step()
            optimizer.zero_grad()
            for plan, rank, x, old, g in zip(plans, ranks, b, before, gradients, strict=True):
                speed = plan._draw.speeds.get(rank, 0.5)
                wanted = old[:, :rank] - speed * LR * g[:, :rank]
                assert torch.allclose(x[:, :rank], wanted, atol=1e-7, rtol=1e-6)
                assert torch.equal(x[:, rank:], old[:, rank:])
            assert [group["lr"] for group in optimizer.param_groups] == [LR]


def test_an_optimizer_that_finds_its_rate_itself_is_moved_by_the_speed():
    found = []
    for parts in (1, 4):
        model = adapted(llama(), method="anyrank", r=8)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = Adafactor(trained, lr=None, relative_step=True, scale_parameter=False)
        plan = anyrank.RankPlan(model, optimizer, total=10, seed=0)
        plan.parts = parts
        plan.begin(0)
        plan.use(0)
        model(IDS, labels=IDS).loss.backward()
        before = rows_of(model)[0]
        optimizer.step()
        found.append(rows_of(model)[0] - before)
        assert optimizer.param_groups[0]["lr"] is None
    whole, part = found
    assert whole.any()
    assert torch.allclose(part, whole / 2, atol=1e-6)


def test_ranks_that_share_a_step_move_at_the_usual_speed():
    model = adapted(llama(), method="anyrank", r=8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LR)
    plan = anyrank.RankPlan(model, optimizer, total=10, seed=0)
    plan.together = True
    plan.begin(7)
    assert not plan.apart
    for i in range(4):
        plan.use(i)
        model(IDS, labels=IDS).loss.backward()
    a = layers(model)[0].anyrank_A["default"]
    wanted = a.detach() - LR * a.grad
    optimizer.step()
    assert torch.allclose(a, wanted, atol=1e-7)


def test_a_plan_that_is_closed_leaves_the_optimizer_alone_and_the_whole_rank_in_use():
    model = adapted(llama(), r=8)
    optimizer = optimizer_of("adamw", model)
    plan = anyrank.RankPlan(model, optimizer, total=4, seed=0)
    step(model, plan, optimizer, 0)
    plan.close()
    assert {layer.adapters["default"].rank for layer in layers(model)} == {8}
    before = rows_of(model)[0]
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert all(not torch.equal(*pair) for pair in zip(before, rows_of(model)[0], strict=True))


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    finals = []
    for seed in (0, 0, 1):
        model = adapted(llama(), r=8)
        optimizer = optimizer_of("adamw", model)
        plan = anyrank.RankPlan(model, optimizer, total=5, seed=seed)
        for number in range(5):
            step(model, plan, optimizer, number)
        finals.append(torch.cat([r.flatten() for r in rows_of(model)]))
    assert torch.equal(finals[0], finals[1])
    assert not torch.equal(finals[0], finals[2])


def test_a_model_without_an_adapter_is_refused():
    with pytest.raises(ConfigError) as error:
        anyrank.RankPlan(llama(), None, total=1, seed=0)
    assert str(error.value) == (
        "adapter 'default' is no low-rank anyrank adapter of this model; it has none; use "
        "get_peft_model(model, AnyRankConfig(...)) first"
    )


def test_an_optimizer_that_is_none_of_torch_is_refused():
    with pytest.raises(ConfigError, match="ranks are drawn around the steps of a torch optimizer"):
        anyrank.RankPlan(adapted(llama()), object(), total=1, seed=0)


def test_an_optimizer_that_was_built_too_early_is_refused():
    base = llama()
    optimizer = torch.optim.AdamW(base.parameters())
    with pytest.raises(ConfigError) as error:
        anyrank.RankPlan(adapted(base), optimizer, total=1, seed=0)
    assert str(error.value) == (
        "adapter 'default': the optimizer holds none of its parameters; build the optimizer after "
        "get_peft_model"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["PagedAdamW8bit", "PagedAdamW32bit"])
def test_rows_that_were_not_drawn_do_not_move_under_paged_optimizers(name):
    import bitsandbytes

    model = adapted(llama(), r=8).to("cuda")
    trained = [p for p in model.parameters() if p.requires_grad]
    kind = getattr(bitsandbytes.optim, name)
    optimizer = kind(trained, lr=LR, weight_decay=0.1, min_8bit_size=64)
    plan = anyrank.RankPlan(model, optimizer, total=6, seed=0)
    ids = IDS.to("cuda")
    for number in range(6):
        before = rows_of(model)
        for _ in plan.ranks(number):
            model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        stop = plan.schedule(number, 6, 0).trained.stop
        for old, new in zip(before, rows_of(model), strict=True):
            assert torch.equal(old[stop:], new[stop:])
            assert not torch.equal(old[:stop], new[:stop])
