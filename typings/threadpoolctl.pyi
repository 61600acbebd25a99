"""Threads of the BLAS libraries that a process has loaded."""

from contextlib import AbstractContextManager
from typing import Any

class ThreadpoolController:
    def limit(
        self, *, limits: int | dict[str, int] | None = ..., user_api: str | None = ...
    ) -> AbstractContextManager[Any]: ...
    def info(self) -> list[dict[str, Any]]: ...
