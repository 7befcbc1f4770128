"""A tiny study and a tiny search of it; the fixture `workspace` has both in a folder of its own."""

from pathlib import Path

STUDY = """
title: A tiny study
data: {name: digits5k, limit: 300, validation: 60, test: 60}
model: {hidden: [16], likelihood: bernoulli}
grid:
  latent_dim: [2, 3]
  seed: [0, 1]
  arms:
    vae: {beta: [1]}
    ae: {}
train: {updates: 30, history_points: 10, batch_size: 32}
evaluate:
  noise:
    - {kind: gaussian, levels: [0, 0.3]}
"""
SEARCH = """
title: A tiny search
study: tiny
space:
  beta: {low: 0.1, high: 10}
  latent_dim: 3
objectives:
  - {metric: validation/reconstruction, direction: down}
  - {metric: validation/kl, direction: down}
winner: {goal: {metric: validation/bce_elbo, direction: up}, finalists: 2, validation_seeds: [3], test_seeds: [1, 2]}
trials: 5
batch: 2
"""

HALVED = """
title: Halved
study: tiny
space:
  beta: {low: 0.1, high: 10}
  latent_dim: {low: 2, high: 4}
objectives: [{metric: validation/bce_elbo, direction: up}]
winner: {finalists: 2, validation_seeds: [3], test_seeds: [1, 2]}
sampler: {kind: random, seed: 0}
trials: 12
batch: 6
rungs: [0.3, 0.6]
halving: 2
"""


def write(text=STUDY, name="tiny"):
    Path("configs", f"{name}.yaml").write_text(text, encoding="utf-8")


def drive(name, advances):
    drive.cells = [getattr(advance, "cells", None) for advance in advances]
