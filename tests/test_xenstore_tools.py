"""Debian's unmodified xenstore-* tools against the Unix socket."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from evtchnd.xenstore.server import Server

pytestmark = pytest.mark.skipif(shutil.which("xenstore-ls") is None, reason="Debian's xenstore-utils is not installed")

Run = Callable[..., Awaitable[tuple[int, str]]]


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server()
    await server.listen(str(tmp_path / "xs"))
    yield server
    await server.close()
    assert server.store.check() == []


async def start(tmp_path: Path, tool: str, *args: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    env = {**os.environ, "XENSTORED_PATH": str(tmp_path / "xs")}
    return await asyncio.create_subprocess_exec(f"xenstore-{tool}", *args, stdout=pipe, stderr=pipe, env=env)


@pytest.fixture
def run(tmp_path: Path, server: Server) -> Run:
    async def run(tool: str, *args: str) -> tuple[int, str]:
        process = await start(tmp_path, tool, *args)
        async with asyncio.timeout(60):
            out, _ = await process.communicate()
        return process.returncode or 0, out.decode()

    return run


async def test_write_read_list_exists_rm(server: Server, run: Run) -> None:
    assert await run("write", "/tool/a", "1", "/tool/b/c", "two words") == (0, "")
    assert await run("read", "/tool/a", "/tool/b/c") == (0, "1\ntwo words\n")
    assert await run("read", "-p", "/tool/a") == (0, "/tool/a: 1\n")
    assert await run("list", "/tool") == (0, "a\nb\n")
    assert await run("exists", "/tool/a") == (0, "")
    assert (await run("exists", "/tool/none"))[0] == 1
    assert (await run("read", "/tool/none"))[0] == 1
    assert await run("rm", "/tool/b") == (0, "")
    assert server.ls("/tool") == ["a"]
    assert (await run("write", "/tool//x", "1"))[0] == 1


async def test_relative_paths(server: Server, run: Run) -> None:
    assert await run("write", "device/x", "1") == (0, "")
    assert server.read("/local/domain/0/device/x") == "1"
    assert await run("read", "device/x") == (0, "1\n")


async def test_rm_with_its_empty_parents(server: Server, run: Run) -> None:
    server.write("/a/b/c/d", "")
    server.write("/a/keep", "")
    assert await run("rm", "-t", "/a/b/c/d") == (0, "")
    assert server.ls("/a") == ["keep"]


async def test_ls(server: Server, run: Run) -> None:
    server.write("/local/domain/7/name", "guest", perms=["n0", "r7"])
    server.write("/local/domain/7/data", "\x01\n")
    assert await run("ls") == (0, 'local = ""\n domain = ""\n  7 = ""\n   name = "guest"\n   data = "\\001\\n"\n')
    assert await run("ls", "-f", "/local/domain/7") == (
        *(0,),
        '/local/domain/7/name = "guest"\n/local/domain/7/data = "\\001\\n"\n',
    )
    code, out = await run("ls", "-p", "/local/domain/7")
    assert code == 0
    assert "(n0,r7)" in out


async def test_ls_of_many(server: Server, run: Run) -> None:
    """More than one message holds: the tool's library asks for parts."""
    for number in range(1500):
        server.write(f"/many/node-{number}", number)
    assert await run("ls", "/many") == (0, "".join(f'node-{number} = "{number}"\n' for number in range(1500)))


async def test_chmod(server: Server, run: Run) -> None:
    server.write("/a/b", "")
    assert await run("chmod", "-r", "/a", "n0", "r7", "b8") == (0, "")
    assert server.get_perms("/a/b") == ["n0", "r7", "b8"]


async def test_watch(server: Server, tmp_path: Path) -> None:
    process = await start(tmp_path, "watch", "-n", "4", "/a", "/b")
    assert process.stdout is not None
    async with asyncio.timeout(60):
        assert {await process.stdout.readline() for _ in range(2)} == {b"/a\n", b"/b\n"}
        server.write("/a/x", "1")
        server.write("/c", "1")
        server.rm("/b")
        server.write("/b", "1")
        assert [await process.stdout.readline() for _ in range(2)] == [b"/a/x\n", b"/b\n"]
        assert await process.wait() == 0


async def test_watch_is_told_of_the_end_of_the_daemon(server: Server, tmp_path: Path) -> None:
    process = await start(tmp_path, "watch", "/a")
    assert process.stdout is not None
    async with asyncio.timeout(60):
        await process.stdout.readline()
        await server.close()
        process.kill()
        await process.wait()
