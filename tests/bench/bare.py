"""The bare aiohttp handler of row 5: what HTTP alone costs."""

from __future__ import annotations

import asyncio
import sys

from aiohttp import web

BODY = b'{"id":"573000000001","version":1,"seq":1}'


async def answer(request: web.BaseRequest) -> web.Response:
    """At once, with as many bytes as the daemon answers."""
    return web.Response(body=BODY, content_type="application/json")


async def serve(form: str) -> None:
    """Listen on a free port, print it, and serve until killed."""
    runner: web.BaseRunner
    if form == "application":
        application = web.Application()
        application.router.add_put("/v1/sessions/{id}", answer)
        runner = web.AppRunner(application, access_log=None)
    else:
        runner = web.ServerRunner(web.Server(answer, access_log=None))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    print(f"{host}:{port}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    try:
        import uvloop
    except ImportError:
        asyncio.run(serve(sys.argv[1]))
    else:
        uvloop.run(serve(sys.argv[1]))
