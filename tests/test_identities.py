import math
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from pipeline import identities, objective
from pipeline.identities import ERRATA, IDENTITIES, Outcome, _normal
from pipeline.metrics import fit_pca
from pipeline.objective import bernoulli_nll, gaussian_nll, kl_per_latent

IDS = [
    *("000-a-variance", "000-a-error", "000-b", "001-a", "001-b", "001-b-monte-carlo", "003-c", "003-d"),
    *("000-weights", "001-weights", "002-weights", "erratum-003-sign", "erratum-002-eq8", "erratum-001-2.4"),
    "erratum-002-unclipped",
]


def test_every_identity_is_registered_under_its_own_id():
    assert list(IDENTITIES) == IDS
    assert [identity.id for identity in IDENTITIES.values()] == IDS


@pytest.mark.parametrize("id", IDS)
def test_holds(id):
    outcome = IDENTITIES[id].check()
    assert outcome.holds, outcome
    assert 0 <= outcome.deviation <= outcome.tolerance


@pytest.mark.parametrize("id", IDS)
def test_is_deterministic_and_leaves_the_global_generator_alone(id):
    before = torch.get_rng_state()
    first = IDENTITIES[id].check()
    torch.rand(3)
    assert IDENTITIES[id].check() == first
    torch.set_rng_state(before)
    IDENTITIES[id].check()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("item", [*IDENTITIES.values(), *ERRATA], ids=lambda item: item[0] or "none")
def test_says_one_sentence_of_a_source(item):
    assert item.source[:5] in {"000, ", "001, ", "002, ", "003, "}
    assert item.says.endswith(".") and "\n" not in item.says and len(item.says) < 150


def test_errata_name_identities():
    shown = [erratum.identity for erratum in ERRATA if erratum.identity]
    assert set(shown) <= set(IDENTITIES)
    assert {id for id in IDS if id.startswith("erratum-")} <= set(shown)


@pytest.mark.parametrize("deviation", [math.nan, math.inf, 2.0])
def test_no_number_and_too_large_a_number_do_not_hold(deviation):
    assert not Outcome(deviation, 1.0).holds
    assert Outcome(1.0, 1.0).holds


def test_a_failed_inequality_or_an_error_that_is_no_number_does_not_hold():
    small = torch.zeros(2)
    assert identities._outcome(1.0, small).holds
    assert not identities._outcome(1.0, small, provided=False).holds
    assert not identities._outcome(1.0, small, torch.tensor([0.0, math.nan])).holds


def test_the_linear_gaussian_agrees_with_torch_distributions():
    model, x, q = identities._linear_gaussian()
    mean, precision = model.posterior(x)
    posterior = MultivariateNormal(mean, precision_matrix=precision)
    reference = kl_divergence(MultivariateNormal(q.mu, q.log_variance.exp().diag_embed()), posterior)
    torch.testing.assert_close(model.gap(x, q), reference)
    z = _normal(0, 20, 3)
    joint = Normal(z @ model.w.T, math.sqrt(model.sigma2)).log_prob(x).sum(dim=1) + Normal(0.0, 1.0).log_prob(z).sum(dim=1)
    torch.testing.assert_close(joint - posterior.log_prob(z), model.log_marginal(x))


def without_log_variance(mu, log_variance):
    return 0.5 * mu.square()


def kl_off_by_a_half(mu, log_variance):
    return kl_per_latent(mu, log_variance) + 0.5


MISTAKES = {  # for each identity, something that it rests on, and a mistake in it
    "000-a-variance": ("fit_pca", lambda x, d: SimpleNamespace(components_=fit_pca(x, 2).components_[1:])),
    "000-a-error": ("_eigenvalues", lambda x: torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)),
    "000-b": ("_fit", lambda *_: None),
    "001-a": ("kl_per_latent", kl_off_by_a_half),
    "001-b": ("kl_per_latent", kl_off_by_a_half),
    "001-b-monte-carlo": ("kl_per_latent", lambda *q: 1.05 * kl_per_latent(*q)),
    "003-c": ("_normal", lambda seed, *shape: 1.05 * _normal(seed, *shape)),
    "003-d": ("gaussian_nll", lambda mean, target, log_sigma2: 2 * gaussian_nll(mean, target, log_sigma2)),
    "000-weights": ("kl_per_latent", without_log_variance),
    "001-weights": ("kl_per_latent", without_log_variance),
    "002-weights": ("kl_per_latent", without_log_variance),
    "erratum-003-sign": ("_printed_kl", lambda *q: kl_per_latent(*q).sum(dim=-1)),
    "erratum-002-eq8": ("gaussian_nll", lambda mean, target, log_sigma2: 2 * gaussian_nll(mean, target, log_sigma2)),
    "erratum-001-2.4": ("kl_per_latent", kl_off_by_a_half),
    "erratum-002-unclipped": ("bernoulli_nll", lambda logits, target: bernoulli_nll(logits, target.clamp(max=1))),
}


@pytest.mark.parametrize("id", IDS)
def test_fails_with_a_mistake_in_what_it_rests_on(id, monkeypatch):
    name, mistaken = MISTAKES[id]
    for module in (identities, objective):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, mistaken)
    assert not IDENTITIES[id].check().holds


def test_the_mistake_of_each_erratum_would_not_pass_for_the_correction(monkeypatch):
    """The KL with 003's sign, put where ours stands, breaks every identity that rests on it."""
    monkeypatch.setattr(identities, "kl_per_latent", lambda *q: -kl_per_latent(*q))
    broken = {id for id in IDS if not IDENTITIES[id].check().holds}
    assert broken >= {"001-a", "001-b", "001-b-monte-carlo", "001-weights", "002-weights", "erratum-001-2.4"}
