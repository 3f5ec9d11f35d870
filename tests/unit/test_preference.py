"""Preferences: log-probabilities, losses, pairs in batches, against closed forms in float64 with all logits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arriero.adapters.prefix import PrefixConfig, apply_prefix, is_prefix, without_prefix
from arriero.data.batch import Batch
from arriero.data.order import StepOrder
from arriero.data.pairs import Pair, PreferenceSteps, pack_pairs, pair_batches
from arriero.data.sft import IGNORE, Example
from arriero.data.steps import DataShare
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.training import loss as loss_module
from arriero.training.evaluation import evaluate_loss
from arriero.training.execution import DirectExecution, Layers
from arriero.training.objectives.log_probabilities import linear_log_probabilities
from arriero.training.objectives.preference import Preference
from arriero.training.precision import Precision
from arriero.training.preference_data import reference_log_probabilities

CPU = torch.device("cpu")
VOCABULARY = 61
KINDS = {
    "dpo": Preference("dpo", beta=0.3),
    "cdpo": Preference("dpo", beta=0.3, label_smoothing=0.2),
    "ipo": Preference("ipo", beta=0.5),
    "orpo": Preference("orpo", odds_weight=0.7),
    "simpo": Preference("simpo", beta=2.0, gamma=0.4),
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig.from_dict(
        {
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 44,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
        }
    )
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    return made


def make_pairs(count: int, *, prompt: int = 20) -> list[Pair]:
    """Prompts of up to so many tokens, answers of 1 to 9."""
    generator = np.random.default_rng(5)

    def tokens(length: int) -> list[int]:
        return generator.integers(1, VOCABULARY, length).tolist()

    def row(begin: list[int], answer: list[int]) -> Example:
        ids = begin + answer
        return Example(ids, [IGNORE] * (len(begin) - 1) + answer + [IGNORE])

    pairs = []
    for number in range(count):
        begin = tokens(max(1, prompt - number))
        pairs.append(Pair(*(row(begin, tokens(int(generator.integers(1, 10)))) for _ in range(2))))
    return pairs


# Log-probabilities


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_log_probabilities_are_those_of_log_softmax(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk * VOCABULARY)
    torch.manual_seed(1)
    hidden, weight = torch.randn(2, 9, 16, requires_grad=True), torch.randn(VOCABULARY, 16, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (2, 9)).masked_fill(torch.rand(2, 9) < 0.3, IGNORE)
    found = linear_log_probabilities(hidden, weight, labels)
    upstream = torch.randn_like(found)
    gradients = torch.autograd.grad((found * upstream).sum(), (hidden, weight))
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    keep = labels != IGNORE
    everything = (wide[0] @ wide[1].T).log_softmax(-1)[keep]
    expected = everything.gather(1, labels[keep].unsqueeze(1)).squeeze(1)
    truths = torch.autograd.grad((expected * upstream.double()).sum(), wide)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    for gradient, truth in zip(gradients, truths, strict=True):
        torch.testing.assert_close(gradient.double(), truth, rtol=1e-5, atol=1e-5)


def test_log_probabilities_in_bfloat16_are_as_exact_as_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 3 * VOCABULARY)
    torch.manual_seed(2)
    hidden, weight = (torch.randn(n, 16).bfloat16().requires_grad_() for n in (7, VOCABULARY))
    labels = torch.randint(0, VOCABULARY, (7,))
    found = linear_log_probabilities(hidden, weight, labels)
    gradients = torch.autograd.grad(found.sum(), (hidden, weight))
    logits = (hidden @ weight.T).float()  # rounded as the kernel rounds them
    expected = logits.log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
    truths = torch.autograd.grad(expected.sum(), (hidden, weight))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for gradient, truth in zip(gradients, truths, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient, truth, rtol=2**-6, atol=2**-6)


def test_no_label_no_log_probability_but_a_gradient() -> None:
    hidden, weight = torch.randn(1, 3, 16, requires_grad=True), torch.randn(VOCABULARY, 16, requires_grad=True)
    found = linear_log_probabilities(hidden, weight, torch.full((1, 3), IGNORE))
    assert found.shape == (0,)
    assert all((g == 0).all() for g in torch.autograd.grad(found.sum(), (hidden, weight)))


# Losses


def answer_log_probabilities(model: LlamaForCausalLM, pair: Pair) -> tuple[list[Tensor], list[int]]:
    """Of the two answers: every row by itself, all its logits, in float64."""
    sums, lengths = [], []
    for row in pair.rows:
        logits = model(torch.tensor([row.input_ids]))[0].log_softmax(-1)
        answer = [(i, label) for i, label in enumerate(row.labels) if label != IGNORE]
        sums.append(torch.stack([logits[i, label] for i, label in answer]).sum())
        lengths.append(len(answer))
    return sums, lengths


def closed_form(name: str, sums: list[Tensor], lengths: list[int], reference: list[float]) -> Tensor:
    """The papers' formulas, written with exp and log."""
    chosen, rejected = sums
    means = [total / length for total, length in zip(sums, lengths, strict=True)]
    ratio = (chosen - reference[0]) - (rejected - reference[1])
    if name in ("dpo", "cdpo"):
        wrong = 0.2 if name == "cdpo" else 0.0
        right = 1 / (1 + torch.exp(-0.3 * ratio))
        return -(1 - wrong) * torch.log(right) - wrong * torch.log(1 - right)
    if name == "ipo":
        difference = (chosen - reference[0]) / lengths[0] - (rejected - reference[1]) / lengths[1]
        return (difference - 1 / (2 * 0.5)) ** 2
    if name == "simpo":
        return -torch.log(1 / (1 + torch.exp(-(2.0 * (means[0] - means[1]) - 0.4))))
    odds = [torch.exp(mean) / (1 - torch.exp(mean)) for mean in means]
    return -means[0] - 0.7 * torch.log(1 / (1 + odds[1] / odds[0]))


def loss_and_gradients(
    model: LlamaForCausalLM, objective: Preference, batches: list[Batch]
) -> tuple[float, dict[str, Tensor]]:
    """The mean over all pairs and its gradients, as the trainer computes them."""
    execution = DirectExecution(Layers(model, Precision(torch.float32, "O1", CPU), CPU, objective))
    model.zero_grad()
    count = sum(map(objective.count, batches))
    total = 0.0
    for batch in batches:
        sums = execution.batch_loss(batch)
        (sums.loss / count).backward()
        total += float(sums.loss.detach())
    return total / count, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(found: dict[str, Tensor], truth: dict[str, Tensor], limit: float = 1e-5) -> None:
    assert found.keys() == truth.keys()
    for name, gradient in found.items():
        error = (gradient.double() - truth[name].double()).norm() / truth[name].double().norm()
        assert error < limit, (name, float(error))


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradients_are_the_closed_form(name: str, model: LlamaForCausalLM) -> None:
    pairs = make_pairs(3)
    reference = torch.tensor([[-30.0, -28.0], [-11.5, -20.0], [-25.0, -24.0]])
    loss, gradients = loss_and_gradients(model, KINDS[name], [pack_pairs(pairs, reference)])
    wide = LlamaForCausalLM(model.config).double()
    wide.load_state_dict(model.state_dict())
    losses = [
        closed_form(name, *answer_log_probabilities(wide, pair), row)
        for pair, row in zip(pairs, reference.tolist(), strict=True)
    ]
    truth = torch.stack(losses).mean()
    truth.backward()
    assert loss == pytest.approx(float(truth.detach()), rel=1e-5)
    same_gradients(gradients, {n: p.grad for n, p in wide.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_is_learned_against_the_model_without_it(projection: bool, model: LlamaForCausalLM) -> None:
    """Loss and gradients of packed, shared rows: every row by itself in float64; and the slope of the loss along them."""
    prefixed, wide = LlamaForCausalLM(model.config), LlamaForCausalLM(model.config)
    for made in (prefixed, wide):
        made.load_state_dict(model.state_dict())
        apply_prefix(made, PrefixConfig(4, projection), seed=1)
    with torch.no_grad():  # far from nothing
        for parameter in (p for n, p in prefixed.named_parameters() if is_prefix(n)):
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.5
            )
    wide.load_state_dict(prefixed.state_dict())
    wide.double()
    pairs, objective = make_pairs(4), KINDS["dpo"]
    execution = DirectExecution(Layers(prefixed, Precision(torch.float32, "O1", CPU), CPU, objective))
    with without_prefix(execution.layers.stages):
        reference = reference_log_probabilities(execution, pair_batches(pairs, 2, share_prefixes=True), 4, 2)
    with torch.no_grad():
        truth = torch.stack([torch.stack(answer_log_probabilities(model, pair)[0]) for pair in pairs])
        started = torch.stack([torch.stack(answer_log_probabilities(prefixed, pair)[0]) for pair in pairs])
    torch.testing.assert_close(reference, truth, rtol=1e-5, atol=1e-5)
    assert (started - truth).abs().max() > 0.1

    def right_loss() -> Tensor:
        sums = [answer_log_probabilities(wide, pair) for pair in pairs]
        return torch.stack([closed_form("dpo", *s, row) for s, row in zip(sums, truth.tolist(), strict=True)]).mean()

    loss, gradients = loss_and_gradients(prefixed, objective, [pack_pairs(pairs, reference)])
    right = right_loss()
    right.backward()
    assert loss == pytest.approx(float(right.detach()), rel=1e-5)
    same_gradients(gradients, {n: p.grad for n, p in wide.named_parameters() if p.grad is not None})
    assert all(map(is_prefix, gradients))
    norm = float(torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt())
    moved, step = [], 1e-4 / norm
    with torch.no_grad():
        for sign in (1, -2):
            for name, parameter in wide.named_parameters():
                if name in gradients:
                    parameter += sign * step * gradients[name].double()
            moved.append(float(right_loss()))
    assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(norm**2, rel=1e-5)


def test_rewards(model: LlamaForCausalLM) -> None:
    """Two pairs are told right, one wrong and one undecided."""
    sums = torch.tensor([[-4.0, -9.0], [-2.0, -1.0], [-3.0, -3.0], [-8.0, -9.0]])
    reference = torch.tensor([[-5.0, -9.0], [-2.0, -2.0], [-3.0, -3.0], [-8.0, -6.0]])
    lengths = torch.tensor([[2.0, 3.0], [1.0, 1.0], [4.0, 4.0], [2.0, 2.0]])
    _, rewards = Preference("dpo", beta=0.5).losses(sums, lengths, reference)
    assert rewards.tolist() == [[0.5, 0.0], [0.0, 0.5], [0.0, 0.0], [0.0, -1.5]]
    told = Preference("dpo").evaluation(2.0, 4, [0.5, -1.0, 2.0])
    assert told == {
        "loss": 0.5,
        "reward_accuracy": 0.5,
        "reward_margin": 0.375,
        "reward_chosen": 0.125,
        "reward_rejected": -0.25,
    }


def test_a_model_that_is_its_reference_is_at_log_two() -> None:
    sums = torch.tensor([[-4.0, -9.0]], requires_grad=True)
    losses, _ = Preference("dpo", beta=0.1).losses(sums, torch.ones(1, 2), sums.detach())
    assert float(losses) == pytest.approx(math.log(2), rel=1e-6)
    (gradient,) = torch.autograd.grad(losses.sum(), sums)
    assert gradient.tolist() == [[pytest.approx(-0.05), pytest.approx(0.05)]]


@pytest.mark.parametrize("certain", [0.0, -1e-9, -1e-4, -0.7, -50.0])
def test_orpo_of_certain_and_hopeless_answers_stays_finite(certain: float) -> None:
    sums = torch.tensor([[certain, -3.0], [-3.0, certain]], requires_grad=True)
    losses, _ = Preference("orpo").losses(sums, torch.ones(2, 2), None)
    (gradient,) = torch.autograd.grad(losses.sum(), sums)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradient).all()


def test_dpo_without_a_reference_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="needs the log-probabilities of a reference"):
        Preference("dpo").losses(torch.zeros(1, 2), torch.ones(1, 2), None)


# Batches


def reference_of(pairs: list[Pair]) -> Tensor:
    return torch.linspace(-30.0, -10.0, 2 * len(pairs)).view(-1, 2)


@pytest.mark.parametrize("name", KINDS)
def test_packing_sharing_and_accumulation_change_nothing(name: str, model: LlamaForCausalLM) -> None:
    pairs = make_pairs(5)
    reference, objective = reference_of(pairs), KINDS[name]
    # prompts of 20, 19, 18, 17 and 16 tokens, whose last token is not shared: four pairs share theirs
    batch = pack_pairs(pairs, reference)
    assert sorted(map(len, batch.parts)) == [1, 1, 3, 3, 3, 3]
    loss, gradients = loss_and_gradients(model, objective, [batch])
    for batches in (
        [pack_pairs(pairs, reference, share_prefixes=False)],
        list(pair_batches(pairs, 2, reference, share_prefixes=True)),
        list(pair_batches(pairs, 1, reference, share_prefixes=False)),
    ):
        other, others = loss_and_gradients(model, objective, batches)
        assert other == pytest.approx(loss, rel=1e-6)
        same_gradients(others, gradients)


def test_a_pair_that_shares_its_prompt_holds_it_once() -> None:
    (pair,) = make_pairs(1)
    shared, apart = (pack_pairs([pair], share_prefixes=share) for share in (True, False))
    assert apart.input_ids.numel() - shared.input_ids.numel() == 19  # the prompt but for its last token
    assert shared.row_tokens == apart.row_tokens
    assert shared.label_tokens == apart.label_tokens
    assert shared.pairs == apart.pairs
    assert shared.pairs is not None
    assert shared.pairs.tokens == (pair.chosen.label_count, pair.rejected.label_count)


def test_steps_hold_whole_pairs_with_their_reference() -> None:
    pairs = make_pairs(7)
    reference = reference_of(pairs)
    order = StepOrder(7, 2, 1, seed=3, processes=2)
    sources = [PreferenceSteps(pairs, order, reference, share=DataShare(rank, 2)) for rank in range(2)]
    seen: list[Any] = []
    for step in range(order.steps_per_epoch):
        batches = [batch for source in sources for batch in source(step)]
        assert len(batches) == 2
        for batch in batches:
            assert batch.pairs is None or batch.rows == 2 * batch.pairs.count
            seen += batch.pairs.reference.tolist() if batch.pairs is not None else []  # type: ignore[union-attr]
    assert sorted(seen) == sorted(reference.tolist())
    assert "training pairs" in sources[0].describe(0)
    changed = [replace(pairs[0], chosen=pairs[1].chosen), *pairs[1:]]
    assert PreferenceSteps(changed, order).fingerprint() != sources[0].fingerprint()


def test_evaluation_and_reference(model: LlamaForCausalLM) -> None:
    """The reference scored by the execution; against itself the model has no rewards, whatever the batches."""
    pairs = make_pairs(5)
    layers = Layers(model, Precision(torch.float32, "O1", CPU), CPU, Preference("dpo", beta=0.3))
    execution = DirectExecution(layers)
    model.train()
    reference = reference_log_probabilities(execution, pair_batches(pairs, 2, share_prefixes=True), 5, 2)
    assert model.training
    with torch.no_grad():
        truth = torch.stack([torch.stack(answer_log_probabilities(model, pair)[0]) for pair in pairs])
    torch.testing.assert_close(reference, truth, rtol=1e-5, atol=1e-5)
    found = evaluate_loss(execution, pair_batches(pairs, 3, reference, share_prefixes=False))
    assert found["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert found["reward_margin"] == pytest.approx(0, abs=1e-5)
    shifted = reference - torch.tensor([1.0, 0.0])
    found = evaluate_loss(execution, pair_batches(pairs, 2, shifted, share_prefixes=True))
    assert found["reward_accuracy"] == 1.0
    assert found["reward_chosen"] == pytest.approx(0.3, rel=1e-4)
    assert found["loss"] == pytest.approx(math.log(1 + math.exp(-0.3)), rel=1e-5)
