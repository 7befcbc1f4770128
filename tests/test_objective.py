import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from pipeline.objective import Objective, bernoulli_nll, gaussian_nll, kl_per_latent

generator = torch.Generator().manual_seed(0)
mu, log_variance = torch.randn(3, 5, 4, generator=generator), torch.randn(3, 5, 4, generator=generator)


def test_kl_agrees_with_torch_distributions():
    reference = kl_divergence(Normal(mu, (0.5 * log_variance).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_per_latent(mu, log_variance), reference)


def test_kl_agrees_with_monte_carlo():
    q = Normal(mu, (0.5 * log_variance).exp())
    torch.manual_seed(0)
    z = q.sample((20_000,))
    estimate = (q.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).mean(dim=0)
    torch.testing.assert_close(kl_per_latent(mu, log_variance), estimate, atol=0.2, rtol=0.05)


@given(st.floats(-20, 20), st.floats(-10, 10))
def test_kl_is_never_negative(mean, log_var):
    kl = kl_per_latent(torch.full((1, 1, 1), mean), torch.full((1, 1, 1), log_var)).item()
    assert kl >= 0
    if abs(mean) > 1e-2 or abs(log_var) > 1e-2:
        assert kl > 0


def test_kl_is_zero_at_the_prior():
    assert kl_per_latent(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)).item() == 0


def test_bernoulli_agrees_with_torch_distributions_and_its_gradient_with_autograd():
    logits = (10 * torch.randn(3, 5, 7, generator=generator)).requires_grad_()
    bits = torch.rand(3, 5, 7, generator=generator).round()
    reference = -Independent(Bernoulli(logits=logits), 1).log_prob(bits)
    ours = bernoulli_nll(logits, bits)
    torch.testing.assert_close(ours, reference)
    weights = torch.rand(3, 5, generator=generator)
    grads = [torch.autograd.grad((nll * weights).sum(), logits)[0] for nll in (ours, reference)]
    torch.testing.assert_close(*grads)


def test_bernoulli_stays_finite_at_extreme_logits():
    logits = torch.tensor([[[-500.0, 500.0, 0.0]]], requires_grad=True)
    nll = bernoulli_nll(logits, torch.tensor([[[0.0, 1.0, 0.5]]]))
    nll.sum().backward()
    torch.testing.assert_close(nll.detach(), torch.full((1, 1), math.log(2)))
    assert torch.isfinite(logits.grad).all()


def test_gaussian_agrees_with_torch_distributions():
    mean, target = torch.randn(3, 5, 7, generator=generator), torch.randn(3, 5, 7, generator=generator)
    log_sigma2 = torch.tensor([-2.0, 0.0, 1.5])
    reference = -Independent(Normal(mean, (0.5 * log_sigma2).exp()[:, None, None]), 1).log_prob(target)
    torch.testing.assert_close(gaussian_nll(mean, target, log_sigma2), reference)


def test_each_arm_has_its_terms(make_cell):
    arms = ["vae", "ae", "ae_code_l2", "ae_as_published", "kl_only"]
    objective = Objective([make_cell(arm, beta=2.0) for arm in arms])
    mu, log_variance, epsilon = (torch.ones(5, 3, 2) * value for value in (1.0, 0.5, 1.0))
    z = objective.sample(mu, log_variance, epsilon)
    assert [bool((z[row] != mu[row]).any()) for row in range(5)] == [True, False, False, True, True]
    reconstruction, penalty = torch.ones(5, 3), objective.penalty(*objective.posterior(mu, log_variance))
    kl, code = kl_per_latent(mu, log_variance).sum(-1)[0, 0], 0.5 * mu.square().sum(-1)[0, 0]
    expected = torch.stack([1 + 2 * kl, torch.tensor(1.0), 1 + 2 * code, 1 + 2 * code, 2 * kl])
    torch.testing.assert_close(objective.terms(reconstruction, penalty, objective.beta).loss, expected)


def test_beta_rises_over_its_share_of_the_updates_and_then_stays(make_cell):
    cells = [make_cell(beta=4.0, anneal=anneal) for anneal in (0.0, 0.5, 1.0)] + [make_cell("ae")]
    objective = Objective(cells)
    betas = [objective.beta_at(update).tolist() for update in (0, 10, 20, 40)]
    assert betas == [[4, 0, 0, 0], [4, 2, 1, 0], [4, 4, 2, 0], [4, 4, 4, 0]]
    assert Objective([cells[0], cells[3]]).beta_at(0).tolist() == [4, 0]
