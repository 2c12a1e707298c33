"""Server-sent events, read."""

from collections.abc import AsyncIterator

_BOM = b"\xef\xbb\xbf"


async def data(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each event, by the standard of server-sent events, but that a last one need not end with an empty line."""
    told: list[bytes] = []
    async for line in _lines(parts):
        if line.startswith(b"data:"):
            told.append(line[5:].removeprefix(b" "))
        elif not line and told:
            yield b"\n".join(told)
            told = []
    if told:
        yield b"\n".join(told)


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Of any length, which those of aiohttp are not."""
    begun: list[bytes] = []
    first = True
    async for part in parts:
        *ends, rest = part.split(b"\n")
        for end in ends:
            line = b"".join([*begun, end]).removesuffix(b"\r")
            yield line.removeprefix(_BOM) if first else line
            begun, first = [], False
        begun.append(rest)
    yield b"".join(begun).removesuffix(b"\r")
