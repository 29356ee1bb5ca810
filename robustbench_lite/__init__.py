"""Adversarial robustness: attack and proof in one honest, per-sample, audited table."""
