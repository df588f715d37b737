"""Memory as torch's allocators see it: the peak of a call above its start, and the bytes kept for backward."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def peak_bytes(function: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes allocated at once during `function()`, above what was allocated when it began.

    CPU: every allocation and release that torch's CPU allocator reports to the profiler during the call, in order of
    time, summed. Scratch that a library allocates for itself (oneDNN, MKL) is not torch's and is not counted.
    CUDA: the caching allocator's own peak.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    peak = current = 0
    for change in _cpu_allocations(function):
        current += change
        peak = max(peak, current)
    return peak


def _cpu_allocations(function: Callable[[], Any]) -> list[int]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr otherwise
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    return [int(event["args"]["Bytes"]) for event in sorted(memory, key=lambda event: event["ts"])]


def saved_bytes(function: Callable[[], Any], known: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for backward after `function()`: each storage once, those of `known` tensors not.

    Args:
        function: the forward call; what it returns is kept alive until the count is done.
        known: inputs and parameters, which exist anyway.
    """
    held = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    del output
    return sum(saved.values())
