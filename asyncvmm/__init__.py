"""asyncvmm: microVMs inside your asyncio program."""
