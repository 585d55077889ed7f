"""A small chatbot as many run it: Flask, and storage functions that once wrote a JSON file for each conversation.

It knows nothing of Holdfast but the one import that was changed.
"""

from __future__ import annotations

import errno
from typing import Any

from flask import Flask, Response, jsonify, request

from holdfast.compat import chatbot_storage as storage

STATUS_OF = {errno.ENOSPC: 507, errno.EACCES: 500}

app = Flask(__name__)


@app.errorhandler(OSError)
def storage_failed(error: OSError) -> tuple[Response, int]:
    """Say why nothing was stored."""
    return jsonify(error=error.strerror, errno=error.errno), STATUS_OF.get(error.errno or 0, 500)


@app.post("/chat/<conversation_id>")
def chat(conversation_id: str) -> tuple[Response, int]:
    """The customer says something, the bot answers."""
    conversation = storage.load_conversation(conversation_id)
    messages = conversation["messages"] if conversation else [{"role": "system", "content": "You sell USB sticks"}]
    text = request.get_json()["message"]
    messages.append({"role": "user", "content": text})
    messages.append({"role": "assistant", "content": f"You said: {text}"})
    storage.save_conversation(conversation_id, messages)
    return jsonify(reply=messages[-1]["content"], messages=len(messages)), 200


@app.post("/chat/<conversation_id>/escalate")
def escalate(conversation_id: str) -> tuple[Response, int]:
    """The customer wants a human."""
    wanted = request.get_json()
    storage.save_escalation(
        conversation_id, wanted["reason"], wanted["contact_info"], priority=wanted.get("priority", "low")
    )
    return jsonify(storage.load_escalation(conversation_id)), 201


@app.get("/chat")
def conversations() -> Response:
    """The list in the sidebar."""
    return jsonify(storage.list_conversations())


@app.get("/chat/<conversation_id>")
def conversation(conversation_id: str) -> tuple[Response, int]:
    """One conversation."""
    found = storage.load_conversation(conversation_id)
    return (jsonify(found), 200) if found else (jsonify(error="no such conversation"), 404)


@app.delete("/chat/<conversation_id>")
def forget(conversation_id: str) -> tuple[str, int]:
    """The customer has it removed."""
    return ("", 204) if storage.delete_conversation(conversation_id) else ("", 404)


@app.get("/escalations")
def escalations() -> Response:
    """Who waits."""
    return jsonify(storage.list_escalations())


@app.route("/users/<user_id>", methods=["GET", "PUT", "PATCH", "DELETE"])
def user(user_id: str) -> tuple[Any, int]:
    """A customer's profile."""
    if request.method == "PUT":
        storage.save_user(user_id, request.get_json())
    elif request.method == "PATCH" and storage.update_user(user_id, request.get_json()) is None:
        return "", 404
    elif request.method == "DELETE":
        return "", 204 if storage.delete_user(user_id) else 404
    found = storage.load_user(user_id)
    return (jsonify(found), 200) if found else ("", 404)


@app.post("/cleanup")
def cleanup() -> Response:
    """What a timer calls."""
    return jsonify(storage.cleanup_old_sessions(timeout_hours=float(request.args.get("hours", 24))))
