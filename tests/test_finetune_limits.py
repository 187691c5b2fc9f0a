"""Fine-tuning from another task's weights, and every way to learn less than all of them."""

import copy

import pytest
import torch
import torch.nn as nn
from finetuning import B, C, L, T, V, batch_of, inputs, losses_in, model_of

import finetune
import optim
from finetune import LoRA, add_adapters, freeze, merged_state, rate_scale, take_weights

# ---- weights of another task ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "old,new,fresh",
    [
        ("bert", "classify", {"head.weight", "head.bias"}),
        ("masked", "classify", {"head.weight", "head.bias", "pooler.weight", "pooler.bias"}),
        ("bert", "tag", {"head.weight", "head.bias"}),
        ("bert", "similar", set()),
        ("classify", "tag", {"head.weight", "head.bias"}),
        ("answer", "classify", {"head.weight", "head.bias", "pooler.weight", "pooler.bias"}),
        ("classify", "masked", {"mlm_dense.weight", "mlm_dense.bias", "mlm_norm.weight"}
         | {"mlm_norm.bias", "mlm_bias"}),
        ("complete", "complete", set()),
    ],
)  # fmt: skip
def test_all_but_the_last_matrix_is_taken_from_another_task(old, new, fresh):
    """A head of the same shape was once taken for the labels of another task."""
    old, new = model_of(old), model_of(new)
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    assert take_weights(new, old.state_dict()) == sorted(fresh)
    for name, tensor in new.state_dict().items():
        assert torch.equal(tensor, before[name] if name in fresh else old.state_dict()[name]), name


def test_weights_that_do_not_fit_are_named():
    state = model_of("bert").state_dict()
    wrong = {
        "blocks.1.mlp.fc.weight": {**state, "blocks.1.mlp.fc.weight": torch.zeros(3, 3)},
        "blocks.0.cross.q.weight": {**state, "blocks.0.cross.q.weight": torch.zeros(3)},
        "embedding_norm.bias": {k: v for k, v in state.items() if k != "embedding_norm.bias"},
        "pooler.weight": {**state, "pooler.weight": torch.zeros(3, C)},
    }
    for name, broken in wrong.items():
        with pytest.raises(ValueError, match=rf"do not fit together: {name}$"):
            take_weights(model_of("classify"), broken)


# ---- what learns ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["classify", "complete"])
@pytest.mark.parametrize("what,blocks", [("embeddings", 0), ("1", 1), ("2", 2), ("3", 3)])
def test_exactly_what_is_named_is_frozen(task, what, blocks):
    model = model_of(task)
    freeze(model, what)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    embeddings = {"token_embedding.weight", "position_embedding.weight"}
    if task == "classify":
        embeddings |= {"segment_embedding.weight", "embedding_norm.weight", "embedding_norm.bias"}
    below = {n for n, _ in model.named_parameters() if n.startswith("blocks.")}
    below = {n for n in below if int(n.split(".")[1]) < blocks}
    assert frozen == embeddings | below and len(below) == blocks * 16


@pytest.mark.parametrize("what", ["0", "4", "-1", "²", "blocks", "1.5"])
def test_what_cannot_be_frozen_is_refused(what):
    with pytest.raises(ValueError, match=rf"--freeze {what} is not known: .* or 1 to 3$"):
        freeze(model_of("classify"), what)


def test_a_model_without_a_head_keeps_something_to_learn():
    freeze(model_of("similar"), "2")
    with pytest.raises(ValueError, match="--freeze 3 leaves nothing that learns"):
        freeze(model_of("similar"), "3")


def test_rates_fall_from_the_heads_to_the_embeddings():
    scale = rate_scale(model_of("classify"), 0.5)
    for name, want in {
        "head.weight": 1.0,
        "pooler.bias": 1.0,
        "norm.weight": 1.0,
        "blocks.2.mlp.fc.weight": 0.5,
        "blocks.1.attention.q.down": 0.25,
        "blocks.0.attention_norm.weight": 0.125,
        "embedding_norm.weight": 0.0625,
        "token_embedding.weight": 0.0625,
    }.items():
        assert scale(name) == want, name


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "muon"])
def test_a_scaled_rate_scales_the_step(optimizer):
    """One step beside one at the full rate, parameter by parameter."""
    steps = []
    for decay in (1.0, 0.5):
        torch.manual_seed(3)
        model = model_of("classify")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        scale = rate_scale(model, decay)
        made = optim.make_optimizer(model, optimizer, lr=0.01, rate_scale=scale)
        for group in made.param_groups:
            group["lr"] = 0.01 * group["lr_scale"]
        losses_in(model(**batch_of("classify"))).backward()
        made.step()
        steps.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    for name, whole in steps[0].items():
        # Relative to Adam's epsilon, the keys' biases have no gradient: rounding decides there.
        if not name.endswith(".k.bias"):
            want = whole * scale(name)
            torch.testing.assert_close(steps[1][name], want, atol=2e-6, rtol=1e-3, msg=name)
            assert whole.abs().max() > 1e-4, name


# ---- low-rank adapters ---------------------------------------------------------------------------


def adapted(task: str, **changes) -> tuple[nn.Module, nn.Module]:
    """A model, and the same with adapters of rank 3."""
    plain = model_of(task, **changes)
    model = copy.deepcopy(plain)
    add_adapters(model, 3)
    return plain, model.eval()


def run(model: nn.Module, task: str) -> torch.Tensor:
    torch.manual_seed(5)
    if task == "complete":
        return model(torch.randint(V, (B, T)))
    return model(**inputs(batch_of(task)))


@pytest.mark.parametrize("task", ["classify", "tag", "answer", "similar", "complete"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype,near", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
def test_adapters_begin_as_nothing_and_end_as_ordinary_weights(
    task, bias, dtype, near, monkeypatch
):
    if dtype == torch.float64:  # heads give fp32, which is there for bf16: not here
        monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    plain, model = adapted(task, bias=bias)
    assert torch.equal(run(plain, task), run(model, task))
    for module in model.modules():
        if isinstance(module, LoRA):
            nn.init.normal_(module.down, std=0.1)
            nn.init.normal_(module.up, std=0.1)
    model, plain = model.to(dtype), plain.to(dtype)
    changed, before = run(model, task), run(plain, task)
    state = merged_state(model.state_dict())
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    finite = changed.isfinite()  # an answer is never at padding
    got, scale = run(plain, task)[finite], changed[finite].abs().max()
    torch.testing.assert_close(got / scale, changed[finite] / scale, atol=near, rtol=0)
    assert (changed - before)[finite].abs().max() > 0.01


@pytest.mark.parametrize("task", ["classify", "similar"])
def test_only_adapters_and_heads_learn(task):
    _, model = adapted(task)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    want = {
        f"blocks.{i}.attention.{x}.{part}"
        for i in range(L)
        for x in "qv"
        for part in ("down", "up")
    }
    heads = {"pooler.weight", "pooler.bias", "head.weight", "head.bias"}
    assert learning == want | (heads if task == "classify" else set())
    model(**batch_of(task))["loss"].backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == learning
    by_hand = model.blocks[0].attention.q
    x = torch.randn(7, C)
    nn.init.normal_(by_hand.up)
    want = x @ by_hand.linear.weight.T + by_hand.linear.bias + 2 * x @ by_hand.down.T @ by_hand.up.T
    torch.testing.assert_close(by_hand(x), want, atol=1e-4, rtol=1e-4)
    assert finetune.adapter_rank(model.state_dict()) == 3
    assert finetune.adapter_rank(model_of(task).state_dict()) == 0
