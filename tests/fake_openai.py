"""A server on 127.0.0.1 that speaks enough of the OpenAI protocol to be asked about clips, and misbehaves on request."""
import asyncio
import json
import threading
import time

import uvicorn


def completion(text: str, finish: str = "stop", tokens: list | None = None) -> dict:
    "A chat completion; `tokens`: (token, {alternative: log probability}) per token."
    rows = [{"token": t, "logprob": alts.get(t, -0.1), "top_logprobs": [{"token": a, "logprob": p} for a, p in alts.items()]} for t, alts in tokens or []]
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish, "logprobs": {"content": rows} if rows else None}
    return {"id": "x", "object": "chat.completion", "choices": [choice]}


class FakeOpenAI:
    """Context manager. `script` is consumed one entry per question, then `answer(body)` is asked: a text, a dict, bytes, a (status, body), or one of the words
    hang, drip, half, huge."""
    def __init__(self, script=(), answer=lambda body: "4"):
        self.script, self.answer, self.seen, self.headers = list(script), answer, [], []

    async def app(self, scope, receive, send):
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown": await send({"type": "lifespan.startup.complete"})
            return await send({"type": "lifespan.shutdown.complete"})
        data, more = b"", True
        while more:
            event = await receive()
            data, more = data + event.get("body", b""), event.get("more_body", False)
        if scope["path"].endswith("/models"): return await self.reply(send, 200, {"data": [{"id": "fake-vl", "root": "/models/fake"}]})
        if not scope["path"].endswith("/chat/completions"): return await self.reply(send, 200 if scope["path"] in ("/sleep", "/wake_up") else 404, {})
        self.seen.append(json.loads(data))
        self.headers.append({k.decode(): v.decode() for k, v in scope["headers"]})
        todo = self.script.pop(0) if self.script else self.answer(self.seen[-1])
        if todo == "hang": await asyncio.sleep(600)          # until the server is stopped
        if todo in ("drip", "huge"):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(60):
                await send({"type": "http.response.body", "body": b" " * (2**20 if todo == "huge" else 1), "more_body": True})
                if todo == "drip": await asyncio.sleep(0.05)
            return await send({"type": "http.response.body", "body": b""})
        if todo == "half":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]})
            return await send({"type": "http.response.body", "body": b'{"choices": ['})
        if isinstance(todo, str): todo = completion(todo)
        code, body = todo if isinstance(todo, tuple) else (200, todo)
        await self.reply(send, code, body)

    async def reply(self, send, code, body):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        await send({"type": "http.response.start", "status": code, "headers": [(b"content-length", str(len(data)).encode())]})
        await send({"type": "http.response.body", "body": data})

    def __enter__(self):
        self.server = uvicorn.Server(uvicorn.Config(self.app, host="127.0.0.1", port=0, log_level="critical", interface="asgi3"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        end = time.monotonic() + 120
        while not self.server.started and time.monotonic() < end: time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(self, *_):
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(60)
