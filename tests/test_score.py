"""The mathematics of the score: antisymmetry, the sign, Bradley-Terry and cycles as special cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from general_preference import preference_matrix, preference_probability, preference_score
from general_preference.models.score import gate_weights, head_embedding, normalize_embedding

DTYPES = st.sampled_from([torch.float32, torch.float64])
DIMS = st.integers(1, 9)


def draw(dim, dtype, seed, *shape, gated=True):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(*shape, dim, generator=generator, dtype=dtype) for _ in range(2))
    gate = torch.rand(*shape, dim // 2, generator=generator, dtype=dtype) if gated else None
    return first, second, gate


@settings(max_examples=60, deadline=None)
@given(DIMS, DTYPES, st.integers(0, 10**6), st.booleans())
def test_antisymmetry_is_exact(dim, dtype, seed, gated):
    first, second, gate = draw(dim, dtype, seed, 5, gated=gated)
    assert torch.equal(preference_score(first, second, gate), -preference_score(second, first, gate))
    assert torch.equal(preference_score(first, first, gate), torch.zeros(5, dtype=dtype))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(0, 10**6))
def test_equals_the_operator_written_as_a_matrix(planes, seed):
    first, second, gate = draw(2 * planes, torch.float64, seed, 3)
    block = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    for row in range(3):
        operator = torch.block_diag(*(weight * block for weight in gate[row]))
        expected = (operator @ first[row]) @ second[row]
        torch.testing.assert_close(preference_score(first, second, gate)[row], expected)


@settings(max_examples=40, deadline=None)
@given(st.floats(-5, 5), st.floats(-5, 5))
def test_bradley_terry_is_the_plane_r_one(reward_first, reward_second):
    scalar = torch.tensor([[reward_first], [reward_second]], dtype=torch.float64)
    plane = torch.cat([scalar, torch.ones(2, 1, dtype=torch.float64)], dim=1)
    expected = torch.tensor(reward_first - reward_second, dtype=torch.float64)
    torch.testing.assert_close(preference_score(scalar[0], scalar[1]), expected)
    torch.testing.assert_close(preference_score(plane[0], plane[1]), expected)


def test_sign_and_probability():
    better, worse = torch.tensor([2.0]), torch.tensor([0.5])
    score = preference_score(better, worse)
    assert score.item() == 1.5
    assert math.isclose(preference_probability(score, 0.5).item(), 1 / (1 + math.exp(-3)), rel_tol=1e-6)
    complementary = preference_probability(score, 0.5) + preference_probability(-score, 0.5)
    torch.testing.assert_close(complementary, torch.ones(()))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 10**6))
def test_hybrid_is_scalar_plus_planes(planes, seed):
    first, second, gate = draw(2 * planes + 1, torch.float64, seed, 4)
    scalar = first[:, -1] - second[:, -1]
    skew = preference_score(first[:, :-1], second[:, :-1], gate)
    torch.testing.assert_close(preference_score(first, second, gate), scalar + skew)


@pytest.mark.parametrize("length", [3, 4, 5])
def test_a_circle_holds_a_cycle_and_no_scalar_does(length):
    angles = torch.arange(length) * 2 * math.pi / length
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    edges = preference_score(circle, circle.roll(-1, dims=0))
    assert (edges > 0.5).all()
    rewards = torch.randn(200, length, 1)
    assert ((preference_score(rewards, rewards.roll(-1, dims=1)) > 0).sum(dim=1) <= length - 1).all()


@settings(max_examples=30, deadline=None)
@given(DIMS, st.integers(0, 10**6), st.booleans())
def test_matrix_holds_every_pair(dim, seed, gated):
    embeddings, _, gate = draw(dim, torch.float32, seed, 2, 4, gated=gated)
    gate = None if gate is None else gate[:, 0]
    matrix = preference_matrix(embeddings, gate)
    assert matrix.shape == (2, 4, 4)
    assert torch.equal(matrix, -matrix.transpose(-1, -2))
    for i in range(4):
        for j in range(4):
            assert torch.equal(matrix[:, i, j], preference_score(embeddings[:, i], embeddings[:, j], gate))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10**6))
def test_normalisation_keeps_the_scalar_and_bounds_the_planes(dim, seed):
    first, second, _ = draw(dim, torch.float64, seed, 6)
    unit = normalize_embedding(first)
    planes = 2 * (dim // 2)
    torch.testing.assert_close(unit[:, :planes].norm(dim=-1), torch.ones(6, dtype=torch.float64))
    assert torch.equal(unit[:, planes:], first[:, planes:])
    skew = preference_score(unit[:, :planes], normalize_embedding(second)[:, :planes])
    assert (skew.abs() <= 1 + 1e-12).all()


def test_half_precision_is_computed_in_fp32():
    first, second = torch.randn(8, 6).bfloat16(), torch.randn(8, 6).bfloat16()
    score = preference_score(first, second)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, preference_score(first.float(), second.float()))


def test_gradient():
    first, second, gate = (tensor.requires_grad_() for tensor in draw(5, torch.float64, 1, 3))
    assert torch.autograd.gradcheck(preference_score, (first, second, gate))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="D = 4"):
        preference_score(torch.zeros(2, 4), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="2 planes"):
        preference_score(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 3))


def test_numbers_of_the_heads_become_embeddings_and_gates():
    numbers = torch.tensor([3.0, 4.0, 0.0, 0.0, 7.0])
    assert torch.equal(head_embedding(numbers), numbers)
    expected = torch.tensor([0.6, 0.8, 0.0, 0.0, 6.5])
    torch.testing.assert_close(head_embedding(numbers, normalize=True, reward_offset=-0.5), expected)
    assert head_embedding(torch.tensor([2.0]), reward_offset=0.25).item() == 2.25
    logits = torch.tensor([0.0, math.log(3.0)])
    torch.testing.assert_close(gate_weights(logits, "softmax", 16), torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(gate_weights(4 * logits, "scaled_softmax", 16), torch.tensor([0.5, 1.5]))
