"""The ranking service: one user and n candidates with raw values in, scores per task and an order out. Torch-free."""
