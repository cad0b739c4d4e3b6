"""Policies of memory: the same gradients, what each keeps, which plan is chosen, and with what it goes together."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import product

import lower_models as models
import pytest
import torch
import torch.distributed as dist
from lower_models import close, gemma, ids, llama, mistral, outcome, qwen2, qwen3, stir
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import rankshift as rs
from laws.pool import Pool
from rankshift.core import shard
from rankshift.core.errors import ConfigError
from rankshift.lower import nodes
from rankshift.lower.llama import block_of
from rankshift.lower.memory import POLICIES, Memory, Plan, Sizes, budget_of, planned

METHODS = {
    "lora": rs.LoRA(rank=4, alpha=8),
    "lora-patterns": rs.LoRA(rank=2, rank_pattern={"k_proj": 5}, targets=("k_proj", "v_proj", "up_proj", "down_proj")),
    "lora-fa": rs.LoRA(rank=4, train="B"),
    "dora": rs.LoRA(rank=4, dora=True),
    "dora-some": rs.LoRA(rank=2, dora=True, targets=("q_proj", "o_proj", "gate_proj")),
    "lora-room": rs.LoRA(rank=16),  # A stands below the weights
    "vera": rs.VeRA(rank=8),
    "paca": rs.PaCA(rank=3),
    "sora": rs.SoRA(rank=4, gate_init="normal"),
}
COUNTS = {policy: tuple(2 * (policy == other) for other in POLICIES) for policy in POLICIES}
MIXED = {"offload and keep": (1, 0, 0, 1), "block and gate_up": (0, 1, 1, 0)}


def begun(method=None, make=llama, **more):
    model = make(**more)
    run = rs.attach(model, method or METHODS["lora"], total_steps=8)
    stir(run)
    return model, run


def force(report, counts):
    """Let the report's model go by this plan."""
    report.budget.plans.clear()
    report.budget.now = None
    report.budget._planned = lambda sizes, layer: Plan(sizes, counts, 0, 1)


def bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- the same gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [*COUNTS.values(), *MIXED.values()], ids=[*COUNTS, *MIXED])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_the_same_bits(name, counts):
    for dtype in (torch.float32, torch.float64):
        model, run = begun(METHODS[name], dtype=dtype)
        run.lower()
        without = outcome(model, run)
        report = run.lower(memory_budget="auto")
        force(report, COUNTS["keep"])
        everything = outcome(model, run)
        torch.testing.assert_close(everything, without)
        force(report, counts)
        bits(outcome(model, run), everything)
        assert report.budget.now.counts == counts
        assert not report.aside


@pytest.mark.parametrize("make", [llama, mistral, gemma, qwen2, qwen3])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_families_and_masks(make, attn):
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 5 + [0] * 4, [1] * 9])
    model, run = begun(None, make, attn=attn, dtype=torch.bfloat16)
    for batch in ({}, {"attention_mask": mask}):
        report = run.lower(memory_budget="auto")
        force(report, COUNTS["keep"])
        everything = outcome(model, run, **batch)
        for counts in (*COUNTS.values(), *MIXED.values()):
            report = run.lower(memory_budget="auto")
            force(report, counts)
            bits(outcome(model, run, **batch), everything)


@pytest.mark.parametrize("policy", POLICIES)
def test_dora_with_biases(policy):
    model, run = begun(METHODS["dora"], attention_bias=True, mlp_bias=True, dtype=torch.float64)
    plain = outcome(model, run)
    report = run.lower(memory_budget="auto")
    force(report, COUNTS[policy])
    close(outcome(model, run), plain)
    assert not report.aside


@pytest.mark.parametrize("policy", POLICIES)
def test_autocast(policy):
    model, run = begun(dtype=torch.bfloat16, attn="eager")
    with torch.autocast("cpu", torch.bfloat16):
        run.lower()
        everything = model(input_ids=ids(), labels=ids()).loss
    everything.backward()
    grads = {name: p.grad for name, p in run.trainable()}
    model.zero_grad()
    force(run.lower(memory_budget="auto"), COUNTS[policy])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward()
    bits({name: p.grad for name, p in run.trainable()}, grads)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_backward_after_the_forward_of_another_adapter(policy):
    """Whose A then stands below the weights."""

    def found(model, run):
        losses = []
        for i, name in enumerate(("default", "other")):
            run.use(name)
            losses.append(model(input_ids=ids(i), labels=ids(i)).loss)
        for site in run.sites.values():
            site.adapters.requires_grad_(True)  # use() froze those of the first forward
        (losses[0] + 2 * losses[1]).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return grads

    model, run = begun(METHODS["lora-room"])
    run.add("other", METHODS["lora-room"])
    run.use("other")
    stir(run)
    with torch.no_grad():
        for _, p in run.trainable():
            p.mul_(-1.5)  # else it is the first
    plain = found(model, run)
    force(run.lower(memory_budget="auto"), COUNTS[policy])
    close(found(model, run), plain)


@pytest.mark.parametrize("policy", POLICIES)
def test_steps_accumulate_and_graphs_are_kept(policy):
    def found(model, run):
        losses = [model(input_ids=ids(i), labels=ids(i)).loss for i in range(3)]  # all forwards first
        for loss in losses[1:]:
            loss.backward()
        losses[0].backward(retain_graph=True)
        losses[0].backward()
        grads = {name: p.grad.clone() for name, p in run.trainable()}
        model.zero_grad()
        return grads

    model, run = begun()
    report = run.lower(memory_budget="auto")
    force(report, COUNTS["keep"])
    everything = found(model, run)
    force(report, COUNTS[policy])
    bits(found(model, run), everything)


def test_a_parameter_changed_between_forward_and_backward_is_an_error():
    for policy in POLICIES:
        model, run = begun()
        force(run.lower(memory_budget="auto"), COUNTS[policy])
        loss = model(input_ids=ids(), labels=ids()).loss
        run.optimizer(lr=1e-3)
        with torch.no_grad():
            for adapter in run.adapter().values():
                adapter.base.weight.add_(1)
                adapter.A.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_hooks_of_parameters_run_once():
    for policy in POLICIES:
        model, run = begun()
        force(run.lower(memory_budget="auto"), COUNTS[policy])
        seen: list[str] = []
        for name, p in run.trainable():
            p.register_hook(lambda grad, name=name, seen=seen: seen.append(name))
        model(input_ids=ids(), labels=ids()).loss.backward()
        assert sorted(seen) == sorted(name for name, _ in run.trainable())


# ---- what is kept ---------------------------------------------------------------------------------------------------


class Ledger:
    """Bytes that autograd keeps, now and at most, without parameters, inputs and tables."""

    def __init__(self, model, batch):
        given = (*model.parameters(), *model.buffers(), *batch.values())
        self.own = {t.untyped_storage().data_ptr() for t in given}
        self.alive: dict[int, list[int]] = {}
        self.most = 0

    def pack(self, tensor):
        return Entry(self, tensor)

    @property
    def now(self):
        return sum(size for _, size in self.alive.values())


class Entry:
    def __init__(self, ledger, tensor):
        self.ledger, self.tensor, storage = ledger, tensor, tensor.untyped_storage()
        self.key = storage.data_ptr()
        if self.key not in ledger.own:
            ledger.alive.setdefault(self.key, [0, storage.nbytes()])[0] += 1
            ledger.most = max(ledger.most, ledger.now)

    def __del__(self):
        if self.key in self.ledger.alive:
            count = self.ledger.alive[self.key]
            count[0] -= 1
            if not count[0]:
                del self.ledger.alive[self.key]


def saved(counts, length, method="lora", layers=4, make=llama, **more):
    """Bytes kept when the forward is over, and at most; and the sizes that the plan was made of."""
    model, run = begun(METHODS[method], make, num_hidden_layers=layers, max_position_embeddings=256, **more)
    report = run.lower(memory_budget="auto")
    force(report, counts)
    batch = {"input_ids": ids(length=length)}
    ledger = Ledger(model, batch)
    with torch.autograd.graph.saved_tensors_hooks(ledger.pack, lambda entry: entry.tensor):
        out = model(**batch).logits.sum()
        forward = ledger.now
        out.backward()
    assert not ledger.alive
    return forward, ledger.most, report.budget.now.sizes


DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def grown(counts, **how):
    """Bytes kept by the blocks of one token more: after the forward, and at most."""
    (a, b, _), (c, d, sizes) = (saved(counts, length, **how) for length in (100, 200))
    return (c - a) / 300, (d - b) / 300, sizes


@pytest.mark.parametrize(
    ("method", "make"), [(name, llama) for name in ("lora", "paca", "vera", "dora", "dora-some")] + [("lora", qwen3)]
)
@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_block_keeps(policy, method, make):
    for dtype in DTYPES:
        more = {"num_key_value_heads": 4, "dtype": dtype, "make": make}
        more |= {"use_sliding_window": False} if make is qwen3 else {}
        at = POLICIES.index(policy)
        few, many = (grown(tuple(n * (i == at) for i in range(4)), method=method, layers=n, **more)[0] for n in (2, 4))
        sizes = saved(COUNTS[policy], 8, method=method, layers=2, **more)[2]
        assert sizes.repeated is sizes.weighed is False
        assert (many - few) / 2 == pytest.approx(sizes.kept(policy), rel=0.01, abs=0.5)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_weights_of_attention_and_repeated_keys(attn):
    for dtype in (torch.float32, torch.bfloat16):
        few, many = (saved((0, 0, 0, n), 200, layers=n, attn=attn, dtype=dtype) for n in (2, 4))
        each = (many[0] - few[0]) / 2 / 600
        assert each == pytest.approx(few[2].kept("keep"), rel=0.05)


@pytest.mark.parametrize("counts", [(4, 0, 0, 0), (0, 4, 0, 0), (0, 0, 4, 0), (0, 0, 0, 4), (1, 1, 1, 1), (0, 3, 0, 1)])
def test_what_is_kept_at_most(counts):
    forward, most, sizes = grown(counts, num_key_value_heads=4)
    kept = [sizes.kept(policy) for policy in POLICIES]
    again = [sizes.kept("keep") - sizes.kept(policy) if policy in ("offload", "block") else 0 for policy in POLICIES]
    alive = found = 0
    for i, count in enumerate(counts):
        alive += count * kept[i]
        found = max(found, alive + again[i]) if count else found
    beside = sizes.element * (sizes.width + 2 * 8 / 3) + 4  # the last norm's, and the tables, for three sequences
    assert forward == pytest.approx(alive + beside, rel=0.05)
    assert most == pytest.approx(max(found, alive + beside), rel=0.05)


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_of_gate_and_up_go_where_these_are(policy, monkeypatch):
    """But not where they are kept: a second backward reads them again."""
    seen = []

    def back(dh, g, u, *args, out, **kwargs):
        seen.append([a.data_ptr() == b.data_ptr() for a, b in zip((g, u), out, strict=True)])
        return own(dh, g, u, *args, out=out, **kwargs)

    own = nodes.swiglu_back
    monkeypatch.setattr(nodes, "swiglu_back", back)
    model, run = begun()
    force(run.lower(memory_budget="auto"), COUNTS[policy])
    train(run, model)
    assert seen == [[policy != "keep"] * 2] * 2


# ---- plans ----------------------------------------------------------------------------------------------------------

EIGHT = Sizes(
    tokens=8192, length=8192, element=2, width=4096, queries=4096, keys=1024, hidden=14336, heads=32, repeated=False,
    weighed=False, low=(48, 16, 32, 16), picked=0, unpacked=0, head=128256,
)  # fmt: skip
GIB = 2**30


def test_bytes_of_the_8b_shape():
    """As PERFORMANCE's table counts them, per token and block, without Z."""
    bare = Sizes(**{**vars(EIGHT), "low": (0, 0, 0, 0)})
    assert bare.kept("keep") == 92 * 1024 + 4 * 32 + 8
    assert bare.kept("gate_up") == 36 * 1024 + 4 * 32 + 8
    assert bare.kept("block") == 8 * 1024
    assert bare.kept("offload") == 0
    assert bare.passing("keep") == (2 * 8 + 3 * 28) * 1024
    assert bare.passing("block") == (2 * 8 + 28) * 1024


@pytest.mark.parametrize("counts", [(0, 0, 0, 5), (5, 0, 0, 0), (2, 1, 1, 1), (0, 3, 0, 2), (1, 0, 4, 0)])
def test_what_a_step_needs(counts):
    """Block by block: all that blocks have kept when one's backward comes, and what that needs."""
    blocks = [policy for policy, count in zip(POLICIES, counts, strict=True) for _ in range(count)]
    kept = [EIGHT.kept(policy) for policy in blocks]
    most = [sum(kept[: i + 1]) + EIGHT.rebuilt(policy) + EIGHT.passing(policy) for i, policy in enumerate(blocks)]
    head = EIGHT.at_the_head() / EIGHT.tokens
    assert EIGHT.need(counts) == pytest.approx(EIGHT.tokens * max(*most, sum(kept) + head))


def test_all_is_kept_where_it_fits():
    need = EIGHT.need((0, 0, 0, 32))
    assert planned(EIGHT, 32, need).counts == (0, 0, 0, 32)
    assert planned(EIGHT, 32, need - 1).counts != (0, 0, 0, 32)


@pytest.mark.parametrize("gib", [30, 24, 18, 12, 6, 4])
def test_the_cheapest_that_fits(gib):
    plan = planned(EIGHT, 8, gib * GIB / 4, beside=GIB // 8)
    assert sum(plan.counts) == 8
    costs = {
        counts: sum(n * EIGHT.cost(policy) for n, policy in zip(counts, POLICIES, strict=True))
        for counts in product(range(9), repeat=4)
        if sum(counts) == 8 and EIGHT.need(counts) + GIB // 8 <= gib * GIB / 4
    }
    if costs:
        assert plan.need <= plan.free
        assert costs[plan.counts] == min(costs.values())
    else:
        assert plan.need > plan.free
        assert plan.need == EIGHT.need((8, 0, 0, 0)) + GIB // 8
        assert "more than there is" in str(plan)


def test_inputs_on_the_host_fit_there():
    one = 8192 * 4096 * 2
    free = EIGHT.need((8, 0, 0, 0))
    assert planned(EIGHT, 8, free).counts[0] > 2
    assert planned(EIGHT, 8, free, host=2.5 * one).counts[0] <= 2
    assert planned(EIGHT, 8, 0, host=0).counts[0] == 0


def test_more_room_never_costs_more():
    costs = []
    for gib in range(2, 60, 2):
        plan = planned(EIGHT, 32, gib * GIB)
        costs.append(sum(n * EIGHT.cost(policy) for n, policy in zip(plan.counts, POLICIES, strict=True)))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0 < costs[0]


def test_blocks_that_keep_most_come_last():
    plan = Plan(EIGHT, (1, 2, 0, 1), 0, 1)
    assert [plan.policy(i) for i in range(4)] == ["offload", "block", "block", "keep"]


def test_budgets():
    assert budget_of("auto") is None
    assert budget_of("40GiB") == 40 * GIB
    assert budget_of("1.5 MiB") == 3 * 2**19
    for wrong in ("40", "40 GB", "automatic", "", "-3GiB", 40):
        with pytest.raises(ConfigError, match="40GiB"):
            budget_of(wrong)


# ---- with a model ---------------------------------------------------------------------------------------------------


def train(run, model, length=64):
    model(input_ids=ids(length=length), labels=ids(length=length)).loss.backward()
    model.zero_grad()


def test_a_budget_decides():
    model, run = begun(num_hidden_layers=6)
    weights = 6 * sum(p.nbytes for p in model.model.layers[0].parameters())
    seen = []
    for kib in (4000, 1200, 900, 700, 10):
        report = run.lower(memory_budget=f"{(weights + kib * 1024) / 1024:.0f}KiB")
        assert report.memory is None
        train(run, model)
        plan = report.budget.now
        assert plan.need <= plan.free or kib == 10
        assert f"at 192 tokens: {'6 kept' if kib == 4000 else ''}" in report.memory
        assert report.memory in str(report)
        seen.append(plan.counts)
    assert seen[0] == (0, 0, 0, 6)
    assert len(set(seen)) >= 4


def test_a_plan_stays_for_its_size():
    model, run = begun()
    report = run.lower(memory_budget="auto")
    train(run, model)
    first = report.budget.now
    assert first.counts == (0, 0, 0, 2)
    train(run, model, 32)
    assert report.budget.now.sizes.tokens == 96
    report.budget._free = lambda layer: 0
    train(run, model)
    assert report.budget.now is first
    assert len(report.budget.plans) == 2


def test_too_little_is_said(caplog):
    model, run = begun()
    report = run.lower(memory_budget="1KiB")
    for _ in range(2):
        train(run, model)
    assert [r.message for r in caplog.records] == [f"Activations may not fit: {report.memory}."]


def test_nothing_is_planned_without_a_backward():
    model, run = begun()
    report = run.lower(memory_budget="1KiB")
    with torch.no_grad():
        model(input_ids=ids(), labels=ids())
    model.eval().generate(ids(), max_new_tokens=2)
    assert report.memory is None


def test_gradient_checkpointing_of_transformers_goes_before():
    model, run = begun()
    run.lower()
    everything = outcome(model, run)
    report = run.lower(memory_budget="1KiB")
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        bits(outcome(model, run), everything)
        assert report.memory is None
    model.gradient_checkpointing_disable()
    train(run, model)
    assert report.memory is not None


def test_what_cannot_be():
    model, run = begun()
    with pytest.raises(ConfigError, match="graphs=True"):
        run.lower(graphs=True, memory_budget="auto")
    with pytest.raises(ConfigError, match="40GiB"):
        run.lower(memory_budget="much")
    model, run = begun(attention_dropout=0.1)
    with pytest.raises(ConfigError, match=r"model\.layers\.0 has dropout"):
        run.lower(memory_budget="auto")
    assert not any("lowered" in vars(module) for module in model.modules())


def test_what_attends_to_a_cache_keeps_everything():
    """And its own keys and values are put there, once."""
    model, run = begun()
    found = []
    for budget in (None, "1KiB"):
        report = run.lower(memory_budget=budget)
        with torch.no_grad():
            cache = model.eval()(input_ids=ids(1, length=4), use_cache=True).past_key_values
        out = model.train()(input_ids=ids(), labels=ids(), past_key_values=cache)
        out.loss.backward()
        assert report.memory is None
        assert cache.get_seq_length() == 4 + models.LENGTH
        found.append({name: p.grad for name, p in run.trainable()})
        model.zero_grad()
    bits(*found)


def test_dropout_that_comes_later_keeps_blocks():
    model, run = begun()
    report = run.lower(memory_budget="1KiB")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    torch.manual_seed(0)
    found = outcome(model, run)
    assert report.memory is None
    run.lower()
    torch.manual_seed(0)
    bits(outcome(model, run), found)


def test_a_budget_goes_with_the_last_lowering():
    model, run = begun()
    run.lower(memory_budget="1KiB")
    assert isinstance(block_of(model.model.layers[0]).memory, Memory)
    report = run.lower()
    train(run, model)
    assert report.memory is None
    run.raise_()
    train(run, model)


def test_copies_and_pickles():
    model, run = begun()
    run.lower()
    everything = model(input_ids=ids(), labels=ids()).loss
    force(run.lower(memory_budget="auto"), COUNTS["offload"])
    train(run, model)
    del block_of(model.model.layers[0]).memory._planned  # a lambda
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        memories = {id(block_of(layer).memory) for layer in other.model.layers}
        assert len(memories) == 1
        assert block_of(model.model.layers[0]).memory is not block_of(other.model.layers[0]).memory
        loss = other(input_ids=ids(), labels=ids()).loss
        assert torch.equal(loss, everything)
        loss.backward()
    torch.save(model, io.BytesIO())


def test_a_classifier_and_a_bare_model_have_no_head():
    import transformers

    config = llama().config
    for kind in (transformers.LlamaForSequenceClassification, transformers.LlamaModel):
        model = kind(config).train()
        run = rs.attach(model, rs.LoRA(rank=2))
        report = run.lower(memory_budget="1KiB")
        model(input_ids=ids())[0].sum().backward()
        assert report.budget.now.sizes.head == 0


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu():
    """Gradients to the rounding of sums in another order; and bytes, as they were foretold."""
    shape = {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 2}
    more = shape | {"num_hidden_layers": 6, "max_position_embeddings": 8192, "use_cache": False}
    model, run = begun(dtype=torch.bfloat16, **more)
    model.cuda()
    batch = {"input_ids": ids(length=8192, size=1).cuda()}
    batch["labels"] = batch["input_ids"]
    grads, peaks, needs = {}, [], []
    for counts in ((6, 0, 0, 0), (0, 6, 0, 0), (0, 0, 6, 0), (0, 0, 0, 6), (2, 1, 1, 2)):
        report = run.lower(memory_budget="auto")
        force(report, counts)
        for _ in range(3):  # the first makes kernels
            model.zero_grad()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            model(**batch).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - held)
        needs.append(report.budget.now.sizes.need(counts))
        grads[counts] = {name: p.grad.float() for name, p in run.trainable()}
    for found in grads.values():
        close(found, grads[0, 0, 0, 6], 2e-2)
    print(*(f"{a / b:.3f}" for a, b in zip(peaks, needs, strict=True)))
    assert peaks[:4] == sorted(peaks[:4])
    for peak, need in zip(peaks, needs, strict=True):
        assert peak == pytest.approx(need, rel=0.15)


# ---- several processes ----------------------------------------------------------------------------------------------


@pytest.fixture(name="two", scope="module")
def two_fixture():
    pool = Pool(2)
    yield pool
    pool.stop()


def trained(engine, name, counts, accumulate=2):
    """Gradients of two updates and all parameters after them."""
    model = models.llama(dtype=torch.float64)
    run = rs.attach(model, METHODS[name], total_steps=4)
    stir(run)
    report = run.lower(memory_budget="auto")
    force(report, counts)
    wrapped = model
    if engine == "ddp":
        wrapped = DistributedDataParallel(model)
    elif engine == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = run.optimizer(lr=5e-3, eps=1e-4)
    found = {}
    for step in range(2):
        batch = ids(step, 8)
        batch = batch if engine == "one" else batch.chunk(2)[dist.get_rank()]
        for i, part in enumerate(batch.chunk(accumulate)):
            if isinstance(wrapped, FSDPModule):
                wrapped.set_requires_gradient_sync(i == accumulate - 1)
            (wrapped(input_ids=part, labels=part).loss / accumulate).backward()
        found |= {f"{step} {n}": shard.whole(p.grad).clone() for n, p in run.trainable()}
        optimizer.step()
        optimizer.zero_grad()
    assert report.budget.now.counts == counts
    assert not report.aside
    return found | {n: shard.whole(p).detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["lora", "paca", "vera", "dora"])
def test_two_processes_are_one(two, engine, name):
    alone = trained("one", name, COUNTS["keep"])
    for counts in (COUNTS["block"], COUNTS["offload"], (0, 1, 1, 0)):
        for ranks in two.run(trained, engine, name, counts):
            close(ranks, alone, 1e-9)
