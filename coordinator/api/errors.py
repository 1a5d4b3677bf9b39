"""Refusals as problem documents (RFC 9457), each with its stable `code`."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from coordinator.metrics import Metrics
from coordinator.refused import Refused
from shared.errors import FormatError
from shared.protocol import DIGEST_HEADER, PROBLEM_TYPE, SITE_HEADER, Code, content_digest

log = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

STATUS = {
    Code.BAD_REQUEST: 400,
    Code.MALFORMED: 400,
    Code.WRONG_DIGEST: 400,
    Code.WRONG_PROTOCOL: 400,
    Code.UNAUTHORIZED: 401,
    Code.CUT: 408,
    Code.NOT_YOUR_SITE: 403,
    Code.TOO_MANY_LEARNERS: 403,
    Code.NOT_FOUND: 404,
    Code.NOT_PUBLISHED: 404,
    Code.UNKNOWN_UPLOAD: 404,
    Code.NOT_A_MEMBER: 409,
    Code.SUPERSEDED: 409,
    Code.WRONG_RUN: 409,
    Code.RUN_FINISHED: 409,
    Code.UNKNOWN_BASE: 409,
    Code.WRONG_BASE: 409,
    Code.WRONG_CODEC: 409,
    Code.TOO_STALE: 409,
    Code.ALREADY_CONTRIBUTED: 409,
    Code.WRONG_LAYOUT: 409,
    Code.WRONG_DATA: 409,
    Code.INCOMPLETE: 409,
    Code.VERSION_GONE: 410,
    Code.TOO_LARGE: 413,
    Code.INTERNAL: 500,
    Code.STOPPING: 503,
    Code.STORAGE: 507,
}


def problem(refused: Refused) -> web.Response:
    """The problem document of a refusal; never cached."""
    status = STATUS[refused.code]
    body = {"type": "about:blank", "title": refused.code.value, "status": status}
    body |= {"detail": refused.detail, "code": refused.code.value}
    if refused.version is not None:
        body["version"] = refused.version
    text = json.dumps(body)
    headers = {"Cache-Control": "no-store", DIGEST_HEADER: content_digest(text.encode())}
    return web.Response(status=status, text=text, content_type=PROBLEM_TYPE, headers=headers)


def problems(metrics: Metrics, knows_site: Callable[[str], bool]) -> Callable[..., Awaitable[web.StreamResponse]]:
    """A middleware that answers every refusal and every fault with a problem document, counted and logged."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except Refused as error:
            refused = error
        except FormatError as error:
            refused = Refused(Code.BAD_REQUEST, str(error))
        except web.HTTPRequestEntityTooLarge as error:
            refused = Refused(Code.TOO_LARGE, error.reason)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            refused = Refused(Code.NOT_FOUND if error.status == 404 else Code.BAD_REQUEST, error.reason)
        except Exception:
            # The last line of defence: one broken request must not take the daemon with it.
            log.exception("%s %s failed", request.method, request.path)
            refused = Refused(Code.INTERNAL, "the coordinator failed on this request; its log says why")
        claimed = request.headers.get(SITE_HEADER, "")
        if refused.code is not Code.NOT_PUBLISHED:
            # Labels only for names that exist: a stranger must not be able to grow the metrics without bound.
            site = claimed if knows_site(claimed) else ""
            metrics.refused.labels(site, refused.code.value).inc()
            # (Whoever joins a run that moves on is sent from one version to the next; nothing is wrong with that.)
            level = logging.INFO if refused.code is Code.VERSION_GONE else logging.WARNING
            said = f"refused {request.method} {request.path} of {claimed[:64]!r}: {refused} ({refused.code})"
            log.log(level, "%s", said)
        answer = problem(refused)
        if not request.content.at_eof():
            # What is left of the body would be taken for the next request.
            answer.force_close()
        return answer

    return middleware
