"""Uninitialised memory is filled with NaN in every test: what is read before it is written shows."""

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


@pytest.fixture(autouse=True)
def nan_filled_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def quiet_warnings():
    import warnings

    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
    yield
