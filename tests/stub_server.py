"A server that knows the health endpoints only and imports nothing. `--config` names its JSON; `die_after`, `broken_after` and `never_ready` make trouble."
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BORN = time.monotonic()
config = json.load(open(sys.argv[sys.argv.index("--config") + 1]))


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words): pass

    def do_GET(self):
        broken = time.monotonic() - BORN > config.get("broken_after", 1e9)
        data = json.dumps({"name": config["name"], "device": os.environ.get("CAMFLOW_DEVICE_INDEX"), "pid": os.getpid()} | ({"worker": "broken", "reason": "out of luck"} if broken else {})).encode()
        self.send_response(503 if self.path == "/readyz" and (broken or config.get("never_ready")) else 200)
        self.send_header("content-length", str(len(data))), self.end_headers(), self.wfile.write(data)


if config.get("wrong"):
    print("error: this configuration is wrong", file=sys.stderr)
    sys.exit(2)
if "die_after" in config: threading.Thread(target=lambda: (time.sleep(config["die_after"]), print("going down", flush=True), os._exit(7)), daemon=True).start()
if config.get("chatter"): threading.Thread(target=lambda: [print("x" * 1000, flush=True) for _ in range(3000)], daemon=True).start()
ThreadingHTTPServer((config.get("host", "127.0.0.1"), config["port"]), Handler).serve_forever()
