"""Uninitialised memory is filled with NaN in every test: what is read before it is written shows."""

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes a second or more, so `make check` leaves it out")
    torch.set_warn_always(True)  # what torch warns of once a process would depend on the tests before


def pytest_report_header():
    from pcs_trainer.machine import kernels

    return f"kernels: {kernels()[0]}"


@pytest.fixture(autouse=True)
def nan_filled_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def model():
    """The embedded model, as shipped."""
    from pcs_trainer import load_model

    return load_model("tiny")


@pytest.fixture(scope="module")
def loaded():
    """diffusers' own pipeline of it."""
    from concept_cases import peer_pipeline

    return peer_pipeline()


@pytest.fixture
def pipe(loaded):
    """A copy of that pipeline which a test may change."""
    from concept_cases import fresh

    return fresh(loaded)
