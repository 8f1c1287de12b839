"""The server of the live report."""

from collections.abc import Sequence
from pathlib import Path

from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.settings.settings import Settings
from app.tools.report.live import LiveReport
from app.tools.report.pictures import javascript
from app.tools.web.local_app import headers, local_app
from app.tools.web.server import listen, serve

# Vega compiles its expressions, and sets styles.
_HEADERS = headers(scripts="'self' 'unsafe-eval'", styles="'unsafe-inline'")
_SCRIPT = "text/javascript"


def serve_report(settings: Settings, runs: Sequence[str]) -> None:
    """Serve the report of any runs until a signal ends it.

    Args:
        runs: names of those to show first; by default TRAIN_RUN_NAME, or the one written to last.

    Raises:
        UserError: the address or the port cannot be listened on.
    """
    cfg, runs_dir = settings.report, settings.general.data_dir / "runs"
    first = runs or [name for name in (settings.train.run_name,) if name]
    report = LiveReport(runs_dir, first)

    def page(request: Request) -> Response:
        asked = request.query_params
        choice = report.choice([*filter(None, asked.getlist("run"))] if "run" in asked else None)
        tag = {"ETag": choice.version}
        if request.headers.get("if-none-match") == choice.version:
            return Response(status_code=304, headers=_HEADERS | tag)
        content = report.page(choice).encode(errors="replace")
        return Response(content, media_type="text/html", headers=_HEADERS | tag)

    def script(_request: Request) -> Response:
        source = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
        return Response(source, media_type=_SCRIPT, headers=_HEADERS)

    def vega(_request: Request) -> Response:
        return Response(javascript(), media_type=_SCRIPT, headers=_HEADERS)

    routes = [Route("/", page), Route("/page.js", script), Route("/vega.js", vega)]
    app = local_app(routes, cfg.host)
    app.add_middleware(GZipMiddleware, compresslevel=4)
    with listen(cfg.host, cfg.port, cfg.prefix()) as listener:
        serve(app, listener, cfg.host, f"the report of the runs in {runs_dir}")
