"""The stack is what it says: the models' own block, and the same whole or in shards."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from fusion_core.bench import shapes
from fusion_core.bench.shapes import SHAPES
from fusion_core.bench.stack import Stack, tokens
from fusion_core.workers import WorkerPool
from tests.benching.stack_jobs import BATCH, CONTEXT, CPU, LAYERS, sharded, stack

SHAPE = SHAPES["tiny"]
FAMILIES = {"llama": SHAPE, "mistral": SHAPE, "qwen3": dataclasses.replace(SHAPE, qk_norm=True)}


def theirs(family, shape, made):
    """The family's own model, with the weights and the cache of a stack."""
    import transformers

    config = getattr(transformers, f"{family.capitalize()}Config")(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_hidden_layers=LAYERS,
        rms_norm_eps=shape.eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        vocab_size=8,
        sliding_window=None,
    )
    model = getattr(transformers, f"{family.capitalize()}Model")(config).eval()
    cache = transformers.DynamicCache(config=config)
    heads = [shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.head_dim]
    for index, (block, layer) in enumerate(zip(made.blocks, model.layers, strict=True)):
        attention, mlp = layer.self_attn, layer.mlp
        pairs = [
            *zip(
                (attention.q_proj, attention.k_proj, attention.v_proj),
                block.attention.qkv.weight.split(heads),
                strict=True,
            ),
            *zip((mlp.gate_proj, mlp.up_proj), block.mlp.gate_up.weight.chunk(2), strict=True),
            (attention.o_proj, block.attention.out.weight),
            (mlp.down_proj, block.mlp.down.weight),
            (layer.input_layernorm, block.attention_norm.weight),
            (layer.post_attention_layernorm, block.mlp_norm.weight),
        ]
        if shape.qk_norm:
            pairs += [
                (attention.q_norm, block.attention.query_norm.weight),
                (attention.k_norm, block.attention.key_norm.weight),
            ]
        for module, weight in pairs:
            module.weight.data.copy_(weight)
        past = [cached[:, :-1].transpose(1, 2) for cached in (block.attention.key, block.attention.value)]
        cache.update(*past, index)
    model.norm.weight.data.copy_(made.norm.weight)
    return lambda x: model(
        inputs_embeds=x.unsqueeze(1), past_key_values=cache, position_ids=torch.full((BATCH, 1), CONTEXT - 1)
    ).last_hidden_state[:, 0]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_gives_what_the_familys_own_model_gives(family, monkeypatch):
    shape = FAMILIES[family]
    monkeypatch.setattr(shapes, "SHAPES", {"tiny": shape})
    made = Stack(shape, LAYERS, BATCH, CONTEXT, dist.group.WORLD, CPU).float()
    x = tokens(shape, BATCH, CPU).float()
    expected = theirs(family, shape, made)(x)
    # ours has cosines and sines in bfloat16, as models that run in it do
    torch.testing.assert_close(made(x), expected, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("one_rank")
@torch.no_grad()
def test_a_step_can_be_repeated_and_a_smaller_batch_is_the_first_rows():
    made, x = stack(), tokens(SHAPE, BATCH, CPU).float()
    whole = made(x)
    assert torch.equal(made(x), whole)
    torch.testing.assert_close(made(x[:2]), whole[:2])
    assert whole.isfinite().all()
    assert 0.5 < whole.std() < 2


def joined(parts, name):
    """One tensor of what two ranks have of it."""
    one, other = parts
    kind = name.rpartition("attention.")[2] if "attention." in name else name.rpartition("mlp.")[2]
    if kind == "qkv.weight":
        widths = [size // 2 * SHAPE.head_dim for size in (SHAPE.heads, SHAPE.kv_heads, SHAPE.kv_heads)]
        return torch.cat([part for pair in zip(one.split(widths), other.split(widths), strict=True) for part in pair])
    if kind == "gate_up.weight":
        return torch.cat([part for pair in zip(one.chunk(2), other.chunk(2), strict=True) for part in pair])
    if kind in ("out.weight", "down.weight"):
        return torch.cat(parts, dim=1)
    if kind in ("key", "value"):
        return torch.cat(parts, dim=2)
    assert torch.equal(one, other), name  # norms, the position, the rotation
    return one


@pytest.mark.usefixtures("one_rank")
@torch.no_grad()
def test_two_ranks_give_together_what_one_gives_with_the_weights_of_both():
    with WorkerPool(2) as pool:
        states, results = zip(*pool.run(sharded), strict=True)
    assert torch.equal(*results)
    assert not torch.equal(*(state["blocks.0.mlp.down.weight"] for state in states))
    made = stack()
    made.load_state_dict({name: joined([state[name] for state in states], name) for name in states[0]})
    torch.testing.assert_close(made(tokens(SHAPE, BATCH, CPU).float()), results[0], rtol=1e-4, atol=1e-4)
