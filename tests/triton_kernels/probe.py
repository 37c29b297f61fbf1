"""What an interpreted kernel reads and writes, element by element.

The interpreter loads from whatever address it is given, so reading past a row, or into the padding between rows, goes
unnoticed there. Inside ``watch()`` every load and store of a launch is looked up among the elements of the tensors
that the launch was given: an access to anything else, and a second write to an element, are errors.
"""

import contextlib
import functools
import inspect

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


class Elements:
    """One tensor argument: the addresses of its elements, and how often each was read and written."""

    def __init__(self, tensor):
        strides = [range_ * stride for range_, stride in
                   zip(np.ogrid[tuple(slice(size) for size in tensor.shape)], tensor.stride(), strict=True)]
        offsets = functools.reduce(np.add, strides, np.zeros((), dtype=np.int64))
        addresses = tensor.data_ptr() + tensor.element_size() * np.broadcast_to(offsets, tensor.shape).ravel()
        self.order = np.argsort(addresses, kind="stable")
        self.addresses = addresses[self.order]
        self.element_size = tensor.element_size()
        self.reads = np.zeros(tensor.shape, dtype=np.int64)
        self.writes = np.zeros(tensor.shape, dtype=np.int64)

    def find(self, addresses):
        """Which addresses are elements of this tensor, and the flat indices of those."""
        if self.addresses.size == 0:
            return np.zeros(addresses.shape, dtype=bool), self.order
        place = np.searchsorted(self.addresses, addresses).clip(max=self.addresses.size - 1)
        found = self.addresses[place] == addresses
        return found, self.order[place[found]]


class Probe:
    """What the launches inside watch() did."""

    def __init__(self):
        self.launches = []  # names of kernels
        self.arguments = {}  # of the last launch: name -> Elements

    def reads(self, name):
        """How often each element of an argument was read; the shape is the tensor's."""
        return self.arguments[name].reads

    def writes(self, name):
        return self.arguments[name].writes

    def bytes_read(self, name):
        return int(self.reads(name).sum()) * self.arguments[name].element_size

    def access(self, kind, pointers, mask):
        addresses = np.asarray(pointers.data).astype(np.int64).ravel()
        wanted = np.broadcast_to(np.asarray(mask.data), np.shape(pointers.data)).ravel().astype(bool)
        addresses = addresses[wanted]
        unknown = np.ones(addresses.shape, dtype=bool)
        for name, elements in self.arguments.items():
            found, indices = elements.find(addresses)
            unknown &= ~found
            count = getattr(elements, kind).reshape(-1)
            np.add.at(count, indices, 1)
            if kind == "writes" and (count > 1).any():
                raise AssertionError(f"{name}: an element is written twice")
        if unknown.any():
            raise AssertionError(f"{int(unknown.sum())} {kind} outside of every tensor")


@contextlib.contextmanager
def in_order(parts):
    """Run the programs of a row, which are the second axis of a grid, in this order, a permutation of 0, 1, 2, ..."""
    set_grid_index = InterpreterBuilder.set_grid_idx
    InterpreterBuilder.set_grid_idx = lambda builder, x, y, z: set_grid_index(builder, x, parts[y], z)
    try:
        yield
    finally:
        InterpreterBuilder.set_grid_idx = set_grid_index


@contextlib.contextmanager
def watch():
    """Yields the Probe of all launches in the block."""
    probe = Probe()
    launch = GridExecutor.__call__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def watched_launch(executor, *args, **kwargs):
        parameters = inspect.signature(executor.fn).parameters
        known = {name: value for name, value in kwargs.items() if name in parameters}
        arguments = inspect.signature(executor.fn).bind(*args, **known).arguments
        probe.launches.append(executor.fn.__name__)
        probe.arguments = {
            name: Elements(value) for name, value in arguments.items() if isinstance(value, torch.Tensor)
        }
        return launch(executor, *args, **kwargs)

    def watched_load(builder, pointers, mask, *rest):
        probe.access("reads", pointers, mask)
        return load(builder, pointers, mask, *rest)

    def watched_store(builder, pointers, value, mask, *rest):
        probe.access("writes", pointers, mask)
        return store(builder, pointers, value, mask, *rest)

    GridExecutor.__call__ = watched_launch
    InterpreterBuilder.create_masked_load = watched_load
    InterpreterBuilder.create_masked_store = watched_store
    try:
        yield probe
    finally:
        GridExecutor.__call__ = launch
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store
