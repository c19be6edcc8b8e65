"""The Triton face of a kernel on a machine without a GPU: by Triton's interpreter, in a process of its own.

Triton decides when it is imported whether it interprets, and other tests compile with it in the process of the tests.
"""

from __future__ import annotations

import importlib
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def _launched(given: bytes) -> bytes:
    import torch

    torch.set_num_threads(1)
    module, function, args = pickle.loads(given)
    made = getattr(importlib.import_module(f"optpass.kernels.{module}.triton"), function)(*args)
    return pickle.dumps(made)


@cache
def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_interpret)


def interpreted(module: str, function: str, *args: Any) -> Any:
    """What the launcher returns for these tensors."""
    return pickle.loads(_pool().submit(_launched, pickle.dumps((module, function, args))).result())
