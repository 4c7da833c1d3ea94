"""Ablation sweeps: what is swept, what a trial measures, and what is made of the table."""
