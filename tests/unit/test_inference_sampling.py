"""The sampler against its law, against transformers' own processors, and against itself."""

from __future__ import annotations

import numpy as np
import pytest

from airgap.inference.sampling import (
    NotFiniteError,
    Settings,
    draw,
    kept,
    log_likelihood,
    philox,
    punished,
    uniforms,
)

PLAIN = Settings(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0)

# Random123, kat_vectors, philox4x32 10.
VECTORS = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS.values(), ids=VECTORS.keys())
def test_philox_gives_the_published_vectors(counter, key, expected):
    words = philox(tuple(np.array([word], dtype=np.uint64) for word in counter), key)
    assert tuple(int(word[0]) for word in words) == expected


def test_uniforms_depend_on_seed_sample_and_step_alone():
    whole = uniforms(7, np.arange(20), 0, 130)
    assert whole.min() >= 0.0
    assert whole.max() < 1.0
    assert np.array_equal(whole[[11, 3], 64:128], uniforms(7, np.array([11, 3]), 64, 64))
    assert not np.array_equal(whole, uniforms(8, np.arange(20), 0, 130))
    assert not np.array_equal(whole, uniforms(7 + 2**32, np.arange(20), 0, 130))
    assert len(np.unique(whole)) == whole.size


def test_uniforms_are_uniform():
    values = uniforms(1, np.arange(400), 0, 250).ravel()
    counts, _ = np.histogram(values, bins=100, range=(0, 1))
    expected = len(values) / 100
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 148.2  # 99.9 % quantile at 99 degrees of freedom


def random_logits(rows=40, vocabulary=150, scale=4.0, seed=3):
    return np.random.default_rng(seed).normal(0, scale, (rows, vocabulary)).astype(np.float32)


@pytest.mark.parametrize("top_k", [0, 1, 5, 50, 150, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-6])
@pytest.mark.parametrize("temperature", [1.0, 1.2, 0.3])
def test_cuts_leave_the_distribution_of_transformers(top_k, top_p, temperature):
    import torch
    from transformers import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = random_logits()
    scores = torch.tensor(logits, dtype=torch.float64)
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1.0 else scores
    theirs = torch.softmax(scores, dim=-1).numpy()

    ids, weights = kept(logits.astype(np.float64) / temperature, top_k=top_k, top_p=top_p)
    ours = np.zeros_like(theirs)
    np.put_along_axis(ours, ids, weights / weights.sum(axis=1, keepdims=True), axis=1)
    assert np.array_equal(ours > 0, theirs > 0)
    assert np.allclose(ours, theirs, atol=1e-12)


def test_penalty_is_that_of_transformers():
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = random_logits()
    past = np.random.default_rng(5).integers(0, 150, (40, 30))
    theirs = RepetitionPenaltyLogitsProcessor(1.05)(
        torch.tensor(past), torch.tensor(logits, dtype=torch.float64)
    ).numpy()
    seen = np.zeros(logits.shape, dtype=bool)
    np.put_along_axis(seen, past, values=True, axis=1)
    assert np.allclose(punished(logits.astype(np.float64), seen, 1.05), theirs, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        PLAIN,
        Settings(temperature=1.2, top_p=0.85, top_k=50, repetition_penalty=1.05),
        Settings(temperature=0.7, top_p=1.0, top_k=4, repetition_penalty=1.0),
    ],
    ids=["plain", "authors", "top 4"],
)
def test_draws_follow_their_distribution(settings):
    rows, vocabulary = 40_000, 12
    logits = random_logits(1, vocabulary, scale=1.0)
    seen = np.zeros((1, vocabulary), dtype=bool)
    seen[0, :3] = True
    scores = punished(logits.astype(np.float64), seen, settings.repetition_penalty)
    ids, weights = kept(scores / settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
    expected = np.zeros(vocabulary)
    expected[ids[0]] = weights[0] / weights[0].sum() * rows

    drawn = draw(
        np.repeat(logits, rows, axis=0),
        uniforms(11, np.arange(rows), 0, 1)[:, 0],
        settings,
        seen=np.repeat(seen, rows, axis=0),
    )
    counts = np.bincount(drawn.ids, minlength=vocabulary)
    assert counts[expected == 0].sum() == 0
    used = expected > 0
    chi_square = ((counts[used] - expected[used]) ** 2 / expected[used]).sum()
    assert chi_square < 31.3  # 99.9 % quantile at 11 degrees of freedom


def test_temperature_zero_takes_the_highest_legal_score():
    logits = random_logits()
    greedy = Settings(temperature=0.0, top_p=0.1, top_k=3, repetition_penalty=1.0)
    assert np.array_equal(draw(logits, np.full(40, 0.9), greedy).ids, logits.argmax(axis=1))
    legal = np.ones(logits.shape, dtype=bool)
    legal[np.arange(40), logits.argmax(axis=1)] = False
    second = draw(logits, np.full(40, 0.9), greedy, legal=legal)
    assert np.array_equal(second.ids, logits.argsort(axis=1)[:, -2])


def test_extreme_uniforms_never_draw_a_token_that_was_cut():
    logits = random_logits()
    settings = Settings(temperature=1.0, top_p=0.5, top_k=50, repetition_penalty=1.0)
    ids, weights = kept(logits.astype(np.float64), top_k=50, top_p=0.5)
    for value in (0.0, 1.0 - 2.0**-53):
        drawn = draw(logits, np.full(40, value), settings)
        for row in range(40):
            assert drawn.ids[row] in ids[row][weights[row] > 0]


def test_likelihood_ignores_penalty_mask_and_temperature():
    import torch

    logits = random_logits()
    legal = np.random.default_rng(8).random(logits.shape) < 0.3
    seen = np.random.default_rng(9).random(logits.shape) < 0.3
    settings = Settings(temperature=2.0, top_p=0.9, top_k=20, repetition_penalty=1.3)
    drawn = draw(logits, uniforms(1, np.arange(40), 0, 1)[:, 0], settings, seen=seen, legal=legal)
    table = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), dim=-1).numpy()
    assert np.allclose(drawn.logprob, table[np.arange(40), drawn.ids], atol=1e-12)
    assert np.allclose(log_likelihood(logits, drawn.ids), drawn.logprob, atol=0)
    assert legal[np.arange(40), drawn.ids].all()
    assert np.allclose(drawn.removed_mass, (np.exp(table) * ~legal).sum(axis=1), atol=1e-12)


def test_likelihood_is_stable_far_from_zero():
    logits = random_logits() + np.float32(1e4)
    ids = logits.argmax(axis=1)
    shifted = log_likelihood(logits - np.float32(1e4), ids)
    assert np.allclose(log_likelihood(logits, ids), shifted, atol=2e-2)
    assert np.isfinite(log_likelihood(np.float32(3e38) * np.ones((1, 5), np.float32), ids[:1] * 0))


def test_a_row_without_a_legal_token_is_dead_and_harms_no_other():
    logits = random_logits()
    legal = np.ones(logits.shape, dtype=bool)
    legal[7] = False
    at = uniforms(1, np.arange(40), 0, 1)[:, 0]
    drawn = draw(logits, at, PLAIN, legal=legal)
    assert drawn.dead.tolist() == [row == 7 for row in range(40)]
    others = np.arange(40) != 7
    assert np.array_equal(drawn.ids[others], draw(logits, at, PLAIN).ids[others])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_logits_that_are_not_numbers_are_refused(poison):
    logits = random_logits()
    draw(logits, np.zeros(40), PLAIN)
    logits[3, 5] = poison
    with pytest.raises(NotFiniteError):
        draw(logits, np.zeros(40), PLAIN)
    with pytest.raises(NotFiniteError):
        log_likelihood(logits, np.zeros(40, dtype=np.int64))


def test_a_row_of_minus_infinity_is_refused():
    logits = random_logits()
    logits[3] = -np.inf
    with pytest.raises(NotFiniteError):
        draw(logits, np.zeros(40), PLAIN)
