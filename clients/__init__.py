"""Clients of a Sightline server: the methods of `LocalSession`, run there."""

import attribution.model  # noqa: F401  imports what must come before nnsight
from clients.async_client import AsyncModelClient
from clients.client import ModelClient

__all__ = ["AsyncModelClient", "ModelClient"]
