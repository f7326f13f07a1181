"""Refusals: requests that are answered with one error for all that they ask for, and have no effect."""

from __future__ import annotations

from fsm_ray import protocol
from fsm_ray.errors import FsmRayError
from fsm_ray.protocol import NO_TURN, ReadContent, ReadRecord, Request, TurnRequest, WriteRequest, reply
from fsm_ray.tally import OperationTally


def refusal(request: Request, error: FsmRayError, tally: OperationTally) -> bytes:
    """The reply that gives each operation of the request this error; they are counted."""
    if isinstance(request, WriteRequest):
        kinds: list[type | None] = [type(operation) for operation in request.operations]
    elif isinstance(request, TurnRequest):
        kinds = [type(each) if each.turn != NO_TURN else None for each in request.operations]
    elif isinstance(request, ReadContent | ReadRecord):
        kinds = [type(request)] * len(request.keys)
    else:
        kinds = [type(request)]
    for kind in kinds:
        if kind in tally.operations:  # neither waiting for turns nor a sign of life is one
            tally.operations[kind] += 1
            tally.count_failed(kind, error)
    tag: int = request.__struct_config__.tag  # type: ignore[assignment]
    return reply(tag, request.number, [protocol.encode_error(error)] * len(kinds))
