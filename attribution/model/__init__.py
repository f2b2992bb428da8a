"""Everything that touches nnsight and transformers: load a model, prove it, trace it, read its points."""

# nnsight mounts `save` on object, and anyio cannot be imported after that.
import anyio._backends._asyncio  # noqa: F401
