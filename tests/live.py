"""How much memory tensors take while something runs."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are made and not yet gone.

    Args:
        aside: shapes of tensors that do not count.

    Attributes:
        most: of them at a time.
    """

    def __init__(self, aside: Collection[tuple[int, ...]] = ()):
        super().__init__()
        self.aside, self.now, self.most = aside, 0, 0
        self.known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and {tuple(tensor.shape), tuple(tensor.shape[::-1])}.isdisjoint(self.aside):
                self._count(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        self.most = max(self.most, self.now)
        return found

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count the memory of tensors that are there already."""
        for tensor in tensors:
            self._count(tensor.untyped_storage(), 0)

    def _count(self, storage: Any, size: int) -> None:
        """Add the bytes of a storage that is not known yet, until it is gone."""
        key = storage._cdata
        if key in self.known:
            return

        def gone(_: Any) -> None:
            del self.known[key]
            self.now -= size

        self.known[key] = weakref.ref(storage, gone)
        self.now += size
