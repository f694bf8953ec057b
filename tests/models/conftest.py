"""Fixtures of the networks' tests."""

import contextlib
import re
from collections.abc import Callable, Iterator

import pytest
from jaxtyping import TypeCheckError

Refuses = Callable[[type[Exception], str], contextlib.AbstractContextManager[None]]


@pytest.fixture
def refuses() -> Refuses:
    """A value outside its annotation is refused by the code, or by the type checker if that is on."""

    @contextlib.contextmanager
    def expect(kind: type[Exception], message: str) -> Iterator[None]:
        with pytest.raises((kind, TypeCheckError)) as caught:
            yield
        assert isinstance(caught.value, TypeCheckError) or re.search(message, str(caught.value))

    return expect
