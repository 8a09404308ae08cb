"""A small network and its data: what the optimizer's tests train."""

import torch


def network(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64))


def batches(n: int):
    generator = torch.Generator().manual_seed(5)
    teacher = torch.randn(64, 64, generator=generator) / 8
    for _ in range(n):
        x = torch.randn(64, 64, generator=generator)
        yield x, torch.tanh(x @ teacher)
