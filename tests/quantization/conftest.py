"""One thread, as in a rank."""

from tests.training.conftest import one_thread  # noqa: F401
