"""The one place where these measurements record a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def record(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """(replay, result): `run` recorded as one CUDA graph, and what it returned, which every replay fills anew.

    `run` goes twice before, on the stream that records: kernels compile there, and gradients are made there, so that
    autograd's last nodes belong to that stream too.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.empty_cache()  # the graph's pool is its own: what the warm-up left would count twice
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = run()
    return graph.replay, result
