"""The part of W&B's server that a client, and a sweep's agent, need; on this machine, and with a memory of what it was told."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

KEY = "0123456789" * 4


class Server:
    """A context: listens while it is open. `environment` is what a client needs.

    trials: what an agent is handed out, one after the other: the values of a sweep's parameters. One that was preempted
    is handed out again.

    runs: {id: {"config": …, "history": [{…}], "exit": status}}, as clients told it. operations: the names of what was asked.
    """

    def __init__(self, sweep: dict[str, Any] | None = None, trials: list[dict[str, Any]] | None = None) -> None:
        self.sweep = sweep
        self.trials = [(f"trial{number:03d}", values) for number, values in enumerate(trials or [])]
        self.handed: dict[str, dict[str, Any]] = {}
        self.operations: list[str] = []
        self.runs: dict[str, dict[str, Any]] = defaultdict(lambda: {"config": {}, "history": [], "starts": 0})

    def __enter__(self) -> Server:
        handler = type("Handler", (_Handler,), {"server_state": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *arguments: Any) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self._http.server_port}", "WANDB_API_KEY": KEY}

    # What is answered

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        self.operations.append(operation)
        return getattr(self, f"_{operation}", lambda _: {})(variables)

    def _Viewer(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "1", "entity": "team", "username": "user", "flags": "{}", "teams": {"edges": []}}}

    def _UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name") or variables.get("id")
        run = self.runs[name]
        run["starts"] += 1
        run["config"].update({key: item["value"] for key, item in json.loads(variables.get("config") or "{}").items()})
        project = {"id": "1", "name": variables.get("project") or "project", "entity": {"id": "1", "name": "team"}}
        bucket = {
            "id": name,
            "name": name,
            "displayName": name,
            "sweepName": None,
            "config": None,
            "project": project,
            "historyLineCount": 0,
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyTail": "[]",
            "eventsTail": "[]",
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def _RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        if not self.runs[name]["starts"]:
            return {"model": {"bucket": None}}
        history = self.runs[name]["history"]
        last = json.dumps({"_step": len(history) - 1, "_runtime": 1})
        config = json.dumps({key: {"value": value} for key, value in self.runs[name]["config"].items() if key != "_wandb"})
        return {"model": {"id": "1", "name": "project", "entity": {"id": "1", "name": "team"}, "bucket": {
            "id": name, "name": name, "displayName": name, "config": config, "summaryMetrics": "{}", "tags": [],
            "historyLineCount": len(history), "eventsLineCount": 0, "logLineCount": 0, "historyTail": json.dumps([last]),
            "eventsTail": json.dumps(["{}"]), "wandbConfig": json.dumps({"t": 1})}}}  # fmt: skip

    def _CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.environment['WANDB_BASE_URL']}/file"} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def _sweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"sweep": {"id": "1", "name": "sweep", "method": "grid", "state": "RUNNING", "description": None,
                                      "config": yaml.safe_dump(self.sweep), "createdAt": "2026-01-01T00:00:00",
                                      "heartbeatAt": None, "updatedAt": None, "earlyStopJobRunning": False,
                                      "controller": None, "scheduler": None, "runs": {"edges": []}}}}  # fmt: skip

    _SweepWithRuns = _Sweep = _sweep

    def _CreateAgent(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": "agent"}}}

    def _Heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:
        running = json.loads(variables.get("runState") or "{}")
        commands: list[dict[str, Any]] = []
        if not running:
            commands = [{"type": "exit"}]
            if self.trials:
                name, values = self.trials.pop(0)
                self.handed[name] = values
                arguments = {key: {"value": value} for key, value in values.items()}
                commands = [{"type": "run", "run_id": name, "program": "nar-t2i", "args": arguments}]
        return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}

    def stream(self, run: str, told: dict[str, Any]) -> None:
        """What a client sends line by line."""
        for line in told.get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
            self.runs[run]["history"].append(json.loads(line))
        if told.get("complete"):
            self.runs[run]["exit"] = told.get("exitcode")
            if self.runs[run].pop("preempting", False) and self.runs[run]["exit"]:
                self.runs[run]["preempted"] = True
                if run in self.handed:
                    self.trials.insert(0, (run, self.handed[run]))  # another agent's
        if told.get("preempting"):
            self.runs[run]["preempting"] = True


class _Handler(BaseHTTPRequestHandler):
    server_state: Server

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/file_stream"):
            self.server_state.stream(self.path.split("/")[-2], json.loads(body))
            return self._send({"exitcode": None, "limits": {}})
        if not self.path.endswith("/graphql"):
            return self._send({})  # a file's upload
        asked = json.loads(body)
        operation = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
        data = self.server_state.answer(operation[1] if operation else "", asked.get("variables") or {})
        return self._send({"data": data})

    def do_GET(self) -> None:
        self._send({})

    def do_PUT(self) -> None:
        self._body()
        self._send({})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(parts)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _send(self, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""
