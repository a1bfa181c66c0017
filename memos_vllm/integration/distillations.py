"""Distillation as an operation: ``python -m memos_vllm.distill`` in a process of its own, and what came of it.

Off by default (``adapters.distill``): training takes minutes of the machine that serves.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from fastapi import Request
from pydantic import Field

from memos_vllm import activation
from memos_vllm.adapters.records import check_name
from memos_vllm.errors import AdapterError, Forbidden, NotFound
from memos_vllm.integration.distillation_jobs import DistillationJobs
from memos_vllm.integration.rest import Body, answers_errors, parse_body, principal, router_at, takes
from memos_vllm.integration.state import MemosState, state_of
from memos_vllm.types import Principal

router = router_at("/v1/adapters/distill")

NICENESS = 10
_running: dict[str, asyncio.Task[None]] = {}
"""Of this API process; one at a time."""


class DistillBody(Body):
    name: str
    memories: list[str] = Field(default=[], max_length=10_000)
    """Ids; empty: all of the user's that may be distilled, or those with the tag."""

    tag: str | None = None
    steps: int | None = Field(default=None, ge=1, le=100_000)
    num_controls: int | None = Field(default=None, ge=0, le=100_000)


@router.post("", openapi_extra=takes(DistillBody))
@answers_errors
async def start(raw_request: Request) -> Any:
    """Starts a distillation of the user's memories; its id leads to the report."""
    state = state_of(raw_request)
    body: DistillBody = await parse_body(raw_request, DistillBody)
    who = principal(raw_request, state, body.user)
    if state.config.adapters.distill == "off":
        raise Forbidden("the operator has not switched distillation on (adapters.distill)")
    check_name(body.name)
    for memory_id in body.memories:
        await asyncio.to_thread(state.service.distillable, who, memory_id)
    if _running:
        raise AdapterError("a distillation is running; ask again when it has ended", status=409)
    job = DistillationJobs(state.config.data_dir).begin(who)
    task = asyncio.create_task(_run(job, who, body, state), name="memos-distill")
    _running[job] = task
    task.add_done_callback(lambda _: _running.pop(job, None))
    return {"id": job, "state": "running"}


@router.get("/{job}")
@answers_errors
async def report(raw_request: Request, job: str, user: str | None = None) -> Any:
    """The state of a distillation and, once it has ended, its evaluation and what was published or why not."""
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    jobs = DistillationJobs(state.config.data_dir)
    if jobs.owner(job) != who:
        raise NotFound(f"no distillation {job[:64]!r}")
    await asyncio.to_thread(state.cut_reports, who)  # a memory may have gone while it ran
    found = jobs.report(job)
    if found is None:
        return {"id": job, "state": "running" if jobs.is_running(job) else "interrupted"}
    return {"id": job, "state": "ended", **found}


async def _run(job: str, who: Principal, body: DistillBody, state: MemosState) -> None:
    jobs = DistillationJobs(state.config.data_dir)
    command = [sys.executable, "-m", "memos_vllm.distill", "--quiet", "--report", str(jobs.report_path(job))]
    command += ["--tenant", who.tenant, "--user", who.user, "--name", body.name]
    command += ["--threads", str(max(1, (os.cpu_count() or 1) // 2))]  # the rest is the server's
    if path := activation.config_path():
        command += ["--config", path]
    if body.tag is not None:
        command += ["--tag", body.tag]
    for option, value in (("--steps", body.steps), ("--num-controls", body.num_controls)):
        command += [] if value is None else [option, str(value)]
    for memory_id in body.memories:
        command += ["--memory", memory_id]
    # A process of its own: it must not think that it belongs to the server.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MEMOS_", "VLLM_"))}
    try:
        with open(jobs.log_path(job), "wb") as log:
            process = await asyncio.create_subprocess_exec(
                "nice", "-n", str(NICENESS), *command, stdout=log, stderr=log, env=environment
            )
            try:
                await process.wait()
            except asyncio.CancelledError:
                process.terminate()
                raise
    finally:
        jobs.end(job)
