"""XenStore: wire format, tree, store (pure); server and client (asyncio)."""
