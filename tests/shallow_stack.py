"""A pytest plugin for processes with TRITON_INTERPRET=1: every test runs in a thread of its own.

Below pytest's own calls those of the interpreter may cross a chunk of Python's stack, and Python 3.11 and later map and
unmap memory each time: a matter of luck that makes a test several times slower.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    names = pyfuncitem._fixtureinfo.argnames
    with ThreadPoolExecutor(1) as shallow:
        shallow.submit(pyfuncitem.obj, **{name: pyfuncitem.funcargs[name] for name in names}).result()
    return True
