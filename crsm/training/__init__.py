"""The four training stages in plain PyTorch: one module per stage, one loop for all. No Ray."""
